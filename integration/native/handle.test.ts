import { writeFile } from 'node:fs/promises';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { listExports } from '../../native/lib/index.js';
import { addBitmap, makeQcow2, makeRaw, qemuIo, seededBytes } from '../lab/disk-image.js';
import { makeLabDirectory, type LabDirectory } from '../lab/directory.js';
import { startNbdkit, startQemuNbd, type LabNbdServer } from '../lab/nbd-server.js';
import { CLUSTER, connectTo, nbdErrorOf } from './fixtures.js';

const MIB = 1024 * 1024;
let lab: LabDirectory;

beforeAll(async () => {
  lab = await makeLabDirectory();
});
afterAll(async () => {
  await lab[Symbol.asyncDispose]();
});

describe('calls of a handle', () => {
  let server: LabNbdServer;
  beforeAll(async () => {
    await makeRaw({ path: lab.file('disk.raw'), sizeBytes: 8 * MIB });
    server = await startQemuNbd({
      image: lab.file('disk.raw'),
      format: 'raw',
      socketPath: lab.file('h.sock'),
      exportName: 'disk ä/1',
      extra: ['--discard=unmap'],
    });
  });
  afterAll(async () => {
    await server.stop();
  });

  test('the info says what the server offers', async () => {
    await using handle = await connectTo(server.uri, { metaContexts: ['base:allocation', 'x-none:none'] });
    expect(handle.info).toMatchObject({
      sizeBytes: 8 * MIB,
      isReadOnly: false,
      canFlush: true,
      canFua: true,
      canZero: true,
      canTrim: true,
      isTls: false,
      isStructured: true,
      protocol: 'newstyle-fixed',
      metaContexts: ['base:allocation'],
    });
    expect(handle.info.blockSize.maximum).toBe(32 * MIB);
  });

  test('what is written is read back, by another connection too, and zero and trim take it away', async () => {
    await using writer = await connectTo(server.uri);
    await using reader = await connectTo(server.uri);
    const data = seededBytes(1, 3 * CLUSTER);
    await writer.pwrite(CLUSTER, data, { fua: true });
    await writer.flush();
    expect((await reader.pread(CLUSTER, data.length)).equals(data)).toBe(true);
    await writer.zero(CLUSTER, CLUSTER, { noHole: true, fua: true });
    await writer.zero(2 * CLUSTER, CLUSTER);
    await writer.trim(3 * CLUSTER, CLUSTER, { fua: true });
    await writer.cache(0, MIB);
    expect((await reader.pread(CLUSTER, 2 * CLUSTER)).every((byte) => byte === 0)).toBe(true);
  });

  test('block status has flat pairs for each context, and a length beyond 4 GiB is clipped', async () => {
    await using handle = await connectTo(server.uri, { metaContexts: ['base:allocation'] });
    await handle.pwrite(4 * MIB, seededBytes(2, MIB));
    const pairs = (await handle.blockStatus(4 * MIB, 2 * MIB))['base:allocation'];
    expect(pairs).toBeInstanceOf(Float64Array);
    expect([...(pairs ?? [])].slice(0, 2)).toEqual([MIB, 0]);
    const whole = (await handle.blockStatus(0, handle.info.sizeBytes))['base:allocation'] ?? [];
    expect(whole.length % 2).toBe(0);
  });

  test('many requests overlap on one connection', async () => {
    await using handle = await connectTo(server.uri);
    const blocks = Array.from({ length: 64 }, (_, index) => seededBytes(100 + index, CLUSTER));
    await Promise.all(blocks.map((block, index) => handle.pwrite(index * CLUSTER, block)));
    const back = await Promise.all(blocks.map((_, index) => handle.pread(index * CLUSTER, CLUSTER)));
    expect(back.every((block, index) => block.equals(blocks[index]!))).toBe(true);
  });

  test('a request beyond the end is refused and the connection lives', async () => {
    await using handle = await connectTo(server.uri);
    const error = await nbdErrorOf(handle.pread(8 * MIB - 512, 1024));
    expect(error).toMatchObject({ code: 'NBD_REQUEST', op: 'pread' });
    expect(error.errno).toBeGreaterThan(0);
    expect(await handle.pread(0, 512)).toHaveLength(512);
  });

  test('use after close says NBD_CLOSED, and closing again is nothing', async () => {
    const handle = await connectTo(server.uri);
    await Promise.all([handle.close(), handle.close()]);
    await handle.close();
    for (const call of [handle.pread(0, 512), handle.flush(), handle.blockStatus(0, 512)]) {
      expect((await nbdErrorOf(call)).code).toBe('NBD_CLOSED');
    }
  });

  test('wrong types and ranges are refused before anything is sent', async () => {
    await using handle = await connectTo(server.uri);
    await expect(handle.pread(-1, 512)).rejects.toThrow(RangeError);
    await expect(handle.pread(0.5, 512)).rejects.toThrow(RangeError);
    await expect(handle.pread(0, Number.NaN)).rejects.toThrow(RangeError);
    await expect(handle.pread(0, 2 ** 40)).rejects.toThrow(RangeError);
    await expect(handle.pread('0' as unknown as number, 1)).rejects.toThrow(RangeError);
    await expect(handle.pwrite(0, 'text' as unknown as Buffer)).rejects.toThrow(TypeError);
    await expect(handle.zero(0, 2 ** 60)).rejects.toThrow(RangeError);
  });

  test('an unknown export is a refused connection', async () => {
    const error = await nbdErrorOf(connectTo(server.uri.replace('disk%20', 'other')));
    expect(error.code).toBe('NBD_CONNECT');
    expect(error.message).not.toContain('sock');
  });

  test('the exports are listed by their names', async () => {
    const exports = await listExports({ uri: server.uri, connectTimeoutMs: 5000, requestTimeoutMs: 5000 });
    expect(exports.map((it) => it.name)).toEqual(['disk ä/1']);
  });
});

