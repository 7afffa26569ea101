import { readFile } from 'node:fs/promises';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { AppError } from '../../src/lib/errors.js';
import { CLUSTER_BYTES, MIB } from '../../src/lib/units.js';
import { connect, definition } from '../exportd/rig.js';
import { expectCleanImage, firstDifference, makeQcow2, makeRaw, qemuImg } from '../lab/disk-image.js';
import { findDescendants } from '../lab/leftovers.js';
import { startNbdkit, startQemuNbd } from '../lab/nbd-server.js';
import { mountTmpfs } from '../lab/tmpfs.js';
import { disk, expectedDigest, startCaptureRig, startPush, type CaptureRig, type Started } from './rig.js';

const DISK_BYTES = 300 * MIB;
const DATA = [
  { offset: 0, length: 24 * MIB },
  { offset: 150 * MIB, length: 24 * MIB },
  { offset: 290 * MIB, length: 10 * MIB },
];
const WAIT = { timeout: 15_000, interval: 20 };

let rig: CaptureRig;
let truth: string;
let digest: string;
beforeAll(async () => {
  rig = await startCaptureRig();
  truth = rig.lab.file('truth.raw');
  await makeRaw({ path: truth, sizeBytes: DISK_BYTES, regions: DATA });
  digest = await expectedDigest(truth);
});
afterAll(() => rig[Symbol.asyncDispose]());

async function storageDaemon(listener: 'unix' | 'tcp'): Promise<number> {
  return (await rig.exportd.status()).listeners.find(({ id }) => id === listener)!.pid!;
}

/** The one qemu-nbd that this process has started. */
async function privateServer(): Promise<number> {
  for (const pid of await findDescendants(process.pid)) {
    if ((await readFile(`/proc/${pid}/comm`, 'utf8')).trim() === 'qemu-nbd') return pid;
  }
  throw new Error('there is none');
}

/** Bytes that the newest report says were written. */
function written(started: Started): number {
  return started.reports.at(-1)?.[0]?.progress.bytesWritten ?? 0;
}

describe('a connection that is lost', () => {
  it.each([
    ['the storage daemon that has the layer, over TCP', 'unix', 'tcp'],
    ['the storage daemon that has the layer, over its socket', 'unix', 'unix'],
    ['the storage daemon that passes on', 'tcp', 'tcp'],
  ] as const)(
    '%s killed in the middle: the agent goes on and the layer is whole',
    async (_what, victim, via) => {
      await using source = await rig.source({ kind: 'image', path: truth, format: 'raw', bitmap: null });
      const name = `killed-${victim}-${via}`;
      const layer = await rig.addLayer(name, { sizeBytes: DISK_BYTES });
      const started = startPush([disk(source, layer[via])], { bytesPerSecond: 12 * MIB });
      await expect.poll(() => written(started), WAIT).toBeGreaterThan(8 * MIB);
      process.kill(await storageDaemon(victim), 'SIGKILL');
      await started.ended;
      expect(started.notes.length).toBeGreaterThan(0);
      expect(started.notes[0]).toMatch(/^disk vda: .*\(NBD_[A-Z]+\); going on from [1-9][0-9.]* [KM]iB$/);
      expect(started.completed.get('vda')).toMatchObject({
        sumsDigest: digest,
        bytesRead: 58 * MIB,
        bytesWritten: 58 * MIB,
      });
      await rig.exportd.remove(`${name}.conf`);
      await rig.exportd.reload();
      // A storage daemon that is killed leaks clusters; nothing else may be wrong.
      const check = await qemuImg(['check', '-q', '-f', 'qcow2', '-r', 'leaks', layer.path]);
      expect(check).not.toMatch(/corruption/i);
      await expectCleanImage(layer.path);
      const copy = rig.lab.file('killed.copy');
      await qemuImg(['convert', '-f', 'qcow2', '-O', 'raw', layer.path, copy]);
      expect(await firstDifference(truth, copy)).toBeNull();
    },
  );

  it('the server of the source killed and started again: the agent goes on', async () => {
    const options = {
      image: truth,
      format: 'raw',
      socketPath: rig.lab.file('source.sock'),
      isReadOnly: true,
    } as const;
    const server = await startQemuNbd(options);
    await using source = await rig.source({ kind: 'nbd', uri: server.uri });
    const layer = await rig.addLayer('source-killed', { sizeBytes: DISK_BYTES });
    const started = startPush([disk(source, layer.tcp)], { bytesPerSecond: 16 * MIB });
    await expect.poll(() => written(started), WAIT).toBeGreaterThan(4 * MIB);
    await server.kill();
    await expect.poll(() => started.notes.length, WAIT).toBeGreaterThan(1);
    await using _again = await startQemuNbd(options);
    await started.ended;
    expect(started.completed.get('vda')?.sumsDigest).toBe(digest);
    expect(await firstDifference(truth, await layer.read())).toBeNull();
  });

  it('is given up after the time for it, with the disk and the last reason', async () => {
    await using source = await rig.source({ kind: 'image', path: truth, format: 'raw', bitmap: null });
    const layer = await rig.addLayer('gone', { sizeBytes: DISK_BYTES });
    const started = startPush([disk(source, layer.tcp)], { bytesPerSecond: 16 * MIB, retryMs: 1500 });
    await expect.poll(() => written(started), WAIT).toBeGreaterThan(0);
    await rig.exportd.remove('gone.conf');
    await rig.exportd.reload();
    await expect(started.ended).rejects.toMatchObject({
      code: 'NBD_CONNECT',
      message: expect.stringMatching(/^disk vda, for more than 1\.5 s: /) as string,
    });
    expect(started.completed.size).toBe(0);
  });

  it('at the start ends it at once: nobody waits for a wrong address', async () => {
    await using source = await rig.source({ kind: 'image', path: truth, format: 'raw', bitmap: null });
    const started = startPush([disk(source, rig.exportd.tcp('nobody'))]);
    await expect(started.ended).rejects.toMatchObject({
      code: 'NBD_CONNECT',
      message: expect.stringMatching(/^the export for disk vda: /) as string,
    });
  });
});

