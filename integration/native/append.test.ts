import { mkdir, open, readFile, stat, truncate, writeFile } from 'node:fs/promises';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { runTool } from '../../src/lib/process.js';
import { makeLabDirectory, type LabDirectory } from '../lab/directory.js';
import { makeRaw } from '../lab/disk-image.js';
import { startNbdkit, startQemuNbd, type LabNbdServer } from '../lab/nbd-server.js';
import {
  CLUSTER,
  copyRow,
  expectedEntries,
  nbd,
  nbdErrorOf,
  openSession,
  readEntries,
  windowOf,
  zeroRow,
} from './fixtures.js';

const MIB = 1024 * 1024;
const START = 3 * CLUSTER;
let lab: LabDirectory;
let count = 0;

beforeAll(async () => {
  lab = await makeLabDirectory();
});
afterAll(async () => {
  await lab[Symbol.asyncDispose]();
});

const next = (suffix: string): string => lab.file(`a${count++}${suffix}`);

async function makeDisk(sizeBytes: number): Promise<string> {
  const path = next('.raw');
  const regions = [
    { offset: 0, length: 5 * CLUSTER },
    { offset: MIB + 4096, length: 512 },
    { offset: 2 * MIB, length: MIB + CLUSTER },
    { offset: sizeBytes - 100, length: 100 },
  ];
  await makeRaw({ path, sizeBytes, regions });
  return path;
}

const serve = (image: string): Promise<LabNbdServer> =>
  startQemuNbd({ image, format: 'raw', socketPath: next('.sock'), isReadOnly: true });

/** A file whose first bytes are somebody else's. */
async function makeOutput(): Promise<string> {
  const path = next('.out');
  await writeFile(path, Buffer.alloc(START - 5, 0xcc));
  return path;
}

test.each([4 * MIB, 4 * MIB + 512, 5 * MIB + 12_345])(
  'a disk of %d bytes: every cluster lies whole where the result says, one after the other',
  async (sizeBytes) => {
    const disk = await makeDisk(sizeBytes);
    const path = await makeOutput();
    await using source = await serve(disk);
    await using session = await openSession({
      source: nbd(source.uri, 4),
      sink: { kind: 'append', path, startOffset: START },
      diskBytes: sizeBytes,
    });
    const { entries, places, ...counts } = await session.submit(windowOf([copyRow(0, sizeBytes)]));
    const end = session.reserve(0);
    await session.flush();
    await session.close();

    const original = await readFile(disk);
    const list = readEntries(entries);
    expect(list).toEqual(expectedEntries(original));
    expect(places).toHaveLength(list.length);
    expect([...places].sort((a, b) => a - b)).toEqual(list.map((_, index) => START + index * CLUSTER));
    expect(end).toBe(START + list.length * CLUSTER);
    expect(counts.bytesWritten).toBe(
      list.reduce((sum, { cluster }) => sum + Math.min(CLUSTER, sizeBytes - cluster * CLUSTER), 0),
    );

    await truncate(path, end);
    const written = await readFile(path);
    expect(written.subarray(0, START - 5).every((byte) => byte === 0xcc)).toBe(true);
    for (const [index, { cluster }] of list.entries()) {
      const place = places[index] ?? 0;
      const wanted = Buffer.alloc(CLUSTER);
      original.copy(wanted, 0, cluster * CLUSTER);
      expect(written.subarray(place, place + CLUSTER).equals(wanted)).toBe(true);
    }
  },
);

test('zeroes take no place, whether they were read or only asked for', async () => {
  const sizeBytes = 4 * MIB;
  const disk = await makeDisk(sizeBytes);
  const path = await makeOutput();
  await using source = await serve(disk);
  await using session = await openSession({
    source: nbd(source.uri),
    sink: { kind: 'append', path, startOffset: START },
    diskBytes: sizeBytes,
  });
  const rows = [copyRow(0, MIB), zeroRow(2 * MIB, MIB)];
  const { entries, places, bytesZeroed } = await session.submit(windowOf(rows, { zeroPolicy: 'write' }));
  const list = readEntries(entries);
  expect(list).toHaveLength(32);
  expect(list.map(({ isZero }, index) => isZero === (places[index] === 0))).not.toContain(false);
  expect(list.filter(({ isZero }) => !isZero).map(({ cluster }) => cluster)).toEqual([0, 1, 2, 3, 4]);
  expect(bytesZeroed).toBe(27 * CLUSTER);
  expect(session.reserve(0)).toBe(START + 5 * CLUSTER);
});

