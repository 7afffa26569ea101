import { createHash } from 'node:crypto';
import { mkdtemp, open, readFile, rm, truncate, writeFile } from 'node:fs/promises';
import path from 'node:path';
import fc from 'fast-check';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { newId, type LayerId } from '../../src/lib/id.js';
import { EXPECT_HASH, EXPECT_ZERO } from '../../src/nbd/index.js';
import { CLUSTER_BYTES } from '../../src/lib/units.js';
import { ComposedSums, LAYER_ABSENT } from '../../repository/composed-sums.js';
import { SumsFileWriter } from '../../repository/sums.js';
import { SumsReader } from '../../repository/sums-reader.js';

const CLUSTERS = 20_000;
let directory: string;
let counter = 0;
beforeAll(async () => {
  directory = await mkdtemp('/dev/shm/holdfast-sums-');
});
afterAll(async () => {
  await rm(directory, { recursive: true, force: true });
});

interface ModelEntry {
  cluster: number;
  isZero: boolean;
  seed: number;
}

function pack(entries: readonly ModelEntry[]): Buffer {
  const data = Buffer.alloc(entries.length * 24);
  entries.forEach(({ cluster, isZero, seed }, i) => {
    data.writeBigUInt64LE(BigInt(cluster) | (isZero ? 1n << 63n : 0n), i * 24);
    if (!isZero) data.fill(seed, i * 24 + 8, i * 24 + 24);
  });
  return data;
}

async function writeSums(
  entries: readonly ModelEntry[],
  clusters = CLUSTERS,
): Promise<{ file: string; sha256: string; layerId: LayerId }> {
  counter += 1;
  const file = path.join(directory, `${counter}.sums`);
  const layerId = newId<LayerId>();
  const diskBytes = clusters * CLUSTER_BYTES - 100;
  await using writer = await SumsFileWriter.create(file, {
    hash: 'xxh3-128',
    clusterBytes: CLUSTER_BYTES,
    layerId,
    diskBytes,
  });
  for (let i = 0; i < entries.length; i += 1000) await writer.append(pack(entries.slice(i, i + 1000)));
  return { file, sha256: await writer.finish(), layerId };
}

const entryList = fc
  .uniqueArray(
    fc.record({
      cluster: fc.oneof(fc.integer({ min: 0, max: 300 }), fc.integer({ min: 0, max: CLUSTERS - 1 })),
      isZero: fc.boolean(),
      seed: fc.integer({ min: 1, max: 255 }),
    }),
    { selector: (entry) => entry.cluster, maxLength: 400 },
  )
  .map((entries) => entries.sort((a, b) => a.cluster - b.cluster));

