import { readFile, writeFile } from 'node:fs/promises';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import type { HashAlgorithm } from '../../native/lib/index.js';
import { pollUntil } from '../../src/lib/deadline.js';
import { expectCleanImage, exportRaw, firstDifference, seededBytes } from '../lab/disk-image.js';
import { makeLabDirectory, type LabDirectory } from '../lab/directory.js';
import {
  CLUSTER,
  connectTo,
  copyRow,
  elapsedMs,
  expectedEntries,
  nbd,
  nbdErrorOf,
  openSession,
  readEntries,
  windowOf,
  zeroRow,
} from './fixtures.js';
import { startPair, type Pair } from './pair.js';

const MIB = 1024 * 1024;
const REGIONS = [
  { offset: 0, length: CLUSTER },
  { offset: 3 * CLUSTER + 4096, length: 4096 },
  { offset: MIB, length: 5 * MIB },
  { offset: 12 * MIB - 4096, length: 8192 },
];
let lab: LabDirectory;

beforeAll(async () => {
  lab = await makeLabDirectory();
});
afterAll(async () => {
  await lab[Symbol.asyncDispose]();
});

async function expectSame(pair: Pair, sizeBytes: number): Promise<void> {
  await pair.sink.stop();
  await expectCleanImage(pair.sinkPath);
  const raw = `${pair.sinkPath}.raw`;
  await exportRaw(pair.sinkPath, 'qcow2', raw);
  const whole = await readFile(raw);
  await writeFile(raw, whole.subarray(0, sizeBytes));
  expect(whole.subarray(sizeBytes).every((byte) => byte === 0)).toBe(true);
  expect(await firstDifference(pair.sourcePath, raw)).toBeNull();
}

describe.each<[HashAlgorithm]>([['xxh3-128'], ['sha-256']])('a full copy with %s', (hash) => {
  test.each([
    ['whole clusters', 16 * MIB],
    ['an odd size', 16 * MIB - 3 * CLUSTER - 12_345],
    ['a size of sectors', 12 * MIB + 512],
    ['less than one sector', 300],
  ])('%s: the sink equals the source and every cluster has its hash', async (_what, sizeBytes) => {
    const fitting = REGIONS.filter((it) => it.offset + it.length <= sizeBytes);
    const regions = [
      ...fitting,
      { offset: sizeBytes - Math.min(sizeBytes, 200), length: Math.min(sizeBytes, 200) },
    ];
    await using pair = await startPair(lab, sizeBytes, regions);
    await using session = await openSession({
      source: nbd(pair.source.uri),
      sink: nbd(pair.sink.uri),
      diskBytes: sizeBytes,
      hash,
    });
    const result = await session.submit(windowOf([copyRow(0, sizeBytes)]));
    await session.flush();
    const disk = await readFile(pair.sourcePath);
    expect(readEntries(result.entries, hash)).toEqual(expectedEntries(disk, hash));
    expect(result.bytesRead).toBe(sizeBytes);
    expect(result.bytesWritten + result.bytesSkipped).toBe(sizeBytes);
    expect(session.progress()).toMatchObject({
      bytesRead: result.bytesRead,
      bytesWritten: result.bytesWritten,
      bytesSkipped: result.bytesSkipped,
      bytesZeroed: 0,
      requestsInFlight: 0,
    });
    await session.close();
    await expectSame(pair, sizeBytes);
  });
});

test('islands of 4 KiB in zeroes cost one cluster each', async () => {
  const sizeBytes = 64 * MIB;
  const islands = [1, 33, 63].map((at) => ({ offset: at * MIB - 4096, length: 4096 }));
  await using pair = await startPair(lab, sizeBytes, islands);
  await using session = await openSession({
    source: nbd(pair.source.uri),
    sink: nbd(pair.sink.uri),
    diskBytes: sizeBytes,
  });
  const result = await session.submit(windowOf([copyRow(0, sizeBytes)]));
  await session.flush();
  expect(result.bytesWritten).toBe(3 * CLUSTER);
  expect(readEntries(result.entries).map((it) => it.cluster)).toEqual(
    [1, 33, 63].map((at) => (at * MIB) / CLUSTER - 1),
  );
  await session.close();
  await expectSame(pair, sizeBytes);
});

test('windows submitted together settle in order, with rows that touch, and block status in between', async () => {
  const sizeBytes = 16 * MIB;
  await using pair = await startPair(lab, sizeBytes, REGIONS);
  await using session = await openSession({
    source: { ...nbd(pair.source.uri, 4), metaContexts: ['base:allocation'] },
    sink: nbd(pair.sink.uri, 4),
    diskBytes: sizeBytes,
    requestBytes: 128 * 1024,
  });
  const settled: number[] = [];
  const windows = Array.from({ length: 16 }, (_, index) =>
    session
      .submit(windowOf([copyRow(index * MIB, MIB / 2), copyRow(index * MIB + MIB / 2, MIB / 2)]))
      .then((result) => {
        settled.push(index);
        return result;
      }),
  );
  const status = await session.blockStatus(0, sizeBytes);
  expect(status['base:allocation']?.length).toBeGreaterThan(2);
  const results = await Promise.all(windows);
  expect(settled).toEqual(windows.map((_, index) => index));
  expect(results.flatMap((it) => readEntries(it.entries))).toEqual(
    expectedEntries(await readFile(pair.sourcePath)),
  );
  const both = await pollUntil(
    () => {
      const { sourceConnections, sinkConnections } = session.progress();
      return sourceConnections === 4 && sinkConnections === 4 ? true : undefined;
    },
    { timeoutMs: 5000, what: 'four connections on each side' },
  );
  expect(both).toBe(true);
  await session.flush();
  await session.close();
  await expectSame(pair, sizeBytes);
});