describe('what a server says to a request', () => {
  it.each(['tcp', 'unix'] as const)('a layer without room ends it at once, over %s', async (via) => {
    await using tmpfs = await mountTmpfs({ path: rig.lab.file('small'), sizeBytes: 8 * MIB });
    const image = `${tmpfs.path}/full.qcow2`;
    await makeQcow2({ path: image, sizeBytes: DISK_BYTES });
    await rig.exportd.write('full.conf', definition('full', image, { isReadOnly: false }));
    await rig.exportd.reload();
    await using source = await rig.source({ kind: 'image', path: truth, format: 'raw', bitmap: null });
    const started = startPush([disk(source, rig.exportd[via]('full'))]);
    await expect(started.ended).rejects.toMatchObject({ code: 'REPOSITORY_FULL' });
    expect(started.notes).toEqual([]);
    await rig.exportd.remove('full.conf');
    await rig.exportd.reload();
  });

  it('a disk that cannot be read is tried for the time of a lost connection, then is the error', async () => {
    await using server = await startNbdkit({
      socketPath: rig.lab.file('bad.sock'),
      plugin: ['memory', 'size=16M'],
      filters: ['error'],
      parameters: ['error-pread=EIO', 'error-pread-rate=100%'],
      isReadOnly: true,
    });
    await using source = await rig.source({ kind: 'nbd', uri: server.uri });
    const layer = await rig.addLayer('bad', { sizeBytes: 16 * MIB });
    const started = startPush([disk(source, layer.tcp)], { retryMs: 700 });
    // nbdkit's memory plugin knows its holes, so an empty disk is not read at all.
    await started.ended;
    await using data = await startNbdkit({
      socketPath: rig.lab.file('bad2.sock'),
      plugin: ['pattern', 'size=16M'],
      filters: ['error'],
      parameters: ['error-pread=EIO', 'error-pread-rate=100%'],
      isReadOnly: true,
    });
    await using broken = await rig.source({ kind: 'nbd', uri: data.uri });
    const failing = startPush([disk(broken, layer.tcp)], { retryMs: 700 });
    await expect(failing.ended).rejects.toMatchObject({ code: 'NBD_REQUEST', details: { op: 'pread' } });
    expect(failing.notes.length).toBeGreaterThan(0);
  });

  it('a private server that ended has lost its lock: the disk may have changed', async () => {
    await using source = await rig.source({ kind: 'image', path: truth, format: 'raw', bitmap: null });
    const layer = await rig.addLayer('unlocked', { sizeBytes: DISK_BYTES });
    const started = startPush([disk(source, layer.tcp)], { bytesPerSecond: 16 * MIB });
    await expect.poll(() => written(started), WAIT).toBeGreaterThan(0);
    process.kill(await privateServer(), 'SIGKILL');
    await expect(started.ended).rejects.toMatchObject({ code: 'SNAPSHOT_LOST' });
  });

  it('beyond the size of the disk the export takes nothing, and the layer stays as it is', async () => {
    const layer = await rig.addLayer('beyond', { sizeBytes: 4 * MIB });
    for (const uri of [layer.tcp, layer.unix]) {
      await using raw = await connect(uri);
      for (const offset of [4 * MIB, 4 * MIB - 512, 1024 * MIB]) {
        await expect(raw.pwrite(offset, Buffer.alloc(1024, 7))).rejects.toThrow();
        await expect(raw.zero(offset, 1024)).rejects.toThrow();
      }
      await raw.pwrite(0, Buffer.alloc(512, 9));
      await raw.flush();
    }
    const copy = await layer.read();
    const map = JSON.parse(await qemuImg(['map', '-f', 'qcow2', '--output=json', layer.path])) as {
      start: number;
      length: number;
      data: boolean;
    }[];
    expect(map.filter(({ data }) => data)).toMatchObject([{ start: 0, length: CLUSTER_BYTES }]);
    expect(map.at(-1)!.start + map.at(-1)!.length).toBe(4 * MIB);
    expect(copy).toContain('beyond');
  });
});

