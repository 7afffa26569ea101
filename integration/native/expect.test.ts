import { readFile } from 'node:fs/promises';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import {
  EXPECT_HASH,
  EXPECT_UNKNOWN,
  EXPECT_ZERO,
  hashBlock,
  type CopySession,
  type HashAlgorithm,
} from '../../native/lib/index.js';
import { makeLabDirectory, type LabDirectory } from '../lab/directory.js';
import {
  CLUSTER,
  copyRow,
  expectRecord,
  hashOf,
  nbd,
  nbdErrorOf,
  openSession,
  readEntries,
  windowOf,
} from './fixtures.js';
import { startPair, type Pair } from './pair.js';

const MIB = 1024 * 1024;
let lab: LabDirectory;

beforeAll(async () => {
  lab = await makeLabDirectory();
});
afterAll(async () => {
  await lab[Symbol.asyncDispose]();
});

describe.each<[HashAlgorithm]>([['xxh3-128'], ['sha-256']])('expected hashes, %s', (hash) => {
  const sizeBytes = 2 * MIB - 777;
  let pair: Pair;
  let records: Buffer[];
  beforeAll(async () => {
    pair = await startPair(lab, sizeBytes, [
      { offset: 0, length: 5 * CLUSTER },
      { offset: sizeBytes - 1000, length: 1000 },
    ]);
    const disk = await readFile(pair.sourcePath);
    records = [];
    for (let at = 0; at < sizeBytes; at += CLUSTER) {
      const cluster = disk.subarray(at, Math.min(at + CLUSTER, sizeBytes));
      const isZero = cluster.every((byte) => byte === 0);
      records.push(
        isZero
          ? expectRecord(EXPECT_ZERO, undefined, hash)
          : expectRecord(EXPECT_HASH, Buffer.from(hashOf(cluster, hash), 'hex'), hash),
      );
    }
  });
  afterAll(async () => {
    await pair[Symbol.asyncDispose]();
  });
  const open = (sink: 'nbd' | 'null'): Promise<CopySession> =>
    openSession({
      source: nbd(pair.source.uri),
      sink: sink === 'nbd' ? nbd(pair.sink.uri) : { kind: 'null' },
      diskBytes: sizeBytes,
      hash,
    });
  /** The records with those at `wrong` replaced by other hashes. */
  const spoilt = (wrong: number[]): Buffer =>
    Buffer.concat(
      records.map((it, index) =>
        wrong.includes(index) ? expectRecord(EXPECT_HASH, hashBlock(hash, Buffer.from([index])), hash) : it,
      ),
    );

  test('verify passes over what is right, and over a zero block that is known by its hash', async () => {
    await using session = await open('null');
    const expectations = [...records];
    expectations[7] = expectRecord(EXPECT_HASH, hashBlock(hash, Buffer.alloc(CLUSTER)), hash);
    expectations[2] = expectRecord(EXPECT_UNKNOWN, undefined, hash);
    const result = await session.submit(
      windowOf([copyRow(0, sizeBytes)], {
        expectPolicy: 'verify',
        expect: Buffer.concat(expectations),
        emitEntries: false,
      }),
    );
    expect(result.mismatches).toHaveLength(0);
    expect(result).toMatchObject({ bytesRead: sizeBytes, bytesWritten: 0, bytesSkipped: sizeBytes });
    expect(result.entries).toHaveLength(0);
  });

  test('verify fails with the offset, and everything after it with the same error', async () => {
    await using session = await open('nbd');
    const bad = session.submit(
      windowOf([copyRow(0, sizeBytes)], { expectPolicy: 'verify', expect: spoilt([3]) }),
    );
    const later = session.submit(windowOf([]));
    const error = await nbdErrorOf(bad);
    expect(error).toMatchObject({ code: 'HASH_MISMATCH', details: { offset: 3 * CLUSTER } });
    expect((await nbdErrorOf(later)).code).toBe('HASH_MISMATCH');
    expect((await nbdErrorOf(session.submit(windowOf([])))).code).toBe('HASH_MISMATCH');
    expect((await nbdErrorOf(session.flush())).code).toBe('HASH_MISMATCH');
    await session.close();
    await using written = await openSession({
      source: nbd(pair.sink.uri),
      sink: { kind: 'null' },
      diskBytes: sizeBytes,
    });
    const clusters = readEntries((await written.submit(windowOf([copyRow(0, sizeBytes)]))).entries);
    expect(clusters.map((it) => it.cluster)).not.toContain(3);
  });

  test('verify with collectMismatches lists all of them', async () => {
    await using session = await open('null');
    const result = await session.submit(
      windowOf([copyRow(0, sizeBytes)], {
        expectPolicy: 'verify',
        expect: spoilt([0, 9, 31]),
        collectMismatches: true,
      }),
    );
    expect([...result.mismatches]).toEqual([0, 9 * CLUSTER, 31 * CLUSTER]);
  });

  test('compare writes what differs, and zeroes as zeroes', async () => {
    await using session = await open('nbd');
    const result = await session.submit(
      windowOf([copyRow(0, sizeBytes)], {
        expectPolicy: 'compare',
        expect: spoilt([1, 9]),
        zeroPolicy: 'write',
      }),
    );
    const disk = await readFile(pair.sourcePath);
    expect(readEntries(result.entries, hash)).toEqual([
      { cluster: 1, isZero: false, hash: hashOf(disk.subarray(CLUSTER, 2 * CLUSTER), hash) },
      { cluster: 9, isZero: true, hash: expect.stringMatching(/^0+$/) as string },
    ]);
    expect(result).toMatchObject({
      bytesWritten: CLUSTER,
      bytesZeroed: CLUSTER,
      bytesSkipped: sizeBytes - 2 * CLUSTER,
    });
  });
});