describe('zero policies', () => {
  test('write: zero clusters and zero rows hide what was there, and are entries with the zero bit', async () => {
    const sizeBytes = 4 * MIB;
    await using pair = await startPair(lab, sizeBytes, [{ offset: 0, length: CLUSTER }]);
    await writeOld(pair.sink.uri, sizeBytes);
    await using session = await openSession({
      source: nbd(pair.source.uri),
      sink: nbd(pair.sink.uri),
      diskBytes: sizeBytes,
    });
    const result = await session.submit(
      windowOf([copyRow(0, MIB), zeroRow(MIB, MIB), copyRow(2 * MIB, 2 * MIB)], { zeroPolicy: 'write' }),
    );
    await session.flush();
    const entries = readEntries(result.entries);
    expect(entries.map((it) => it.cluster)).toEqual(Array.from({ length: 64 }, (_, index) => index));
    expect(entries[0]?.isZero).toBe(false);
    expect(entries.slice(1).every((it) => it.isZero && /^0+$/.test(it.hash))).toBe(true);
    expect(result).toMatchObject({
      bytesRead: 3 * MIB,
      bytesWritten: CLUSTER,
      bytesZeroed: 4 * MIB - CLUSTER,
      bytesSkipped: 0,
    });
    await session.close();
    await expectSame(pair, sizeBytes);
  });

  test('skip: what was there stays', async () => {
    const sizeBytes = MIB;
    await using pair = await startPair(lab, sizeBytes, []);
    await writeOld(pair.sink.uri, sizeBytes);
    await using session = await openSession({
      source: nbd(pair.source.uri),
      sink: nbd(pair.sink.uri),
      diskBytes: sizeBytes,
    });
    const result = await session.submit(windowOf([copyRow(0, sizeBytes)]));
    expect(result).toMatchObject({ bytesWritten: 0, bytesZeroed: 0, bytesSkipped: MIB });
    expect(result.entries).toHaveLength(0);
    await session.close();
    await using check = await openSession({
      source: nbd(pair.sink.uri),
      sink: { kind: 'null' },
      diskBytes: sizeBytes,
    });
    expect(readEntries((await check.submit(windowOf([copyRow(0, sizeBytes)]))).entries)).toHaveLength(16);
  });
});

/** Fills an export with bytes, as a parent layer would. */
async function writeOld(uri: string, sizeBytes: number): Promise<void> {
  await using handle = await connectTo(uri);
  await handle.pwrite(0, seededBytes(9, sizeBytes));
  await handle.flush();
}

test('a plan that cannot be executed is refused with the row', async () => {
  await using pair = await startPair(lab, MIB, []);
  await using session = await openSession({
    source: nbd(pair.source.uri),
    sink: { kind: 'null' },
    diskBytes: MIB,
  });
  const bad = [
    [copyRow(1, CLUSTER)],
    [copyRow(0, 100)],
    [copyRow(0, 0)],
    [copyRow(0, 2 * MIB)],
    [copyRow(CLUSTER, CLUSTER), copyRow(0, CLUSTER)],
    [copyRow(0, 2 * CLUSTER), copyRow(CLUSTER, CLUSTER)],
    [[0, CLUSTER, 2, 0, 0]],
    [[0, Number.NaN, 0, 0, 0]],
    [[-CLUSTER, CLUSTER, 0, 0, 0]],
    [[0, CLUSTER, 0, 0]],
  ];
  for (const rows of bad) await expect(session.submit(windowOf(rows))).rejects.toThrow(RangeError);
  await expect(
    session.submit(windowOf([copyRow(0, CLUSTER)], { expectPolicy: 'verify', expect: Buffer.alloc(5) })),
  ).rejects.toThrow(/expect/);
  expect((await session.submit(windowOf([copyRow(0, MIB)]))).bytesRead).toBe(MIB);
});

test('the rate limit holds, and lifting it takes effect while running', async () => {
  const sizeBytes = 16 * MIB;
  await using pair = await startPair(lab, sizeBytes, REGIONS);
  await using session = await openSession({
    source: nbd(pair.source.uri),
    sink: { kind: 'null' },
    diskBytes: sizeBytes,
    rateLimitBytesPerSecond: 8 * MIB,
  });
  const limited = await elapsedMs(() => session.submit(windowOf([copyRow(0, 8 * MIB)])));
  expect(limited).toBeGreaterThan(600);
  expect(limited).toBeLessThan(2500);
  session.setRateLimit(1);
  const slow = session.submit(windowOf([copyRow(8 * MIB, 8 * MIB)]));
  session.setRateLimit(0);
  expect(await elapsedMs(() => slow)).toBeLessThan(1500);
});

test('a sink that is too small or read-only and a source that is too small are refused with words', async () => {
  await using pair = await startPair(lab, MIB, []);
  const small = await nbdErrorOf(
    openSession({ source: nbd(pair.source.uri), sink: nbd(pair.sink.uri), diskBytes: 2 * MIB }),
  );
  expect(small).toMatchObject({ code: 'NBD_REQUEST' });
  expect(small.message).toContain('source');
  const readOnly = await nbdErrorOf(
    openSession({ source: nbd(pair.sink.uri), sink: nbd(pair.source.uri), diskBytes: MIB }),
  );
  expect(readOnly.message).toContain('read-only');
});
