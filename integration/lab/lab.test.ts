import { rm, stat, writeFile } from 'node:fs/promises';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import mysql from 'mysql2/promise';
import { makeLabDirectory, type LabDirectory } from './directory.js';
import {
  addBitmap,
  expectCleanImage,
  exportRaw,
  firstDifference,
  makeQcow2,
  makeRaw,
  qemuImg,
  qemuIo,
  sha256Disk,
  sha256File,
  writeRegions,
} from './disk-image.js';
import { findDescendants, findLeftovers } from './leftovers.js';
import { startMariadb } from './mariadb.js';
import { startNbdkit, startQemuNbd } from './nbd-server.js';
import { startRedis } from './redis.js';
import { answersOnSocket } from './server.js';
import { startStorageDaemon } from './storage-daemon.js';
import { mountTmpfs } from './tmpfs.js';
import { MIB } from '../../src/lib/units.js';
import { runTool } from '../../src/lib/process.js';

let lab: LabDirectory;
beforeAll(async () => {
  lab = await makeLabDirectory();
});
afterAll(async () => {
  const left = await findLeftovers(lab.path);
  await lab[Symbol.asyncDispose]();
  expect(left).toEqual([]);
  expect(await findDescendants()).toEqual([]);
});

describe('disk images', () => {
  const regions = [
    { offset: 0, length: 65536 },
    { offset: 5 * MIB + 4096, length: 5 * MIB },
  ];

  test('the same regions make the same disk, raw and QCOW2', async () => {
    await makeRaw({ path: lab.file('a.raw'), sizeBytes: 16 * MIB, regions });
    await makeQcow2({ path: lab.file('a.qcow2'), sizeBytes: 16 * MIB, regions });
    await expectCleanImage(lab.file('a.qcow2'));
    expect(await sha256Disk(lab.file('a.qcow2'), 'qcow2', lab.file('scratch'))).toBe(
      await sha256File(lab.file('a.raw')),
    );
  });

  test('the first differing byte is found', async () => {
    await makeRaw({ path: lab.file('b.raw'), sizeBytes: 16 * MIB, regions });
    expect(await firstDifference(lab.file('a.raw'), lab.file('b.raw'))).toBeNull();
    await qemuIo({ path: lab.file('b.raw'), format: 'raw', commands: ['write -P 1 15728641 1'] });
    expect(await firstDifference(lab.file('a.raw'), lab.file('b.raw'))).toEqual({
      kind: 'byte',
      offset: 15728641,
    });
    await writeFile(lab.file('c.raw'), '');
    expect(await firstDifference(lab.file('a.raw'), lab.file('c.raw'))).toMatchObject({ kind: 'size' });
  });

  test('a failing qemu-io command is a failure', async () => {
    await expect(
      qemuIo({ path: lab.file('a.raw'), format: 'raw', commands: ['write -P 1 1T 1'] }),
    ).rejects.toMatchObject({ code: 'TOOL_FAILED' });
  });
});