describe('a sums file', () => {
  it('gives back what was written, with the digest of the file', async () => {
    await fc.assert(
      fc.asyncProperty(entryList, async (entries) => {
        const { file, sha256, layerId } = await writeSums(entries);
        expect(
          createHash('sha256')
            .update(await readFile(file))
            .digest('hex'),
        ).toBe(sha256);
        await using reader = await SumsReader.open(file);
        expect(reader.header).toMatchObject({ layerId, hash: 'xxh3-128', clusterBytes: CLUSTER_BYTES });
        expect(await reader.digest()).toBe(sha256);
        const seen: ModelEntry[] = [];
        for await (const { clusterIndex, isZero, hash } of reader.entries()) {
          const model = entries[seen.length];
          seen.push({ cluster: clusterIndex, isZero, seed: isZero ? (model?.seed ?? 0) : (hash[0] ?? 0) });
        }
        expect(seen).toEqual(entries);
      }),
      { numRuns: 40 },
    );
  });

  it('finds the next cluster from anywhere, in any order', async () => {
    const entries = Array.from({ length: 9000 }, (_, i) => ({
      cluster: i * 2 + (i > 4000 ? 500 : 0),
      isZero: false,
      seed: 1,
    }));
    const { file } = await writeSums(entries);
    await using reader = await SumsReader.open(file);
    const clusters = entries.map((entry) => entry.cluster);
    for (const from of [0, 1, 17_999, 8002, 8001, 3, 18_498, 18_499, 12_345, 0, 19_999]) {
      expect(await reader.nextCluster(from)).toBe(clusters.find((cluster) => cluster >= from) ?? Infinity);
    }
  });

  it.each<[string, ModelEntry[]]>([
    [
      'twice the same',
      [
        { cluster: 5, isZero: false, seed: 1 },
        { cluster: 5, isZero: true, seed: 1 },
      ],
    ],
    [
      'descending',
      [
        { cluster: 5, isZero: false, seed: 1 },
        { cluster: 4, isZero: false, seed: 1 },
      ],
    ],
    ['beyond the disk', [{ cluster: CLUSTERS, isZero: false, seed: 1 }]],
  ])('refuses to take entries that are %s', async (_name, entries) => {
    await expect(writeSums(entries)).rejects.toMatchObject({ code: 'INVALID_INPUT' });
  });

  it('refuses entries of another size', async () => {
    const file = path.join(directory, 'odd.sums');
    const header = {
      hash: 'xxh3-128' as const,
      clusterBytes: CLUSTER_BYTES,
      layerId: newId<LayerId>(),
      diskBytes: 1e6,
    };
    await using writer = await SumsFileWriter.create(file, header);
    await expect(writer.append(Buffer.alloc(40))).rejects.toMatchObject({ code: 'INVALID_INPUT' });
  });

  it('is missing as LAYER_NOT_FOUND and cut or damaged as LAYER_CORRUPT', async () => {
    const corrupt = { code: 'LAYER_CORRUPT' };
    await expect(SumsReader.open(path.join(directory, 'none.sums'))).rejects.toMatchObject({
      code: 'LAYER_NOT_FOUND',
    });
    const entries = Array.from({ length: 100 }, (_, i) => ({ cluster: i, isZero: false, seed: 7 }));
    const { file } = await writeSums(entries);
    const whole = await readFile(file);
    for (const length of [0, 10, 64, 80, 100, whole.length - 24, whole.length - 1]) {
      await writeFile(file, whole);
      await truncate(file, length);
      await expect(SumsReader.open(file)).rejects.toMatchObject(corrupt);
    }
    for (const offset of [0, 8, 12, 16, 20, 40, 60, whole.length - 16, whole.length - 8]) {
      const damaged = Buffer.from(whole);
      damaged[offset] = 0xee;
      await writeFile(file, damaged);
      await expect(SumsReader.open(file), `byte ${offset}`).rejects.toMatchObject(corrupt);
    }
    const handle = await open(file, 'w');
    const swapped = Buffer.from(whole);
    swapped.writeUInt32LE(50, 64);
    await handle.writeFile(swapped);
    await handle.close();
    await using reader = await SumsReader.open(file);
    await expect(reader.digest()).rejects.toMatchObject(corrupt);
    await expect(reader.nextCluster(10)).rejects.toMatchObject(corrupt);
  });
});

describe('composed sums', () => {
  it('agree with a naive model for any chain and any ascending or random windows', async () => {
    const layersArb = fc.array(entryList, { minLength: 1, maxLength: 5 });
    const windowsArb = fc.array(
      fc.record({
        start: fc.integer({ min: 0, max: CLUSTERS - 1 }),
        count: fc.integer({ min: 1, max: 5000 }),
      }),
      { minLength: 1, maxLength: 8 },
    );
    await fc.assert(
      fc.asyncProperty(layersArb, windowsArb, fc.boolean(), async (layers, windows, isSorted) => {
        const readers: SumsReader[] = [];
        try {
          for (const entries of layers) readers.push(await SumsReader.open((await writeSums(entries)).file));
          const composed = new ComposedSums(readers);
          const ordered = isSorted ? [...windows].sort((a, b) => a.start - b.start) : windows;
          const maps = layers.map((entries) => new Map(entries.map((entry) => [entry.cluster, entry])));
          for (const { start, count } of ordered) {
            const window = await composed.window(start, count);
            for (let i = 0; i < count; i += 1) {
              const layer = maps.findIndex((map) => map.has(start + i));
              const model = maps[layer]?.get(start + i);
              if (window.layers[i] !== (layer === -1 ? LAYER_ABSENT : layer))
                throw new Error(`layer of ${start + i}`);
              if (window.kinds[i] !== (model === undefined || model.isZero ? EXPECT_ZERO : EXPECT_HASH))
                throw new Error(`kind of ${start + i}`);
              const isHashed = model !== undefined && !model.isZero;
              if (isHashed && window.hashes[i * 16] !== model.seed) throw new Error(`hash of ${start + i}`);
            }
            const next = Math.min(
              ...maps.map((map) => Math.min(Infinity, ...[...map.keys()].filter((key) => key >= start))),
            );
            expect(await composed.nextCluster(start)).toBe(next);
          }
        } finally {
          for (const reader of readers) await reader.close();
        }
      }),
      { numRuns: 40 },
    );
  });
});
