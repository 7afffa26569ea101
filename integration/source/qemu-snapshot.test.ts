import { expect, test } from 'vitest';
import { pollUntil } from '../../src/lib/deadline.js';
import { bitmapNameFor } from '../../src/source/bitmap-name.js';
import type { SourceSnapshot } from '../../src/source/source.js';
import {
  applyDirty,
  DISK_BYTES,
  guestCount,
  makeRequest,
  makeRig,
  randomOf,
  readDisk,
  type Machine,
  type ReadDisk,
  type Rig,
} from './qemu-rig.js';

const CONTROL = { signal: new AbortController().signal };
const KIB = 1024;

async function readAll(rig: Rig, snapshot: SourceSnapshot): Promise<ReadDisk[]> {
  const disks: ReadDisk[] = [];
  for (const { diskId } of rig.sourceDisks) disks.push(await readDisk(snapshot.disks.get(diskId)!));
  return disks;
}

async function guestWrites(machine: Machine): Promise<number> {
  const stats = (await machine.monitor.execute('query-blockstats')) as { stats: { wr_operations: number } }[];
  return stats[0]!.stats.wr_operations;
}

async function moreGuestWrites(machine: Machine): Promise<void> {
  const before = await guestWrites(machine);
  await pollUntil(async () => ((await guestWrites(machine)) > before + 100 ? true : undefined), {
    timeoutMs: 20_000,
    intervalMs: 50,
    what: 'writes of the guest',
  });
}

test('a guest that writes two disks in turn: each point has both at one instant, and nothing is left', async () => {
  await using rig = await makeRig(['qcow2', 'qcow2'], { guest: true });
  const machine = await rig.start();
  await moreGuestWrites(machine);
  const before = await machine.graph();
  let parents: Buffer[] = [];
  let bitmap: string | null = null;
  let lastCount = 0;
  for (let round = 0; round < 5; round += 1) {
    const request = await makeRequest(rig, { bitmaps: [bitmap, bitmap] });
    await using snapshot = await rig.source.snapshot(request);
    await moreGuestWrites(machine);
    const disks = await readAll(rig, snapshot);
    const [first, second] = disks.map(({ content }) => guestCount(content));
    expect(first! - second!).toBeOneOf([0, 1]);
    expect(second).toBeGreaterThan(lastCount);
    lastCount = second!;
    for (const [index, parent] of parents.entries()) {
      expect(disks[index]!.dirty).toContain(false);
      expect(applyDirty(parent, disks[index]!).equals(disks[index]!.content)).toBe(true);
    }
    await snapshot.close();
    await snapshot.commit(bitmap === null ? [] : [bitmap]);
    parents = disks.map(({ content }) => content);
    bitmap = bitmapNameFor(request.pointId);
    expect([...snapshot.disks.values()].map(({ changeIdTo }) => changeIdTo)).toEqual([bitmap, bitmap]);
    expect((await rig.source.discover(CONTROL)).facts.changeRecords).toEqual([
      { name: bitmap, pointId: request.pointId, isBroken: false },
    ]);
  }
  const pauses = rig.notes.map(({ details }) => details?.['pauseMs'] as number).sort((a, b) => a - b);
  expect(pauses).toHaveLength(5);
  expect(pauses[2]).toBeLessThan(200);
  await rig.source.removeRecords([bitmap!, 'not-there'], CONTROL);
  expect(await machine.graph()).toEqual(before);
  expect(await machine.failedGuestWrites()).toBe(0);
  expect(await machine.isRunning()).toBe(true);
});

test('a guest with a raw and a qcow2 disk: one keeps a record, the other says why not', async () => {
  await using rig = await makeRig(['raw', 'qcow2'], { guest: true });
  const machine = await rig.start();
  await moreGuestWrites(machine);
  const before = await machine.graph();
  const request = await makeRequest(rig);
  expect(request.disks.map(({ probe }) => probe.noRecordReason)).toEqual([
    'an image of format raw holds no bitmaps',
    null,
  ]);
  await using snapshot = await rig.source.snapshot(request);
  await moreGuestWrites(machine);
  const [first, second] = (await readAll(rig, snapshot)).map(({ content }) => guestCount(content));
  expect(first! - second!).toBeOneOf([0, 1]);
  await snapshot.close();
  const { facts, disks } = await rig.source.discover(CONTROL);
  expect(facts.changeRecords).toHaveLength(1);
  expect(disks.map((disk) => disk.facts.incremental.isPossible)).toEqual([false, true]);
  await snapshot[Symbol.asyncDispose]();
  expect(await machine.graph()).toEqual(before);
});

