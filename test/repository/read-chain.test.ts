import { copyFile, open, readFile, truncate, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { CLUSTER_BYTES } from '../../src/lib/units.js';
import { openChainReader } from '../../repository/chain-reader.js';
import { openComposedSums } from '../../repository/composed-sums.js';
import {
  copyChain,
  mergeZeroRows,
  type ChainCopyOptions,
  type ChainCopyResult,
} from '../../repository/read-chain.js';
import type { PointManifest } from '../../repository/types.js';
import { RepositoryLab, expectedDisk, hashOfFill, type Fill, type Fills } from './repository-lab.js';

let lab: RepositoryLab;
beforeEach(async () => {
  lab = await RepositoryLab.create();
});
afterEach(async () => {
  await lab[Symbol.asyncDispose]();
});

const LIMITS = { connectTimeoutMs: 5000, stallTimeoutMs: 10_000 };

async function restore(
  point: PointManifest,
  change: Partial<ChainCopyOptions> = {},
): Promise<{ result: ChainCopyResult; disk: Buffer }> {
  const file = path.join(lab.directory, 'restored.raw');
  const sizeBytes = point.disks[0]?.sizeBytes ?? 0;
  await writeFile(file, change.isZeroed === false ? Buffer.alloc(sizeBytes, 0xee) : '');
  await truncate(file, sizeBytes);
  const result = await copyChain({
    chain: await lab.repository.openChain(point, lab.diskId),
    sink: { kind: 'file', path: file, isZeroed: change.isZeroed ?? true },
    isZeroed: true,
    hash: 'sha-256',
    acceptDamage: false,
    limits: LIMITS,
    ...change,
  });
  return { result, disk: await readFile(file) };
}

/** Overwrites bytes of a layer's first data cluster in place, as bit rot would. */
async function damage(point: PointManifest, cluster: number): Promise<string> {
  const chain = await lab.repository.openChain(point, lab.diskId);
  await using reader = await openChainReader({ ...chain, layers: chain.layers.slice(0, 1) });
  const { rows } = await reader.window(cluster, 1);
  const file = await open(chain.layers[0]?.path ?? '', 'r+');
  await file.write(Buffer.from('rotten'), 0, 6, (rows[4] ?? 0) + 1000);
  await file.close();
  return chain.layers[0]?.layerId ?? '';
}

/** Deterministic pseudo-random numbers (mulberry32), so that a failing seed can be run again. */
function randomFrom(seed: number): () => number {
  let state = seed;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

describe('copyChain', () => {
  it.each([1, 2, 3, 4, 5])(
    'restores every point of a random chain that grows, byte for byte (seed %i)',
    async (seed) => {
      const random = randomFrom(seed);
      let sizeBytes = (3 + Math.floor(random() * 8)) * CLUSTER_BYTES + Math.floor(random() * CLUSTER_BYTES);
      const layers: { fills: Fills; sizeBytes: number }[] = [];
      for (let depth = 0; depth < 5; depth += 1) {
        const clusters = Math.ceil(sizeBytes / CLUSTER_BYTES);
        const fills = new Map<number, Fill>();
        for (let cluster = 0; cluster < clusters; cluster += 1) {
          const dice = random();
          if (dice < 0.3) fills.set(cluster, 1 + Math.floor(random() * 255));
          else if (dice < 0.4 && depth > 0) fills.set(cluster, 'zero');
        }
        layers.push({ fills, sizeBytes });
        const point = await lab.commit(fills, { sizeBytes });
        const { disk, result } = await restore(point);
        expect(disk.equals(expectedDisk(layers))).toBe(true);
        expect(result.damagedBytes).toBe(0);
        const overwritten = await restore(point, { isZeroed: false });
        expect(overwritten.disk.equals(expectedDisk(layers))).toBe(true);
        sizeBytes += Math.floor(random() * 3 * CLUSTER_BYTES);
      }
      const report = await lab.repository.check({ content: true });
      expect(report.findings).toEqual([]);
      expect(report).toMatchObject({ vms: 1, points: 5, layers: 5 });
    },
  );

  it('finds damage: LAYER_CORRUPT with disk, layer and offset, and goes on only when told', async () => {
    const fills: Fills = new Map([
      [0, 1],
      [3, 2],
      [4, 3],
    ]);
    const point = await lab.commit(fills);
    const layerId = await damage(point, 3);
    await expect(restore(point)).rejects.toMatchObject({
      code: 'LAYER_CORRUPT',
      details: { diskId: lab.diskId, layerId, pointId: point.pointId, offset: 3 * CLUSTER_BYTES },
    });
    const { result, disk } = await restore(point, { acceptDamage: true });
    expect(result.damagedBytes).toBe(CLUSTER_BYTES);
    expect(result.damagedRanges).toEqual([[3 * CLUSTER_BYTES, CLUSTER_BYTES]]);
    const good = expectedDisk([{ fills, sizeBytes: lab.sizeBytes }]);
    expect(disk.subarray(4 * CLUSTER_BYTES).equals(good.subarray(4 * CLUSTER_BYTES))).toBe(true);
  });

  it('does not mind damage that a later layer hides', async () => {
    const first = await lab.commit(
      new Map([
        [0, 1],
        [3, 2],
      ]),
    );
    const second = await lab.commit(new Map([[3, 9]]));
    await damage(first, 3);
    const { disk } = await restore(second);
    expect(disk[3 * CLUSTER_BYTES]).toBe(9);
    await expect(restore(first)).rejects.toMatchObject({ code: 'LAYER_CORRUPT' });
  });

  it('finds damage in the last cluster of a smaller parent', async () => {
    const sizeBytes = 2 * CLUSTER_BYTES + 5000;
    const first = await lab.commit(new Map([[2, 7]]), { sizeBytes });
    const second = await lab.commit(new Map([[0, 1]]), { sizeBytes: 5 * CLUSTER_BYTES });
    expect((await restore(second)).disk[2 * CLUSTER_BYTES + 4999]).toBe(7);
    await damage(first, 2);
    await expect(restore(second)).rejects.toMatchObject({
      code: 'LAYER_CORRUPT',
      details: { offset: 2 * CLUSTER_BYTES, pointId: first.pointId },
    });
  });

  it('refuses sums that were changed, though they fit the layer', async () => {
    const point = await lab.commit(new Map([[0, 1]]));
    const chain = await lab.repository.openChain(point, lab.diskId);
    const file = chain.layers[0]?.sumsPath ?? '';
    const data = await readFile(file);
    data[80] = (data[80] ?? 0) ^ 1;
    await copyFile(file, `${file}.old`);
    const handle = await open(file, 'r+');
    await handle.write(data);
    await handle.close();
    await expect(restore(point)).rejects.toMatchObject({ code: 'LAYER_CORRUPT' });
  });

  it('ends with the reason of the signal', async () => {
    const point = await lab.commit(new Map([[0, 1]]));
    await expect(restore(point, { signal: AbortSignal.abort() })).rejects.toMatchObject({
      code: 'CANCELLED',
    });
  });
});

describe('openComposedSums', () => {
  it('tells what every cluster holds, for a compare', async () => {
    await lab.commit(
      new Map([
        [0, 1],
        [1, 2],
        [2, 3],
      ]),
    );
    const point = await lab.commit(
      new Map<number, Fill>([
        [1, 'zero'],
        [2, 8],
      ]),
    );
    await using known = await openComposedSums(await lab.repository.openChain(point, lab.diskId));
    const { kinds, hashes } = await known.window(0, 4);
    expect([...kinds]).toEqual([1, 2, 1, 2]);
    expect(hashes.subarray(0, 32).equals(hashOfFill(0, 1, lab.sizeBytes))).toBe(true);
    expect(hashes.subarray(64, 96).equals(hashOfFill(2, 8, lab.sizeBytes))).toBe(true);
  });
});

describe('mergeZeroRows', () => {
  it('keeps rows and zeroes in ascending order', () => {
    const rows = Float64Array.of(10, 5, 0, 1, 100, 30, 5, 0, 0, 200);
    const merged = mergeZeroRows(rows, Float64Array.of(0, 10, 15, 15, 35, 5));
    expect([0, 5, 10, 15, 20].map((at) => [merged[at], merged[at + 1], merged[at + 2]])).toEqual([
      [0, 10, 1],
      [10, 5, 0],
      [15, 15, 1],
      [30, 5, 0],
      [35, 5, 1],
    ]);
  });
});
