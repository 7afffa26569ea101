import { mkdtemp, readFile, rm, truncate, writeFile } from 'node:fs/promises';
import os from 'node:os';
import path from 'node:path';
import * as fc from 'fast-check';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { COPY_OP, hashBlock, openCopySession, type CopySessionOptions } from '../../native/lib/index.js';

const CLUSTER = 4096;
let directory: string;

beforeAll(async () => {
  directory = await mkdtemp(path.join(os.tmpdir(), 'holdfast-native-'));
});
afterAll(async () => {
  await rm(directory, { recursive: true, force: true });
});

function options(source: string, target: string, diskBytes: number): CopySessionOptions {
  return {
    source: { kind: 'files', paths: [source] },
    sink: { kind: 'file', path: target, isZeroed: true },
    diskBytes,
    hash: 'xxh3-128',
    clusterBytes: CLUSTER,
    requestBytes: 4 * CLUSTER,
    connectTimeoutMs: 1000,
    stallTimeoutMs: 10_000,
  };
}

/** A disk of clusters that are zero, full of bytes, or zero but for one byte at a place. */
const disks = fc
  .array(
    fc.oneof(
      fc.constant(Buffer.alloc(CLUSTER)),
      fc.integer({ min: 1, max: 255 }).map((byte) => Buffer.alloc(CLUSTER, byte)),
      fc.integer({ min: 0, max: CLUSTER - 1 }).map((at) => {
        const cluster = Buffer.alloc(CLUSTER);
        cluster[at] = 1;
        return cluster;
      }),
    ),
    { minLength: 1, maxLength: 40 },
  )
  .chain((clusters) =>
    fc.integer({ min: 1, max: CLUSTER }).map((tail) => {
      const whole = Buffer.concat(clusters);
      return whole.subarray(0, whole.length - CLUSTER + tail);
    }),
  );

test('any disk arrives byte for byte, and exactly the clusters that hold data are entries', async () => {
  const [source, target] = [path.join(directory, 'source'), path.join(directory, 'target')];
  await fc.assert(
    fc.asyncProperty(disks, async (disk) => {
      await writeFile(source, disk);
      await writeFile(target, '');
      await truncate(target, disk.length);
      await using session = await openCopySession(options(source, target, disk.length));
      const rows = Float64Array.of(0, disk.length, COPY_OP.copy, 0, 0);
      const result = await session.submit({ rows, zeroPolicy: 'skip', emitEntries: true });
      await session.flush();
      expect((await readFile(target)).equals(disk)).toBe(true);
      const expected: Buffer[] = [];
      for (let at = 0; at < disk.length; at += CLUSTER) {
        const cluster = disk.subarray(at, at + CLUSTER);
        if (cluster.every((byte) => byte === 0)) continue;
        const index = Buffer.alloc(8);
        index.writeBigUInt64LE(BigInt(at / CLUSTER));
        expected.push(index, hashBlock('xxh3-128', cluster));
      }
      expect(result.entries.equals(Buffer.concat(expected))).toBe(true);
      expect(result.bytesWritten + result.bytesSkipped).toBe(disk.length);
    }),
    { numRuns: 60 },
  );
});

test('settings that make no sense are refused by name', async () => {
  const good = options('/a', '/b', 1);
  const bad: [Partial<CopySessionOptions>, RegExp][] = [
    [{ clusterBytes: 5000 }, /clusterBytes/],
    [{ requestBytes: 6000 }, /requestBytes/],
    [{ requestsInFlight: 65 }, /requestsInFlight/],
    [{ diskBytes: 0 }, /diskBytes/],
    [{ diskBytes: Number.NaN }, /diskBytes/],
    [{ stallTimeoutMs: Infinity }, /stallTimeoutMs/],
    [{ rateLimitBytesPerSecond: -1 }, /rateLimitBytesPerSecond/],
    [{ source: { kind: 'files', paths: [] } }, /path/],
    [{ source: { kind: 'files', paths: ['/a\0b'] } }, /NUL/],
    [{ source: { kind: 'nbd', uri: 'nbd://h/', connections: 17 } }, /connections/],
  ];
  for (const [change, words] of bad) {
    await expect(openCopySession({ ...good, ...change })).rejects.toThrow(words);
  }
});

test('a session that was aborted before it began does not open', async () => {
  const control = { signal: AbortSignal.abort() };
  await expect(openCopySession(options('/a', '/b', 1), control)).rejects.toMatchObject({ code: 'CANCELLED' });
});
