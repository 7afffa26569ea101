import { once } from 'node:events';
import { access, mkdir, readFile, rename, rm, symlink, writeFile } from 'node:fs/promises';
import net from 'node:net';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { reloadExportDaemon } from '../../src/exports/index.js';
import { runTool } from '../../src/lib/process.js';
import { findLeftovers } from '../lab/leftovers.js';
import { makeLabDirectory, type LabDirectory } from '../lab/directory.js';
import { startQemuNbd } from '../lab/nbd-server.js';
import { freePort } from '../lab/port.js';
import {
  definition,
  fileOf,
  makeImage,
  namesAt,
  reads,
  runExportd,
  startExportd,
  tryExportd,
  type ExportdRig,
} from './rig.js';

const TOOL = { timeoutMs: 20_000 };
const WAIT = { timeout: 10_000, interval: 20 };

describe('bad files in the directory', () => {
  let directory: LabDirectory;
  let rig: ExportdRig;
  let image: string;

  beforeAll(async () => {
    directory = await makeLabDirectory();
    image = directory.file('good.qcow2');
    await makeImage(image, { pattern: 0x11 });
    rig = await startExportd({ directory: directory.path });
    await rig.write('good.conf', definition('good', image));
    await rig.reload();
  });
  afterAll(async () => {
    await rig.stop();
    const left = await findLeftovers(directory.path);
    await directory[Symbol.asyncDispose]();
    expect(left).toEqual([]);
  });

  const cases: [string, string | (() => string), string, RegExp][] = [
    ['broken', '[x\nexportname=/x\n', 'INVALID_INPUT', /line 1/],
    ['half-written', '[half]\nexportname = /srv/disk.qcow2\nforma', 'INVALID_INPUT', /line 3/],
    ['empty', '', 'INVALID_INPUT', /no section/],
    ['binary', '\0\x01\x02ELF', 'INVALID_INPUT', /line 1/],
    ['of 64 characters', () => text('n'.repeat(64)), 'INVALID_INPUT', /64 characters/],
    ['misspelt', () => `${text('misspelt')}raedonly = true\n`, 'INVALID_INPUT', /raedonly/],
    ['without a format', () => text('unsaid').replace(/format.*\n/, ''), 'INVALID_INPUT', /format/],
    ['of an image that is missing', () => text('missing', '/nowhere/disk.qcow2'), 'NOT_FOUND', /ENOENT/],
    [
      'raw on a container',
      () => text('container').replace('format = qcow2', 'format = raw'),
      'SOURCE_FORMAT',
      /raw/,
    ],
    ['of a directory', () => text('dir', '/etc'), 'SOURCE_FORMAT', /neither/],
    ['of a character device', () => text('null', '/dev/null'), 'SOURCE_FORMAT', /neither/],
  ];

  function text(name: string, file = image): string {
    return `[${name}]\nexportname = ${file}\nformat = qcow2\nreadonly = true\n`;
  }

  test.each(cases)('a file %s costs only its own export', async (_what, content, code, message) => {
    await rig.write('bad.conf', typeof content === 'string' ? content : content());
    const status = await rig.reload();
    expect(fileOf(status, 'bad.conf')).toMatchObject({ state: 'failed', listeners: [] });
    expect(fileOf(status, 'bad.conf').error?.code).toBe(code);
    expect(fileOf(status, 'bad.conf').error?.message).toMatch(message);
    expect(await namesAt(rig.tcp(''))).toEqual(['good']);
    expect(await reads(rig.tcp('good'), 0x11)).toBe(true);
    await rig.remove('bad.conf');
    expect((await rig.reload()).files).toHaveLength(1);
  });

  test('foreign files, links to nowhere and pipes are no exports and stop nothing', async () => {
    await writeFile(path.join(rig.exportsDirectory, 'README'), 'hello');
    await writeFile(path.join(rig.exportsDirectory, '.hidden.conf'), 'not read');
    await mkdir(path.join(rig.exportsDirectory, 'directory.conf'));
    await symlink('/nowhere/x.conf', path.join(rig.exportsDirectory, 'link.conf'));
    await runTool('mkfifo', [path.join(rig.exportsDirectory, 'pipe.conf')], TOOL);
    const { files } = await rig.reload();
    expect(files.map(({ file, state }) => `${file} ${state}`)).toEqual([
      ...['directory.conf failed', 'good.conf served', 'link.conf failed', 'pipe.conf failed'],
    ]);
    for (const name of ['README', '.hidden.conf', 'directory.conf', 'link.conf', 'pipe.conf']) {
      await rm(path.join(rig.exportsDirectory, name), { recursive: true });
    }
    await rig.reload();
  });

  test('of two files with one name the newcomer is refused, whatever it is called', async () => {
    await rig.write('a-newcomer.conf', definition('good', directory.file('other.qcow2')));
    const status = await rig.reload();
    expect(fileOf(status, 'good.conf').state).toBe('served');
    expect(fileOf(status, 'a-newcomer.conf').error).toEqual({
      code: 'CONFLICT',
      message: 'the name good is taken by good.conf',
    });
    await rig.remove('a-newcomer.conf');
  });

  test('an image that a writer holds is the error of its export, which is served when the writer has left', async () => {
    const held = directory.file('held.qcow2');
    await makeImage(held, { pattern: 5 });
    const writer = await startQemuNbd({ image: held, format: 'qcow2', socketPath: directory.file('w.sock') });
    try {
      await rig.write('held.conf', definition('held', held));
      const { error } = fileOf(await rig.reload(), 'held.conf');
      expect(error?.code).toBe('EXPORT_REFUSED');
      expect(error?.message).toMatch(/another process has its image open/);
      expect(await namesAt(rig.unix(''))).toEqual(['good']);
    } finally {
      await writer.stop();
    }
    expect(fileOf(await rig.reload(), 'held.conf').error).toBeNull();
    await rig.remove('held.conf');
    await rig.reload();
  });

  test('a chain is not opened by a guess, nor by names that are no paths', async () => {
    await makeImage(directory.file('child.qcow2'), { pattern: 7, backing: image });
    const child = directory.file('child.qcow2');
    await rig.write('chain.conf', definition('chain', child));
    const rebase = (...args: string[]) =>
      runTool('qemu-img', ['rebase', '-q', '-u', '-f', 'qcow2', ...args, child], TOOL);
    for (const [args, message] of [
      [['-F', 'qcow2', '-b', 'missing.qcow2'], /missing\.qcow2 cannot be opened/],
      [['-F', 'qcow2', '-b', 'nbd://localhost/x'], /not named by a path/],
      [['-F', 'vmdk', '-b', image], /vmdk/],
      [['-F', 'qcow2', '-b', child], /circle/],
    ] as const) {
      await rebase(...args);
      const { error } = fileOf(await rig.reload(), 'chain.conf');
      expect(error).toMatchObject({
        code: 'CHAIN_BROKEN',
        message: expect.stringMatching(message) as string,
      });
    }
    await rebase('-F', 'qcow2', '-b', image);
    expect(fileOf(await rig.reload(), 'chain.conf').state).toBe('served');
    await rig.remove('chain.conf');
    await rig.reload();
  });

  test('a backing file without its format is refused', async () => {
    const child = directory.file('guess.qcow2');
    await makeImage(child, { pattern: 7, backing: image });
    const header = await readFile(child);
    // The extension that holds the format (qcow2.txt of QEMU) becomes one that nobody knows.
    const at = header.indexOf(Buffer.from('e2792aca', 'hex'));
    expect(at).toBeGreaterThan(0);
    header.writeUInt32BE(0x12345678, at);
    await writeFile(child, header);
    await rig.write('guess.conf', definition('guess', child));
    expect(fileOf(await rig.reload(), 'guess.conf').error).toEqual({
      code: 'CHAIN_BROKEN',
      message: `${child} does not state the format of its backing file`,
    });
    await rig.remove('guess.conf');
    await rig.reload();
  });

  test('a directory that cannot be listed takes nothing away', async () => {
    const aside = directory.file('aside');
    await rename(rig.exportsDirectory, aside);
    try {
      process.kill(rig.pid, 'SIGHUP');
      await expect
        .poll(async () => (await rig.status()).events.map(({ kind }) => kind), WAIT)
        .toContain('directory-unreadable');
      expect(await reads(rig.tcp('good'), 0x11)).toBe(true);
    } finally {
      await rename(aside, rig.exportsDirectory);
    }
    expect(fileOf(await rig.reload(), 'good.conf').state).toBe('served');
  });

  test('a hundred SIGHUPs in a second are few readings, and the last one counts', async () => {
    const before = (await rig.status()).generation;
    for (let i = 0; i < 100; i += 1) {
      if (i === 99) await rig.write('late.conf', definition('late', image));
      process.kill(rig.pid, 'SIGHUP');
    }
    await expect
      .poll(async () => (await rig.status()).files.map(({ file }) => file), WAIT)
      .toContain('late.conf');
    expect((await rig.reload()).generation - before).toBeLessThan(50);
    expect(await reads(rig.tcp('late'), 0x11)).toBe(true);
    await rig.remove('late.conf');
    await rig.reload();
  });
});

