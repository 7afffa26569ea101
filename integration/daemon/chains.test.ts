import { rm } from 'node:fs/promises';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { BackupView, ChainView, RunView } from '../../src/engine/types.js';
import { KIB, MIB } from '../../src/lib/units.js';
import { makeLabDirectory, type LabDirectory } from '../lab/directory.js';
import {
  expectCleanImage,
  exportRaw,
  firstDifference,
  makeQcow2,
  makeRaw,
  qemuIo,
  SeededRandom,
  writeRegions,
} from '../lab/disk-image.js';
import { findLeftovers } from '../lab/leftovers.js';
import { startStorageDaemon, type LabStorageDaemon } from '../lab/storage-daemon.js';
import { backUp, restoreRaw, setUp, startDaemon, type Daemon, type Setup } from './daemon.js';

const SEEDS = Array.from({ length: 20 }, (_seed, index) => 1000 + index * 37);
const INCREMENTALS = 5;

/** A mixed load as a guest's file system makes it: overwrites, zeroes, discards, many of them small. */
function workload(random: SeededRandom, diskBytes: number): string[] {
  return Array.from({ length: 25 }, () => {
    const sectors = random.between(0, diskBytes / 512);
    const offset = sectors * 512;
    const sectorsLong = 1 + random.between(0, random.between(0, 4) === 0 ? 2000 : 40);
    const length = Math.min(512 * sectorsLong, diskBytes - offset);
    switch (random.between(0, 5)) {
      case 0:
        return `write -z ${offset} ${length}`;
      case 1:
        return `write -z -u ${offset} ${length}`;
      case 2:
        return `discard ${offset} ${length}`;
      default:
        return `write -P ${1 + random.between(0, 255)} ${offset} ${length}`;
    }
  });
}

async function chainPath(daemon: Daemon, pointId: string): Promise<string> {
  const { items } = await daemon.expect<{ items: ChainView[] }>(200, 'GET', `/backups/${pointId}/chain`);
  return items[0]?.layers[0]?.path ?? '';
}