describe('who asked', () => {
  it('a cancel ends it within two seconds, also when the export does not answer', async () => {
    await using source = await rig.source({ kind: 'image', path: truth, format: 'raw', bitmap: null });
    const layer = await rig.addLayer('cancelled', { sizeBytes: DISK_BYTES });
    const started = startPush([disk(source, layer.unix)], { bytesPerSecond: 16 * MIB });
    await expect.poll(() => written(started), WAIT).toBeGreaterThan(0);
    const frozen = await storageDaemon('unix');
    process.kill(frozen, 'SIGSTOP');
    try {
      const at = performance.now();
      started.stop();
      await expect(started.ended).rejects.toMatchObject({ code: 'CANCELLED' });
      expect(performance.now() - at).toBeLessThan(2000);
    } finally {
      process.kill(frozen, 'SIGCONT');
    }
  });

  it('a daemon that is away for a moment does not stop the copy, and hears of the end', async () => {
    await using source = await rig.source({ kind: 'image', path: truth, format: 'raw', bitmap: null });
    const layer = await rig.addLayer('away', { sizeBytes: DISK_BYTES });
    let isAway = true;
    let heard = 0;
    const server = {
      report: () => Promise.resolve(!isAway),
      complete: () => {
        if (isAway) setTimeout(() => (isAway = false), 300);
        else heard += 1;
        return Promise.resolve(heard > 0);
      },
    };
    const started = startPush([disk(source, layer.tcp)], { server });
    await started.ended;
    expect(heard).toBe(1);
    expect(started.notes).toEqual([
      'the daemon does not answer; the copy goes on, and is given up after 1 min 00 s',
      'the daemon answers again',
    ]);
    expect(await firstDifference(truth, await layer.read())).toBeNull();
  });

  it('a daemon that is away for longer than it bears silence itself has given the push up', async () => {
    await using source = await rig.source({ kind: 'image', path: truth, format: 'raw', bitmap: null });
    const layer = await rig.addLayer('silent', { sizeBytes: DISK_BYTES });
    const server = { report: () => Promise.resolve(false), complete: () => Promise.resolve(false) };
    const options = { server, silenceMs: 1000, bytesPerSecond: 4 * MIB };
    const started = startPush([disk(source, layer.tcp)], options);
    await expect(started.ended).rejects.toMatchObject({ code: 'PUSH_SILENT' });
  });

  it('a push that is over at the daemon ends the copy at once, with what it said', async () => {
    await using source = await rig.source({ kind: 'image', path: truth, format: 'raw', bitmap: null });
    const layer = await rig.addLayer('over', { sizeBytes: DISK_BYTES });
    const over = new AppError('RUN_NOT_ACTIVE', 'it was cancelled');
    let reports = 0;
    const server = {
      report: () => (++reports > 1 ? Promise.reject(over) : Promise.resolve(true)),
      complete: () => Promise.resolve(true),
    };
    const started = startPush([disk(source, layer.tcp)], { server, bytesPerSecond: 4 * MIB });
    await expect(started.ended).rejects.toBe(over);
    expect(reports).toBe(2);
  });
});