test('a dirty bitmap is found by its prefix and read by its full name', async () => {
  const image = lab.file('bitmap.qcow2');
  await makeQcow2({ path: image, sizeBytes: 4 * MIB });
  await addBitmap(image, 'b0');
  await qemuIo({ path: image, format: 'qcow2', commands: [`write -P 7 1M 64k`, 'write -z 2M 128k'] });
  await using server = await startQemuNbd({
    image,
    format: 'qcow2',
    socketPath: lab.file('b.sock'),
    bitmap: 'b0',
    isReadOnly: true,
  });
  await using handle = await connectTo(server.uri, {
    metaContexts: ['base:allocation', 'qemu:dirty-bitmap:'],
  });
  expect(handle.info.metaContexts).toEqual(['base:allocation', 'qemu:dirty-bitmap:b0']);
  const status = await handle.blockStatus(0, 4 * MIB);
  expect([...(status['qemu:dirty-bitmap:b0'] ?? [])]).toEqual(
    [
      [MIB, 0],
      [CLUSTER, 1],
      [MIB - CLUSTER, 0],
      [2 * CLUSTER, 1],
      [2 * MIB - 2 * CLUSTER, 0],
    ].flat(),
  );
  expect([...(status['base:allocation'] ?? [])].length).toBeGreaterThan(2);
});

test('a second client of a server with one place ends with NBD_STALLED, not never', async () => {
  await makeRaw({ path: lab.file('one.raw'), sizeBytes: MIB });
  await using server = await startQemuNbd({
    image: lab.file('one.raw'),
    format: 'raw',
    socketPath: lab.file('o.sock'),
    shared: 1,
  });
  await using first = await connectTo(server.uri);
  expect(first.info.canMultiConn).toBe(false);
  const error = await nbdErrorOf(connectTo(server.uri, { connectTimeoutMs: 500 }));
  expect(error).toMatchObject({ code: 'NBD_STALLED' });
  expect(await first.pread(0, 512)).toHaveLength(512);
});

test('listing with a server that has many exports', async () => {
  await using server = await startNbdkit({
    socketPath: lab.file('m.sock'),
    plugin: ['eval'],
    parameters: [
      'list_exports=echo INTERLEAVED; for i in 1 2 3; do echo name$i; echo "text $i"; done',
      'get_size=echo 1M',
      'pread=dd if=/dev/zero count=$3 iflag=count_bytes',
    ],
  });
  const exports = await listExports({ uri: server.uri, connectTimeoutMs: 5000, requestTimeoutMs: 5000 });
  expect(exports).toEqual([1, 2, 3].map((it) => ({ name: `name${it}`, description: `text ${it}` })));
});

describe('TLS with a pre-shared key', () => {
  const key = 'ab'.repeat(32);
  let server: LabNbdServer;
  beforeAll(async () => {
    await writeFile(lab.file('server.psk'), `alice:${key}\n`, { mode: 0o600 });
    await writeFile(lab.file('good.psk'), `alice:${key}\n`, { mode: 0o600 });
    await writeFile(lab.file('wrong.psk'), `alice:${'cd'.repeat(32)}\n`, { mode: 0o600 });
    await writeFile(lab.file('mallory.psk'), `mallory:${key}\n`, { mode: 0o600 });
    server = await startNbdkit({
      socketPath: lab.file('t.sock'),
      plugin: ['memory', 'size=1M'],
      extra: ['--tls=require', `--tls-psk=${lab.file('server.psk')}`],
    });
  });
  afterAll(async () => {
    await server.stop();
  });
  const secure = (): string => server.uri.replace('nbd+unix:', 'nbds+unix:');

  test('the right key is let in', async () => {
    await using handle = await connectTo(secure(), {
      tls: { pskFile: lab.file('good.psk'), username: 'alice' },
    });
    expect(handle.info.isTls).toBe(true);
    expect(await handle.pread(0, 512)).toHaveLength(512);
  });

  test.each([
    ['a wrong key', 'wrong.psk', 'alice'],
    ['an unknown name', 'mallory.psk', 'mallory'],
  ])('%s is refused by the server', async (_what, file, username) => {
    const error = await nbdErrorOf(connectTo(secure(), { tls: { pskFile: lab.file(file), username } }));
    expect(error.code).toBe('NBD_CONNECT');
    expect(error.message).not.toContain(key.slice(0, 8));
  });

  test('keys given with a plain URI still mean TLS, and without keys a TLS server refuses', async () => {
    await using handle = await connectTo(server.uri, {
      tls: { pskFile: lab.file('good.psk'), username: 'alice' },
    });
    expect(handle.info.isTls).toBe(true);
    expect((await nbdErrorOf(connectTo(server.uri))).code).toBe('NBD_CONNECT');
  });
});