describe('a disk under random writes, zeroes and discards', () => {
  let lab: LabDirectory;
  let daemon: Daemon;

  beforeAll(async () => {
    lab = await makeLabDirectory();
    daemon = await startDaemon({ directory: lab.file('daemon') });
  });

  afterAll(async () => {
    await daemon.stop();
    expect(await findLeftovers(lab.file('daemon'))).toEqual([]);
    await lab[Symbol.asyncDispose]();
  });

  /** Every point is restored, and read by stock qemu, and both equal what the source was then. */
  async function checkPoints(points: { pointId: string; truth: string }[]): Promise<void> {
    for (const { pointId, truth } of points) {
      const restored = await restoreRaw(daemon, pointId, lab.file('restored'));
      expect(await firstDifference(restored['vda'] ?? '', truth), `restore of ${pointId}`).toBeNull();
      const layer = await chainPath(daemon, pointId);
      await expectCleanImage(layer);
      const converted = lab.file(`${pointId}.raw`);
      await exportRaw(layer, 'qcow2', converted);
      expect(await firstDifference(converted, truth), `qemu-img convert of ${pointId}`).toBeNull();
      await rm(converted);
      await rm(restored['vda'] ?? '');
      await rm(truth);
    }
  }

  async function runSeed(seed: number, mode: 'bitmap' | 'compare', diskBytes: number): Promise<void> {
    const random = new SeededRandom(seed);
    const name = `${mode}-${seed}`;
    const image = lab.file(`${name}.qcow2`);
    await makeQcow2({ path: image, sizeBytes: diskBytes, regions: [{ offset: 0, length: 2 * MIB }] });
    await using source: LabStorageDaemon = await startStorageDaemon({
      image,
      socketPath: lab.file(`${name}.sock`),
    });
    const setup: Setup = await setUp(daemon, {
      root: lab.file(`repository-${name}`),
      vmName: name,
      disks: [{ name: 'vda', source: { kind: 'nbd', uri: source.uri, changeTracking: 'auto' } }],
    });
    const points: { pointId: string; truth: string }[] = [];
    for (let step = 0; step <= INCREMENTALS; step += 1) {
      await qemuIo({ path: source.uri, format: 'raw', commands: workload(random, diskBytes) });
      const run: RunView = await backUp(daemon, setup);
      const pointId = run.pointId ?? '';
      const expected = step === 0 ? 'full' : mode;
      expect(run.progress.disks.map(({ method }) => method)).toEqual([expected]);
      const truth = lab.file(`${name}-${step}.truth`);
      await exportRaw(source.uri, 'raw', truth);
      points.push({ pointId, truth });
      if (mode === 'bitmap') await source.addBitmap(`holdfast-${pointId}`);
    }
    await checkPoints(points);
    await rm(image);
  }

  it.each(SEEDS)(
    'reads back each point of a full and 5 incrementals from a bitmap: seed %i',
    async (seed) => {
      await runSeed(seed, 'bitmap', 24 * MIB + 512 * (seed % 127));
    },
    90_000,
  );

  it.each(SEEDS.slice(0, 4))(
    'reads back each point of a full and 5 compared ones: seed %i',
    async (seed) => {
      await runSeed(seed, 'compare', 16 * MIB + 512 * (seed % 127));
    },
    90_000,
  );

  it('reads back a disk with 4 KiB islands of data in 32 MiB of zeroes', async () => {
    const truth = lab.file('islands.raw');
    const regions = Array.from({ length: 200 }, (_island, index) => ({
      offset: index * 160 * KIB + (index % 16) * 4 * KIB,
      length: 4 * KIB,
      seed: index,
    }));
    await makeRaw({ path: truth, sizeBytes: 32 * MIB, regions });

    const setup = await setUp(daemon, {
      root: lab.file('repository-islands'),
      vmName: 'islands',
      disks: [{ name: 'vda', source: { kind: 'image', path: truth, format: 'raw', changeTracking: 'auto' } }],
    });
    const run = await backUp(daemon, setup);
    const restored = await restoreRaw(daemon, run.pointId ?? '', lab.file('restored'));
    expect(await firstDifference(restored['vda'] ?? '', truth)).toBeNull();
    const point = await daemon.expect<BackupView>(200, 'GET', `/backups/${run.pointId ?? ''}`);
    expect(point.layers[0]?.bytesWritten).toBeLessThanOrEqual(2 * 200 * 64 * KIB);
  });

  it('keeps the exact size of a raw disk that is no multiple of a sector, and what its last bytes are', async () => {
    const truth = lab.file('odd.raw');
    const sizeBytes = 3 * MIB + 12_345;
    await makeRaw({ path: truth, sizeBytes, regions: [{ offset: 3 * MIB, length: 12_345 }] });
    const setup = await setUp(daemon, {
      root: lab.file('repository-odd'),
      vmName: 'odd',
      disks: [{ name: 'vda', source: { kind: 'image', path: truth, format: 'raw', changeTracking: 'auto' } }],
    });
    expect(setup.vm.disks[0]?.sizeBytes).toBe(sizeBytes);
    const first = await backUp(daemon, setup);
    await writeRegions(truth, [{ offset: 3 * MIB + 12_000, length: 345, seed: 9 }]);
    const second = await backUp(daemon, setup);
    const restored = await restoreRaw(daemon, second.pointId ?? '', lab.file('restored'));
    expect(await firstDifference(restored['vda'] ?? '', truth)).toBeNull();
    const before = await restoreRaw(daemon, first.pointId ?? '', lab.file('restored'));
    expect(await firstDifference(before['vda'] ?? '', truth)).toEqual({
      kind: 'byte',
      offset: 3 * MIB + 12_000,
    });
  });

  it('ends a run without any change as a success that stores nothing', async () => {
    const truth = lab.file('same.raw');
    await makeRaw({ path: truth, sizeBytes: 4 * MIB, regions: [{ offset: MIB, length: MIB }] });
    const setup = await setUp(daemon, {
      root: lab.file('repository-same'),
      vmName: 'same',
      disks: [{ name: 'vda', source: { kind: 'image', path: truth, format: 'raw', changeTracking: 'auto' } }],
    });
    await backUp(daemon, setup);
    const second = await backUp(daemon, setup);
    expect(second.progress.disks[0]).toMatchObject({ method: 'compare', bytesWritten: 0, bytesZeroed: 0 });
    const restored = await restoreRaw(daemon, second.pointId ?? '', lab.file('restored'));
    expect(await firstDifference(restored['vda'] ?? '', truth)).toBeNull();
  });
});