describe('NBD servers', () => {
  test('qemu-nbd serves an image with its bitmap', async () => {
    const image = lab.file('d.qcow2');
    await makeQcow2({ path: image, sizeBytes: 4 * MIB });
    await addBitmap(image, 'b0');
    await qemuIo({ path: image, format: 'qcow2', commands: ['write -P 7 1M 64k'] });
    await using server = await startQemuNbd({
      image,
      format: 'qcow2',
      socketPath: lab.file('d.sock'),
      exportName: 'disk 0',
      bitmap: 'b0',
      isReadOnly: true,
    });
    const map = await runTool('nbdinfo', ['--json', '--map=qemu:dirty-bitmap:b0', server.uri], {
      timeoutMs: 5000,
    });
    expect(JSON.parse(map.stdout)).toMatchObject([
      { offset: 0, type: 0 },
      { offset: MIB, length: 65536, type: 1 },
      { offset: MIB + 65536, type: 0 },
    ]);
  });

  test('nbdkit serves with filters, and a killed one is gone', async () => {
    const server = await startNbdkit({
      socketPath: lab.file('e.sock'),
      plugin: ['memory', 'size=1M'],
      filters: ['delay'],
      parameters: ['rdelay=1ms'],
    });
    expect((await runTool('nbdinfo', ['--size', server.uri], { timeoutMs: 5000 })).stdout.trim()).toBe(
      '1048576',
    );
    await server.kill();
    expect(server.hasExited).toBe(true);
  });

  test('a missing plugin is an error with its words', async () => {
    const start = startNbdkit({ socketPath: lab.file('f.sock'), plugin: ['no-such-plugin'] });
    await expect(start).rejects.toMatchObject({ code: 'TOOL_FAILED' });
  });

  test('a storage daemon records writes over NBD in its bitmaps', async () => {
    const image = lab.file('g.qcow2');
    await makeQcow2({ path: image, sizeBytes: 4 * MIB });
    const daemon = await startStorageDaemon({ image, socketPath: lab.file('g.sock') });
    await daemon.addBitmap('holdfast-x');
    await qemuIo({ path: daemon.uri, format: 'raw', commands: ['write -P 9 2M 64k'] });
    const map = await runTool('nbdinfo', ['--json', '--map=qemu:dirty-bitmap:holdfast-x', daemon.uri], {
      timeoutMs: 5000,
    });
    expect(JSON.parse(map.stdout)).toMatchObject([
      { type: 0 },
      { offset: 2 * MIB, length: 65536, type: 1 },
      { type: 0 },
    ]);
    await daemon.clearBitmap('holdfast-x');
    await daemon.resizeDisk(5 * MIB);
    await daemon.removeBitmap('holdfast-x');
    await daemon.stop();
    await rm(lab.file('g.sock'), { force: true });
    await rm(lab.file('g.sock.qmp'), { force: true });
    expect(JSON.parse(await qemuImg(['info', '-f', 'qcow2', '--output=json', image]))).toMatchObject({
      'virtual-size': 5 * MIB,
    });
    await exportRaw(image, 'qcow2', lab.file('g.raw'));
    await writeRegions(lab.file('g.raw'), [{ offset: 0, length: 512 }]);
  });
});

describe('Redis and MariaDB', () => {
  test('Redis keeps its data over a kill', async () => {
    await using redis = await startRedis({ dir: lab.file('redis') });
    expect(await answersOnSocket(redis.socketPath, 'SET a 1\r\n', /^\+OK/)).toBe(true);
    await redis.kill();
    expect(await answersOnSocket(redis.socketPath, 'PING\r\n', /PONG/)).toBe(false);
    await redis.start();
    expect(await answersOnSocket(redis.socketPath, 'GET a\r\n', /^\$1\r\n1/)).toBe(true);
    await redis.stop();
    await rm(redis.socketPath, { force: true });
  });

  test('MariaDB gives databases and keeps them over a restart', async () => {
    await using mariadb = await startMariadb({ dir: lab.file('mariadb') });
    const { name, socketPath, user } = await mariadb.createDatabase();
    await mariadb.stop();
    await mariadb.start();
    const connection = await mysql.createConnection({ socketPath, user, database: name });
    const [rows] = await connection.query('SELECT DATABASE() AS name');
    await connection.end();
    expect(rows).toEqual([{ name }]);
  });
});

describe('leftovers', () => {
  test('a filesystem of its own fills up, turns read-only and goes', async () => {
    await using tmpfs = await mountTmpfs({ path: lab.file('small'), sizeBytes: MIB });
    await expect(writeFile(lab.file('small', 'big'), Buffer.alloc(2 * MIB))).rejects.toMatchObject({
      code: 'ENOSPC',
    });
    await tmpfs.remount('ro');
    await expect(writeFile(lab.file('small', 'x'), '')).rejects.toMatchObject({ code: 'EROFS' });
    expect(await findLeftovers(lab.path)).toEqual([expect.stringContaining('mount: ')]);
    await tmpfs.unmount();
    await expect(stat(lab.file('small', 'big'))).rejects.toMatchObject({ code: 'ENOENT' });
  });

  test('a server still running, its socket and a partial layer are found', async () => {
    const server = await startNbdkit({ socketPath: lab.file('h.sock'), plugin: ['null'] });
    await writeFile(lab.file('.partial-x.qcow2'), '');
    const found = await findLeftovers(lab.path);
    expect(found).toContainEqual(expect.stringContaining(`process ${server.pid}: nbdkit`));
    expect(found).toContainEqual(`socket: ${lab.file('h.sock')}`);
    expect(found).toContainEqual(`file: ${lab.file('.partial-x.qcow2')}`);
    expect(await findDescendants()).toContain(server.pid);
    await server.stop();
    await rm(lab.file('.partial-x.qcow2'));
  });
});