describe('starting', () => {
  let directory: LabDirectory;
  beforeAll(async () => {
    directory = await makeLabDirectory();
  });
  afterAll(() => directory[Symbol.asyncDispose]());

  test('a second daemon on the same directory is refused, and the first goes on', async () => {
    await using rig = await startExportd({ directory: directory.file('two') });
    const second = await tryExportd({ directory: directory.file('two') });
    expect(second).toMatchObject({
      exitCode: 1,
      output: expect.stringMatching(/CONFLICT: another/) as string,
    });
    const other = { exportsDirectory: rig.exportsDirectory };
    const third = await tryExportd({ directory: directory.file('three'), settings: other });
    expect(third.output).toMatch(/CONFLICT: another holdfast-exportd has the directory/);
    expect((await rig.reload()).pid).toBe(rig.pid);
  });

  test('a port or a socket that is taken is named, and nothing stays behind', async () => {
    const server = net.createServer().listen(0, '127.0.0.1');
    await once(server, 'listening');
    const { port } = server.address() as net.AddressInfo;
    try {
      const taken = await tryExportd({ directory: directory.file('taken'), port });
      expect(taken.exitCode).toBe(1);
      expect(taken.output).toMatch(new RegExp(`CONFLICT: cannot listen on 127.0.0.1 port ${port}`));
    } finally {
      server.close();
    }
    expect(await findLeftovers(directory.file('taken'))).toEqual([]);
  });

  test("another's socket, and a file that is none, are not removed", async () => {
    const socket = directory.file('busy.sock');
    const server = net.createServer().listen(socket);
    await once(server, 'listening');
    try {
      const busy = await tryExportd({
        directory: directory.file('busy'),
        settings: { unix: { path: socket } },
      });
      expect(busy.output).toMatch(/CONFLICT: another server listens/);
    } finally {
      server.close();
    }
    const file = directory.file('precious');
    await writeFile(file, 'data');
    const refused = await tryExportd({
      directory: directory.file('file'),
      settings: { unix: { path: file } },
    });
    expect(refused.output).toMatch(/CONFLICT: .* is no socket/);
    expect(await readFile(file, 'utf8')).toBe('data');
  });

  test('a stale pid file that names another process has it never signalled', async () => {
    const rig = await startExportd({ directory: directory.file('stale') });
    const place = { pidFile: rig.pidFile, statusFile: rig.statusFile };
    await rig.kill();
    await access(rig.statusFile);
    await using bystander = await startQemuNbd({
      image: '/dev/null',
      format: 'raw',
      socketPath: directory.file('by.sock'),
    });
    const status = JSON.parse(await readFile(rig.statusFile, 'utf8')) as Record<string, unknown>;
    await writeFile(rig.pidFile, `${bystander.pid}\n`);
    await expect(reloadExportDaemon(place, TOOL)).rejects.toMatchObject({
      code: 'EXPORT_DAEMON_UNAVAILABLE',
    });
    // The number of the dead daemon was given to somebody else.
    await writeFile(rig.statusFile, JSON.stringify({ ...status, pid: bystander.pid }));
    await expect(reloadExportDaemon(place, TOOL)).rejects.toMatchObject({
      code: 'EXPORT_DAEMON_UNAVAILABLE',
    });
    expect(bystander.hasExited).toBe(false);
    await using again = await startExportd({ directory: directory.file('stale') });
    expect((await again.reload()).pid).toBe(again.pid);
  });

  test('SIGTERM ends it cleanly, with nothing left', async () => {
    const rig = await startExportd({ directory: directory.file('clean') });
    process.kill(rig.pid, 'SIGTERM');
    expect(await rig.exited).toBe(0);
    await expect(access(rig.statusFile)).rejects.toThrow('ENOENT');
    await expect(access(rig.pidFile)).rejects.toThrow('ENOENT');
    expect(await findLeftovers(directory.file('clean'))).toEqual([]);
  });

  test.each([
    ['a public address without TLS', { tcp: { host: '0.0.0.0' } }, /not loopback/],
    ['every address of IPv6 without TLS', { tcp: { host: '::' } }, /not loopback/],
    ['a name that is looked up', { tcp: { host: 'example.org' } }, /IP address/],
    ['nothing to listen on', { tcp: null, unix: null }, /nothing would be served/],
    ['an unknown setting', { tpc: {} }, /tpc/],
    ['keys that are nowhere', { tcp: { tls: 'psk' } }, /keysFile/],
  ])('refuses %s', async (_what, settings, message) => {
    const refused = await tryExportd({ directory: directory.file('refused'), settings });
    expect(refused.exitCode).toBe(2);
    expect(refused.output).toMatch(message);
  });

  test('--check names what is wrong with files and serves nothing', async () => {
    const place = directory.file('check');
    await mkdir(path.join(place, 'exports.d'), { recursive: true });
    await makeImage(directory.file('c.qcow2'), { pattern: 1 });
    const config = path.join(place, 'exportd.yaml');
    await writeFile(
      config,
      JSON.stringify({ exportsDirectory: path.join(place, 'exports.d'), tcp: { port: await freePort() } }),
    );
    const good = `[one]\nexportname = ${directory.file('c.qcow2')}\nformat = qcow2\nreadonly = true\n`;
    await writeFile(path.join(place, 'exports.d/one.conf'), good);
    expect(await runExportd(['--config', config, '--check'])).toEqual({
      exitCode: 0,
      output: '1 files, 0 problems\n',
    });
    await writeFile(path.join(place, 'exports.d/two.conf'), good);
    const { exitCode, output } = await runExportd(['--config', config, '--check']);
    expect(exitCode).toBe(1);
    expect(output).toBe('two.conf: CONFLICT: the name one is taken by one.conf\n2 files, 1 problems\n');
  });
});