test('what is reserved meanwhile belongs to nobody else', async () => {
  const sizeBytes = 64 * MIB;
  const disk = next('.raw');
  await makeRaw({ path: disk, sizeBytes, regions: [{ offset: 0, length: sizeBytes }] });
  const path = await makeOutput();
  await using source = await serve(disk);
  await using session = await openSession({
    source: nbd(source.uri, 4),
    sink: { kind: 'append', path, startOffset: START },
    diskBytes: sizeBytes,
  });
  const reserved: number[] = [];
  const windows = Array.from({ length: 4 }, async (_, index) => {
    const { places } = await session.submit(windowOf([copyRow(index * 16 * MIB, 16 * MIB)]));
    reserved.push(session.reserve(CLUSTER + 1));
    return [...places];
  });
  const taken = [...(await Promise.all(windows)).flat(), ...reserved.flatMap((it) => [it, it + CLUSTER])];
  expect(new Set(taken).size).toBe(sizeBytes / CLUSTER + 8);
  expect(session.reserve(0)).toBe(START + taken.length * CLUSTER);
});

test('equal clusters of a compare take no place', async () => {
  const sizeBytes = 4 * MIB;
  const disk = await makeDisk(sizeBytes);
  const path = await makeOutput();
  await using source = await serve(disk);
  await using session = await openSession({
    source: nbd(source.uri),
    sink: { kind: 'append', path, startOffset: START },
    diskBytes: sizeBytes,
  });
  const clusters = sizeBytes / CLUSTER;
  const known = Buffer.alloc(clusters * 17);
  for (const { cluster, hash } of expectedEntries(await readFile(disk))) {
    Buffer.from([1]).copy(known, cluster * 17);
    Buffer.from(hash, 'hex').copy(known, cluster * 17 + 1);
  }
  for (let index = 0; index < clusters; index++) if (known[index * 17] === 0) known[index * 17] = 2;
  known[3 * 17 + 1] = (known[3 * 17 + 1] ?? 0) ^ 1;
  const window = windowOf([copyRow(0, sizeBytes)], {
    zeroPolicy: 'write',
    expectPolicy: 'compare',
    expect: known,
  });
  const { entries, places } = await session.submit(window);
  expect(readEntries(entries).map(({ cluster }) => cluster)).toEqual([3]);
  expect([...places]).toEqual([START]);
});

test('a full file system ends the copy with ENOSPC, recognisably', async () => {
  const mountPoint = next('.mount');
  await mkdir(mountPoint);
  await runTool('mount', ['-t', 'tmpfs', '-o', 'size=2m', 'tmpfs', mountPoint], { timeoutMs: 10_000 });
  try {
    const path = `${mountPoint}/out`;
    await (await open(path, 'wx')).close();
    const disk = next('.raw');
    await makeRaw({ path: disk, sizeBytes: 8 * MIB, regions: [{ offset: 0, length: 8 * MIB }] });
    await using source = await serve(disk);
    await using session = await openSession({
      source: nbd(source.uri),
      sink: { kind: 'append', path, startOffset: 0 },
      diskBytes: 8 * MIB,
    });
    const error = await nbdErrorOf(session.submit(windowOf([copyRow(0, 8 * MIB)])));
    expect(error).toMatchObject({ code: 'FILE_IO', op: 'pwrite', errno: 28 });
    expect((await nbdErrorOf(session.flush())).code).toBe('FILE_IO');
    expect((await stat(path)).size).toBeLessThanOrEqual(2 * MIB);
  } finally {
    await runTool('umount', [mountPoint], { timeoutMs: 10_000 });
  }
});

test('a cancel ends it beside a source that says nothing any more', async () => {
  const path = await makeOutput();
  await using source = await startNbdkit({
    socketPath: next('.sock'),
    plugin: ['memory', '8M'],
    filters: ['delay'],
    parameters: ['rdelay=30'],
  });
  const control = new AbortController();
  await using session = await openSession(
    {
      source: nbd(source.uri),
      sink: { kind: 'append', path, startOffset: START },
      diskBytes: 8 * MIB,
    },
    control,
  );
  const copy = nbdErrorOf(session.submit(windowOf([copyRow(0, 8 * MIB)])));
  control.abort();
  expect((await copy).code).toBe('CANCELLED');
});

test('what makes no sense is refused by name', async () => {
  const disk = await makeDisk(4 * MIB);
  const path = await makeOutput();
  await using source = await serve(disk);
  const options = { source: nbd(source.uri), diskBytes: 4 * MIB };
  const openAt = (startOffset: number) =>
    openSession({ ...options, sink: { kind: 'append', path, startOffset } });
  await expect(openAt(CLUSTER + 1)).rejects.toThrow('startOffset must be a multiple');
  await expect(openAt(-CLUSTER)).rejects.toThrow(RangeError);
  await using session = await openAt(START);
  const silent = session.submit(windowOf([copyRow(0, CLUSTER)], { emitEntries: false }));
  await expect(silent).rejects.toThrow('an append sink needs a window with entries');
  expect(() => session.reserve(-1)).toThrow(RangeError);
  await using other = await openSession({ ...options, sink: { kind: 'null' } });
  expect(() => other.reserve(0)).toThrow(TypeError);
  expect((await other.submit(windowOf([copyRow(0, CLUSTER)]))).places).toHaveLength(0);
  const missing = openSession({ ...options, sink: { kind: 'append', path: next('.none'), startOffset: 0 } });
  expect(await nbdErrorOf(missing)).toMatchObject({ code: 'FILE_IO', op: 'openSink', errno: 2 });
});
