import { open, readFile, stat } from 'node:fs/promises';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { runTool } from '../../src/lib/process.js';
import { firstDifference, makeQcow2, makeRaw, qemuImg } from '../lab/disk-image.js';
import { makeLabDirectory, type LabDirectory } from '../lab/directory.js';
import { startNbdkit, startQemuNbd, type LabNbdServer } from '../lab/nbd-server.js';
import {
  CLUSTER,
  connectTo,
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
let lab: LabDirectory;
let count = 0;

beforeAll(async () => {
  lab = await makeLabDirectory();
});
afterAll(async () => {
  await lab[Symbol.asyncDispose]();
});

const next = (suffix: string): string => lab.file(`e${count++}${suffix}`);

async function makeDisk(sizeBytes: number): Promise<string> {
  const path = next('.raw');
  await makeRaw({
    path,
    sizeBytes,
    regions: [
      { offset: 0, length: 3 * CLUSTER },
      { offset: MIB + 4096, length: 512 },
      { offset: sizeBytes - 512, length: 512 },
    ],
  });
  return path;
}

/** An nbdkit over a raw file with filters. */
async function serve(path: string, filters: string[], parameters: string[] = []): Promise<LabNbdServer> {
  return startNbdkit({ socketPath: next('.sock'), plugin: ['file', path], filters, parameters });
}

describe('servers with manners of their own', () => {
  const sizeBytes = 4 * MIB;

  test.each([
    ['plain', [], []],
    ['without extents', ['noextents'], []],
    ['without zero', ['nozero'], []],
    ['zeroes only by writing', ['nozero'], ['zeromode=emulate']],
    ['one connection only', ['multi-conn'], ['multi-conn-mode=disable']],
    [
      'requests of 64 KiB at most',
      ['blocksize-policy'],
      [
        'blocksize-minimum=1',
        'blocksize-preferred=4096',
        'blocksize-maximum=65536',
        'blocksize-error-policy=error',
      ],
    ],
    [
      'whole blocks of 512',
      ['blocksize-policy'],
      [
        'blocksize-minimum=512',
        'blocksize-preferred=4096',
        'blocksize-maximum=1M',
        'blocksize-error-policy=error',
      ],
    ],
    [
      'whole blocks of 64 KiB',
      ['blocksize-policy'],
      [
        'blocksize-minimum=65536',
        'blocksize-preferred=65536',
        'blocksize-maximum=128K',
        'blocksize-error-policy=error',
      ],
    ],
    ['slow answers', ['delay'], ['rdelay=5ms', 'wdelay=5ms']],
  ])('%s, as source and as sink', async (_what, filters, parameters) => {
    const disk = await makeDisk(sizeBytes);
    const copy = next('.raw');
    await makeRaw({ path: copy, sizeBytes, regions: [{ offset: 0, length: sizeBytes, seed: 77 }] });
    await using source = await serve(disk, filters, parameters);
    await using sink = await serve(copy, filters, parameters);
    await using session = await openSession({
      source: nbd(source.uri, 4),
      sink: nbd(sink.uri, 4),
      diskBytes: sizeBytes,
    });
    const result = await session.submit(
      windowOf([copyRow(0, 2 * MIB), zeroRow(2 * MIB, MIB), copyRow(3 * MIB, MIB)], { zeroPolicy: 'write' }),
    );
    await session.flush();
    expect(result).toMatchObject({ bytesRead: 3 * MIB, bytesSkipped: 0 });
    expect(result.bytesWritten + result.bytesZeroed).toBe(sizeBytes);
    await session.close();
    expect(await firstDifference(disk, copy)).toBeNull();
  });

  test.each([512, 4096])(
    'a disk that ends inside a block of %d is padded with zeroes on the sink',
    async (block) => {
      const exact = 2 * MIB + 12_345;
      const disk = await makeDisk(exact);
      const rounded = Math.ceil(exact / block) * block;
      const copy = next('.raw');
      await makeRaw({ path: copy, sizeBytes: rounded, regions: [{ offset: 0, length: rounded, seed: 5 }] });
      await using source = await serve(disk, []);
      await using sink = await serve(
        copy,
        ['blocksize-policy'],
        [
          `blocksize-minimum=${block}`,
          'blocksize-preferred=4096',
          'blocksize-maximum=1M',
          'blocksize-error-policy=error',
        ],
      );
      await using session = await openSession({
        source: nbd(source.uri),
        sink: nbd(sink.uri),
        diskBytes: exact,
      });
      const result = await session.submit(windowOf([copyRow(0, exact)], { zeroPolicy: 'write' }));
      await session.flush();
      await session.close();
      expect(result.bytesRead).toBe(exact);
      const [written, original] = [await readFile(copy), await readFile(disk)];
      expect(written.subarray(0, exact).equals(original)).toBe(true);
      expect(written.subarray(exact).every((byte) => byte === 0)).toBe(true);
    },
  );

  test('a source in whole blocks whose disk ends inside one is read to its exact end', async () => {
    const exact = 2 * MIB + 777;
    const disk = await makeDisk(exact);
    const padded = next('.raw');
    await runTool('cp', [disk, padded], { timeoutMs: 10_000 });
    await runTool('truncate', ['--size=%4096', padded], { timeoutMs: 10_000 });
    const file = await open(padded, 'r+');
    await file.write(Buffer.alloc(1000, 0xee), 0, 1000, exact);
    await file.close();
    await using source = await serve(
      padded,
      ['blocksize-policy'],
      [
        'blocksize-minimum=4096',
        'blocksize-preferred=4096',
        'blocksize-maximum=1M',
        'blocksize-error-policy=error',
      ],
    );
    await using session = await openSession({
      source: nbd(source.uri),
      sink: { kind: 'null' },
      diskBytes: exact,
    });
    const result = await session.submit(windowOf([copyRow(0, exact)]));
    expect(readEntries(result.entries)).toEqual(expectedEntries(await readFile(disk)));
  });

  test('HOLE without ZERO over data is read like data', async () => {
    await using source = await startNbdkit({
      socketPath: next('.sock'),
      plugin: ['eval'],
      parameters: [
        'get_size=echo 1M',
        'can_extents=exit 0',
        'extents=echo 0 1M hole',
        String.raw`pread=head -c $3 /dev/zero | tr "\000" "\252"`,
      ],
    });
    await using session = await openSession({
      source: { ...nbd(source.uri), metaContexts: ['base:allocation'] },
      sink: { kind: 'null' },
      diskBytes: MIB,
    });
    const status = (await session.blockStatus(0, MIB))['base:allocation'];
    expect([...(status ?? [])]).toEqual([MIB, 1]);
    const result = await session.submit(windowOf([copyRow(0, MIB)]));
    expect(readEntries(result.entries)).toEqual(expectedEntries(Buffer.alloc(MIB, 0xaa)));
  });

  test('a sink without room answers ENOSPC, recognisably', async () => {
    const disk = await makeDisk(sizeBytes);
    await using source = await serve(disk, []);
    await using sink = await startNbdkit({
      socketPath: next('.sock'),
      plugin: ['memory', `size=${sizeBytes}`],
      filters: ['error'],
      parameters: ['error-pwrite=ENOSPC', 'error-pwrite-rate=1'],
    });
    await using session = await openSession({
      source: nbd(source.uri),
      sink: nbd(sink.uri),
      diskBytes: sizeBytes,
    });
    const error = await nbdErrorOf(session.submit(windowOf([copyRow(0, sizeBytes)])));
    expect(error).toMatchObject({ code: 'NBD_REQUEST', op: 'pwrite', errno: 28 });
  });

  test('a failing flush is a failure', async () => {
    await using sink = await startNbdkit({
      socketPath: next('.sock'),
      plugin: ['eval'],
      parameters: [
        'get_size=echo 1M',
        'can_write=exit 0',
        'can_flush=exit 0',
        'pread=head -c $3 /dev/zero',
        'pwrite=cat >/dev/null',
        'flush=echo EIO >&2; exit 1',
      ],
    });
    const disk = await makeDisk(MIB);
    await using source = await serve(disk, []);
    await using session = await openSession({ source: nbd(source.uri), sink: nbd(sink.uri), diskBytes: MIB });
    await session.submit(windowOf([copyRow(0, MIB)]));
    expect(await nbdErrorOf(session.flush())).toMatchObject({ code: 'NBD_REQUEST', op: 'flush', errno: 5 });
  });
});

describe('files', () => {
  const sizeBytes = 4 * MIB + 4096 + 300;

  test('rows take bytes from several files, and the sink file stays sparse', async () => {
    const files = [next('.a'), next('.b')];
    await makeRaw({ path: files[0]!, sizeBytes: MIB, regions: [{ offset: 0, length: MIB, seed: 1 }] });
    await makeRaw({
      path: files[1]!,
      sizeBytes: MIB + 4396,
      regions: [{ offset: 0, length: MIB + 4396, seed: 2 }],
    });
    const target = next('.raw');
    await makeRaw({ path: target, sizeBytes });
    await using session = await openSession({
      source: { kind: 'files', paths: files },
      sink: { kind: 'file', path: target, isZeroed: true },
      diskBytes: sizeBytes,
    });
    expect(session.sourceInfo).toBeUndefined();
    const result = await session.submit(
      windowOf([
        copyRow(0, 2 * CLUSTER, [0, 4 * CLUSTER]),
        copyRow(2 * CLUSTER, CLUSTER, [1, 4096]),
        zeroRow(MIB, MIB),
        copyRow(4 * MIB, 4396, [1, MIB]),
      ]),
    );
    await session.flush();
    await session.close();
    const [a, b] = [await readFile(files[0]!), await readFile(files[1]!)];
    const expected = Buffer.alloc(sizeBytes);
    a.copy(expected, 0, 4 * CLUSTER, 6 * CLUSTER);
    b.copy(expected, 2 * CLUSTER, 4096, 4096 + CLUSTER);
    b.copy(expected, 4 * MIB, MIB, MIB + 4396);
    expect((await readFile(target)).equals(expected)).toBe(true);
    expect((await stat(target)).blocks * 512).toBeLessThan(8 * CLUSTER);
    expect(readEntries(result.entries).filter((it) => !it.isZero)).toEqual(expectedEntries(expected));
  });

  test('zeroes over old bytes punch holes, or are written where that is not aligned', async () => {
    const target = next('.raw');
    await makeRaw({ path: target, sizeBytes, regions: [{ offset: 0, length: sizeBytes }] });
    const empty = next('.empty');
    await makeRaw({ path: empty, sizeBytes });
    await using session = await openSession({
      source: { kind: 'files', paths: [empty] },
      sink: { kind: 'file', path: target, isZeroed: false },
      diskBytes: sizeBytes,
    });
    await session.submit(
      windowOf([copyRow(0, 2 * MIB, [0, 0]), zeroRow(2 * MIB, sizeBytes - 2 * MIB)], { zeroPolicy: 'write' }),
    );
    await session.flush();
    await session.close();
    expect((await readFile(target)).every((byte) => byte === 0)).toBe(true);
    expect((await stat(target)).size).toBe(sizeBytes);
    expect((await stat(target)).blocks * 512).toBeLessThan(CLUSTER);
  });

  test('bytes beyond the end of a file read as zeroes', async () => {
    const file = next('.short');
    await makeRaw({ path: file, sizeBytes: 1000, regions: [{ offset: 0, length: 1000 }] });
    await using session = await openSession({
      source: { kind: 'files', paths: [file] },
      sink: { kind: 'null' },
      diskBytes: CLUSTER,
    });
    const result = await session.submit(windowOf([copyRow(0, CLUSTER)]));
    const expected = Buffer.concat([await readFile(file), Buffer.alloc(CLUSTER - 1000)]);
    expect(readEntries(result.entries)).toEqual(expectedEntries(expected));
  });

  test('a layer goes to a block device', async () => {
    const backing = next('.img');
    await makeRaw({ path: backing, sizeBytes: 8 * MIB, regions: [{ offset: 0, length: 8 * MIB }] });
    const device = (
      await runTool('losetup', ['--find', '--show', backing], { timeoutMs: 10_000 })
    ).stdout.trim();
    try {
      const layer = next('.layer');
      await makeRaw({ path: layer, sizeBytes: MIB, regions: [{ offset: 0, length: MIB, seed: 3 }] });
      await using session = await openSession({
        source: { kind: 'files', paths: [layer] },
        sink: { kind: 'file', path: device, isZeroed: false },
        diskBytes: 8 * MIB,
      });
      await session.submit(windowOf([copyRow(0, MIB), zeroRow(MIB, 7 * MIB)], { zeroPolicy: 'write' }));
      await session.flush();
      await session.close();
      const written = await readFile(device);
      expect(written.subarray(0, MIB).equals(await readFile(layer))).toBe(true);
      expect(written.subarray(MIB).every((byte) => byte === 0)).toBe(true);
    } finally {
      await runTool('losetup', ['--detach', device], { timeoutMs: 10_000 });
    }
  });

  test('a full filesystem is FILE_IO with ENOSPC', async () => {
    const layer = next('.layer');
    await makeRaw({ path: layer, sizeBytes: 4 * MIB, regions: [{ offset: 0, length: 4 * MIB }] });
    const mount = next('.mnt');
    await runTool('mkdir', [mount], { timeoutMs: 10_000 });
    await runTool('mount', ['-t', 'tmpfs', '-o', 'size=1M', 'none', mount], { timeoutMs: 10_000 });
    try {
      const target = `${mount}/disk.raw`;
      await makeRaw({ path: target, sizeBytes: 4 * MIB });
      await using session = await openSession({
        source: { kind: 'files', paths: [layer] },
        sink: { kind: 'file', path: target, isZeroed: true },
        diskBytes: 4 * MIB,
      });
      const error = await nbdErrorOf(session.submit(windowOf([copyRow(0, 4 * MIB)])));
      expect(error).toMatchObject({ code: 'FILE_IO', op: 'pwrite', errno: 28 });
    } finally {
      await runTool('umount', [mount], { timeoutMs: 10_000 });
    }
  });

  test('what is no file is refused, and a FIFO does not block', async () => {
    const fifo = next('.fifo');
    await runTool('mkfifo', [fifo], { timeoutMs: 10_000 });
    const session = openSession({
      source: { kind: 'files', paths: [fifo] },
      sink: { kind: 'null' },
      diskBytes: MIB,
    });
    expect(await nbdErrorOf(session)).toMatchObject({ code: 'FILE_IO', op: 'openSource', errno: 22 });
    const missing = openSession({
      source: { kind: 'files', paths: [next('.none')] },
      sink: { kind: 'null' },
      diskBytes: MIB,
    });
    expect(await nbdErrorOf(missing)).toMatchObject({ code: 'FILE_IO', op: 'openSource', errno: 2 });
  });

  test('a file into a QCOW2 layer behind qemu-nbd over a parent: zero clusters hide the parent', async () => {
    const size = 2 * MIB;
    const parent = next('.qcow2');
    const child = next('.qcow2');
    await makeQcow2({ path: parent, sizeBytes: size, regions: [{ offset: 0, length: size }] });
    await qemuImg(['create', '-q', '-f', 'qcow2', '-b', parent, '-F', 'qcow2', child]);
    const raw = next('.raw');
    await makeRaw({ path: raw, sizeBytes: size, regions: [{ offset: 0, length: CLUSTER, seed: 8 }] });
    await using sink = await startQemuNbd({
      image: child,
      format: 'qcow2',
      socketPath: next('.sock'),
      extra: ['--discard=unmap'],
    });
    await using session = await openSession({
      source: { kind: 'files', paths: [raw] },
      sink: nbd(sink.uri),
      diskBytes: size,
    });
    await session.submit(windowOf([copyRow(0, MIB), zeroRow(MIB, MIB)], { zeroPolicy: 'write' }));
    await session.flush();
    await session.close();
    await using handle = await connectTo(sink.uri);
    const back = await handle.pread(0, size);
    expect(back.subarray(0, CLUSTER).equals((await readFile(raw)).subarray(0, CLUSTER))).toBe(true);
    expect(back.subarray(CLUSTER).every((byte) => byte === 0)).toBe(true);
  });
});
