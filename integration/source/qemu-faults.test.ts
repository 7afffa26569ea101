import { spawn, type ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import { readdir } from 'node:fs/promises';
import { expect, test } from 'vitest';
import { pollUntil } from '../../src/lib/deadline.js';
import { newId, type PointId, type RunId } from '../../src/lib/id.js';
import { MIB } from '../../src/lib/units.js';
import { bitmapNameFor } from '../../src/source/bitmap-name.js';
import { mountTmpfs } from '../lab/tmpfs.js';
import { makeRequest, makeRig, readDisk, startProxy, type Machine, type Rig } from './qemu-rig.js';

const CONTROL = { signal: new AbortController().signal };
const CHILD = new URL('qemu-child.ts', import.meta.url).pathname;

async function runDirectories(rig: Rig): Promise<string[]> {
  return readdir(rig.scratch).catch(() => []);
}

function startChild(rig: Rig, run: { runId: RunId; pointId: PointId; socket?: string }): ChildProcess {
  const { runId, pointId, socket = rig.socket } = run;
  const targets = rig.disks.map((_, index) => `d${index}`);
  return spawn(
    process.execPath,
    ['--import', 'tsx', CHILD, socket, rig.scratch, runId, pointId, ...targets],
    { stdio: ['ignore', 'pipe', 'inherit'] },
  );
}

async function killed(child: ChildProcess): Promise<void> {
  if (child.exitCode !== null || child.signalCode !== null) return;
  const exited = once(child, 'exit');
  child.kill('SIGKILL');
  await exited;
}

async function commitPoint(rig: Rig, bitmaps: (string | null)[] = []): Promise<string> {
  const request = await makeRequest(rig, { bitmaps });
  await using snapshot = await rig.source.snapshot(request);
  await snapshot.close();
  await snapshot.commit([]);
  return bitmapNameFor(request.pointId);
}

test('a killed QEMU: the snapshot is lost, its records are broken, and the next backup is right', async () => {
  await using rig = await makeRig(['qcow2', 'raw']);
  const first = await rig.start({ isPaused: true });
  const old = await commitPoint(rig);
  const bitmaps = [old, null];
  // A record is in the file only after QEMU ended properly.
  await first.monitor.execute('quit');
  await first.server.exited;
  const machine = await rig.start({ isPaused: true });
  const request = await makeRequest(rig, { bitmaps });
  await using snapshot = await rig.source.snapshot(request);
  await machine.server.kill();
  await pollUntil(() => (snapshot.lost.aborted ? true : undefined), { timeoutMs: 5000, what: 'the loss' });
  expect(snapshot.lost.reason).toMatchObject({ code: 'SNAPSHOT_LOST' });
  await expect(snapshot.close()).rejects.toMatchObject({ code: 'SNAPSHOT_LOST' });
  await snapshot[Symbol.asyncDispose]();
  expect(await runDirectories(rig)).toEqual([]);
  await expect(rig.source.probe(rig.sourceDisks, CONTROL)).rejects.toMatchObject({
    code: 'SOURCE_UNREACHABLE',
  });

  const again = await rig.start({ isPaused: true });
  expect((await rig.source.discover(CONTROL)).facts.changeRecords).toMatchObject([
    { name: old, isBroken: true },
  ]);
  const next = await makeRequest(rig, { brokenRecords: [old] });
  expect(next.disks[0]!.probe.records).toEqual([{ bitmap: old, isInconsistent: true }]);
  await expect(rig.source.snapshot(await makeRequest(rig, { bitmaps }))).rejects.toMatchObject({
    code: 'BITMAP_INCONSISTENT',
  });
  await again.io('d0', 'write -P 7 0 64k');
  await using full = await rig.source.snapshot(next);
  const { content } = await readDisk([...full.disks.values()][0]!);
  expect(content.subarray(0, 65536).equals(Buffer.alloc(65536, 7))).toBe(true);
  await full.close();
  await full.commit([]);
  expect((await rig.source.discover(CONTROL)).facts.changeRecords).toMatchObject([
    { name: bitmapNameFor(next.pointId), isBroken: false },
  ]);
});

test('a QEMU that ends properly takes an unfinished record with it into the image; it is found and removed', async () => {
  await using rig = await makeRig(['qcow2']);
  const first = await rig.start({ isPaused: true });
  const request = await makeRequest(rig);
  await using snapshot = await rig.source.snapshot(request);
  await first.monitor.execute('quit');
  await first.server.exited;
  await expect(snapshot.close()).rejects.toMatchObject({ code: 'SNAPSHOT_LOST' });
  await snapshot[Symbol.asyncDispose]();
  expect(rig.notes).toContainEqual(expect.objectContaining({ code: 'MACHINE_GONE' }));
  const machine = await rig.start({ isPaused: true });
  const records = async () => (await rig.source.discover(CONTROL)).facts.changeRecords;
  expect(await records()).toMatchObject([{ pointId: request.pointId, isBroken: false }]);
  await rig.source.cleanUp({ ...request, isCommitted: false }, CONTROL);
  expect(await records()).toEqual([]);
  expect(await machine.isRunning()).toBe(false);
});

test('scratch space too small under a writing guest: SCRATCH_FULL, and no guest write fails', async () => {
  await using rig = await makeRig(['qcow2', 'qcow2'], { guest: true });
  await using small = await mountTmpfs({ path: rig.directory.file('small'), sizeBytes: 4 * MIB });
  const machine = await rig.start();
  const source = rig.open({ scratchDirectory: small.path });
  // Once through all of its slots: zeroes that are saved would need no room.
  await pollUntil(async () => ((await guestWrites(machine)) > 1024 ? true : undefined), {
    timeoutMs: 20_000,
    intervalMs: 50,
    what: 'writes of the guest',
  });
  const before = await machine.graph();
  await using snapshot = await source.snapshot(await makeRequest(rig));
  await pollUntil(() => (snapshot.lost.aborted ? true : undefined), { timeoutMs: 20_000, what: 'the loss' });
  expect(snapshot.lost.reason).toMatchObject({ code: 'SCRATCH_FULL' });
  // The guest writes on until there is really no room.
  const [first] = snapshot.disks.values();
  const { uri } = first!.endpoint;
  const view = { ...first!, endpoint: { ...first!.endpoint, uri: uri.replace('?', '-view?') } };
  await pollUntil(
    async () =>
      await readDisk(view).then(
        () => undefined,
        () => true,
      ),
    {
      timeoutMs: 20_000,
      intervalMs: 200,
      what: 'the end of the snapshot',
    },
  );
  await new Promise((resolve) => setTimeout(resolve, 500));
  expect(await machine.failedGuestWrites()).toBe(0);
  await expect(snapshot.close()).rejects.toMatchObject({ code: 'SCRATCH_FULL' });
  await snapshot[Symbol.asyncDispose]();
  expect(await machine.graph()).toEqual(before);
  expect(await readdir(small.path)).toEqual([]);
  expect(await machine.isRunning()).toBe(true);
  const last = await guestWrites(machine);
  await pollUntil(async () => ((await guestWrites(machine)) > last ? true : undefined), {
    timeoutMs: 5000,
    what: 'another write of the guest',
  });
});

async function guestWrites(machine: Machine): Promise<number> {
  const stats = (await machine.monitor.execute('query-blockstats')) as { stats: { wr_operations: number } }[];
  return stats[0]!.stats.wr_operations;
}

test('our process killed while it holds a snapshot: all of it is found and removed, and nothing else', async () => {
  await using rig = await makeRig(['qcow2', 'raw'], { guest: true });
  const machine = await rig.start();
  const kept = await commitPoint(rig);
  await machine.monitor.execute('block-dirty-bitmap-add', {
    node: 'n0',
    name: 'of-somebody',
    persistent: true,
  });
  await machine.monitor.execute('blockdev-add', { driver: 'null-co', 'node-name': 'hf-other', size: 65536 });
  const before = await machine.graph();
  const run = { runId: newId<RunId>(), pointId: newId<PointId>() };
  const child = startChild(rig, run);
  try {
    await once(child.stdout!, 'data');
    expect(await machine.graph()).not.toEqual(before);
  } finally {
    await killed(child);
  }
  const another = { runId: newId<RunId>(), pointId: newId<PointId>(), isCommitted: false };
  await rig.source.cleanUp(another, CONTROL);
  expect(await runDirectories(rig)).toEqual([run.runId]);
  await rig.source.cleanUp({ ...run, isCommitted: false }, CONTROL);
  expect(await machine.graph()).toEqual(before);
  expect(await runDirectories(rig)).toEqual([]);
  await rig.source.cleanUp({ ...run, isCommitted: false }, CONTROL);
  expect((await rig.source.discover(CONTROL)).facts.changeRecords.map(({ name }) => name)).toEqual([kept]);
  expect(await machine.failedGuestWrites()).toBe(0);
  expect(await machine.isRunning()).toBe(true);
  await commitPoint(rig, [kept]);
});

test('the record of a committed point outlives its run', async () => {
  await using rig = await makeRig(['qcow2']);
  await rig.start({ isPaused: true });
  const run = { runId: newId<RunId>(), pointId: newId<PointId>() };
  const child = startChild(rig, run);
  try {
    await once(child.stdout!, 'data');
  } finally {
    await killed(child);
  }
  await rig.source.cleanUp({ ...run, isCommitted: true }, CONTROL);
  expect((await rig.source.discover(CONTROL)).facts.changeRecords).toMatchObject([{ pointId: run.pointId }]);
  expect(await runDirectories(rig)).toEqual([]);
});

test('our process killed while the machine stands still: it goes on', async () => {
  await using rig = await makeRig(['qcow2', 'qcow2'], { guest: true });
  const machine = await rig.start();
  const before = await machine.graph();
  const socket = rig.directory.file('proxy.sock');
  let isStopped = false;
  // The first connection, number 0, is the probe's.
  await using _proxy = await startProxy({ path: socket, upstream: rig.socket, hold: 1 }, (line) => {
    if (isStopped) return null;
    isStopped = line.includes('"stop"');
    return line;
  });
  const run = { runId: newId<RunId>(), pointId: newId<PointId>(), socket };
  const child = startChild(rig, run);
  try {
    await pollUntil(async () => (isStopped && !(await machine.isRunning()) ? true : undefined), {
      timeoutMs: 15_000,
      what: 'the machine standing still',
    });
  } finally {
    await killed(child);
  }
  await pollUntil(async () => ((await machine.isRunning()) ? true : undefined), {
    timeoutMs: 5000,
    what: 'the machine going on',
  });
  await rig.source.cleanUp({ ...run, isCommitted: false }, CONTROL);
  expect(await machine.graph()).toEqual(before);
});