/**
 * Writes from the second monitor, one after another, with the disk's content after each. Every state the disk
 * was in while a snapshot was being taken is a right answer, and no other.
 */
class Workload {
  readonly content = Buffer.alloc(DISK_BYTES);
  readonly #applied: ((content: Buffer) => void)[] = [];
  #isStopped = false;

  constructor(
    private readonly machine: Machine,
    private readonly random: (below: number) => number,
  ) {}

  async step(): Promise<void> {
    const { random } = this;
    const pattern = 1 + random(255);
    const kinds = [`write -P ${pattern}`, `write -P ${pattern}`, 'write -z', 'write -z -u', 'discard'];
    const kind = kinds[random(kinds.length)]!;
    // Only whole clusters are surely zero after a discard.
    const unit = kind === 'discard' ? 64 * KIB : 512;
    const length = unit * (1 + Math.floor(random(random(4) === 0 ? 512 * KIB : 64 * KIB) / unit));
    const offset = unit * random((DISK_BYTES - length) / unit);
    this.#applied.push((content) => {
      content.fill(kind.includes('-P') ? pattern : 0, offset, offset + length);
    });
    await this.machine.io('d0', `${kind} ${offset} ${length}`);
  }

  async run(): Promise<void> {
    while (!this.#isStopped) await this.step();
  }

  stop(): void {
    this.#isStopped = true;
  }

  /** Steps done or under way so far; of them those before are in `content` after `settle`. */
  get steps(): number {
    return this.#applied.length;
  }

  #settled = 0;
  settle(steps: number): Buffer {
    for (; this.#settled < steps; this.#settled += 1) this.#applied[this.#settled]!(this.content);
    return this.content;
  }
}

test.each([1, 2, 3, 4])(
  'random writes, zeroes and discards, seed %i: every point is the disk at one moment',
  async (seed) => {
    await using rig = await makeRig(['qcow2']);
    const machine = await rig.start({ isPaused: true });
    const random = randomOf(seed);
    const workload = new Workload(machine, random);
    let parent: Buffer | null = null;
    let bitmap: string | null = null;
    for (let round = 0; round < 5; round += 1) {
      for (let count = random(30); count > 0; count -= 1) await workload.step();
      const request = await makeRequest(rig, { bitmaps: [bitmap] });
      const running = new Workload(machine, random);
      workload.settle(workload.steps).copy(running.content);
      const done = running.run();
      await using snapshot = await rig.source.snapshot(request);
      const latest = running.steps;
      const [disk] = await readAll(rig, snapshot);
      running.stop();
      await done;
      let at = 0;
      while (at < latest && !running.settle(at).equals(disk!.content)) at += 1;
      expect(running.settle(at).equals(disk!.content)).toBe(true);
      if (parent !== null) expect(applyDirty(parent, disk!).equals(disk!.content)).toBe(true);
      await snapshot.close();
      await snapshot.commit(bitmap === null ? [] : [bitmap]);
      parent = disk!.content;
      bitmap = bitmapNameFor(request.pointId);
      running.settle(running.steps).copy(workload.content);
    }
    expect(await machine.isRunning()).toBe(false);
  },
);

test.each(['write -z', 'write -z -u', 'discard'])('blocks zeroed by `%s` are dirty', async (zero) => {
  await using rig = await makeRig(['qcow2']);
  const machine = await rig.start({ isPaused: true });
  await machine.io('d0', 'write -P 170 0 4M');
  const full = await makeRequest(rig);
  const parent = await (async () => {
    await using snapshot = await rig.source.snapshot(full);
    const [disk] = await readAll(rig, snapshot);
    await snapshot.close();
    await snapshot.commit([]);
    return disk!.content;
  })();
  await machine.io('d0', `${zero} 1M 1M`);
  const bitmap = bitmapNameFor(full.pointId);
  await using snapshot = await rig.source.snapshot(await makeRequest(rig, { bitmaps: [bitmap] }));
  const [disk] = await readAll(rig, snapshot);
  expect(disk!.dirty!.map((isDirty, cluster) => (isDirty ? cluster : -1)).filter((n) => n >= 0)).toEqual(
    Array.from({ length: 16 }, (_, n) => 16 + n),
  );
  expect(disk!.content.subarray(1024 * KIB, 2048 * KIB).equals(Buffer.alloc(1024 * KIB))).toBe(true);
  expect(applyDirty(parent, disk!).equals(disk!.content)).toBe(true);
});

test('two repositories count from their own points', async () => {
  await using rig = await makeRig(['qcow2']);
  const machine = await rig.start({ isPaused: true });
  const point = async (bitmap: string | null, obsolete: string[]) => {
    const request = await makeRequest(rig, { bitmaps: [bitmap] });
    await using snapshot = await rig.source.snapshot(request);
    const [disk] = await readAll(rig, snapshot);
    await snapshot.close();
    await snapshot.commit(obsolete);
    return { name: bitmapNameFor(request.pointId), dirty: disk!.dirty?.filter(Boolean).length };
  };
  const a1 = await point(null, []);
  await machine.io('d0', 'write -P 1 0 64k');
  const b1 = await point(null, []);
  await machine.io('d0', 'write -P 2 1M 64k');
  const a2 = await point(a1.name, [a1.name]);
  await machine.io('d0', 'write -P 3 2M 64k');
  const b2 = await point(b1.name, [b1.name]);
  const a3 = await point(a2.name, [a2.name]);
  expect([a2.dirty, b2.dirty, a3.dirty]).toEqual([2, 2, 1]);
  const names = (await rig.source.discover(CONTROL)).facts.changeRecords.map(({ name }) => name);
  expect(names.sort()).toEqual([b2.name, a3.name].sort());
});

test('the estimate is what is marked, or allocated', async () => {
  await using rig = await makeRig(['qcow2', 'raw']);
  const machine = await rig.start({ isPaused: true });
  for (const target of ['d0', 'd1']) await machine.io(target, 'write -P 1 0 2M');
  const full = await makeRequest(rig);
  const [qcow2, raw] = [...(await rig.source.estimate(full.disks, CONTROL)).values()];
  expect(qcow2).toBeGreaterThanOrEqual(2048 * KIB);
  expect(qcow2).toBeLessThan(3072 * KIB);
  expect(raw).toBeGreaterThanOrEqual(2048 * KIB);
  expect(raw).toBeLessThan(3072 * KIB);
  await using snapshot = await rig.source.snapshot(full);
  await snapshot.close();
  await snapshot.commit([]);
  await machine.io('d0', 'write -P 1 4M 256k');
  const next = await makeRequest(rig, { bitmaps: [bitmapNameFor(full.pointId)] });
  expect([...(await rig.source.estimate(next.disks, CONTROL)).values()]).toEqual([256 * KIB, raw]);
});

test('a record that is broken on one disk goes on at the other', async () => {
  await using rig = await makeRig(['qcow2', 'qcow2']);
  const machine = await rig.start({ isPaused: true });
  const first = await makeRequest(rig);
  const name = bitmapNameFor(first.pointId);
  {
    await using snapshot = await rig.source.snapshot(first);
    await snapshot.close();
    await snapshot.commit([]);
  }
  // Somebody switches it off: from here on it may miss writes.
  await machine.monitor.execute('block-dirty-bitmap-disable', { node: 'n0', name });
  await machine.io('d1', 'write -P 1 1M 64k');
  const next = await makeRequest(rig, { bitmaps: [null, name], brokenRecords: [name] });
  expect(next.disks.map(({ probe }) => probe.records)).toEqual([
    [{ bitmap: name, isInconsistent: true }],
    [{ bitmap: name, isInconsistent: false }],
  ]);
  await using snapshot = await rig.source.snapshot(next);
  const [, second] = await readAll(rig, snapshot);
  expect(second!.dirty!.filter(Boolean)).toHaveLength(1);
  await snapshot.close();
  await snapshot.commit([name]);
  expect((await rig.source.discover(CONTROL)).facts.changeRecords).toEqual([
    { name: bitmapNameFor(next.pointId), pointId: next.pointId, isBroken: false },
  ]);
});
