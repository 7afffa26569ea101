import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { readFile, truncate, writeFile } from 'node:fs/promises';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { runTool } from '../../src/lib/process.js';
import { findLeftovers } from '../lab/leftovers.js';
import { makeLabDirectory, type LabDirectory } from '../lab/directory.js';
import { startQemuNbd } from '../lab/nbd-server.js';
import {
  definition,
  fileOf,
  makeImage,
  namesAt,
  readPidFile,
  reads,
  sizeAt,
  startExportd,
  type ExportdRig,
} from './rig.js';

const MIB = 1024 * 1024;
const TOOL = { timeoutMs: 20_000 };
const WAIT = { timeout: 10_000, interval: 20 };

describe('exports', () => {
  let directory: LabDirectory;
  let rig: ExportdRig;

  beforeAll(async () => {
    directory = await makeLabDirectory();
    await makeImage(directory.file('base.qcow2'), { pattern: 0x11, atMib: 0 });
    await makeImage(directory.file('middle.qcow2'), { pattern: 0x22, atMib: 1, backing: 'base.qcow2' });
    await makeImage(directory.file('top.qcow2'), { pattern: 0x33, atMib: 2, backing: 'middle.qcow2' });
    rig = await startExportd({ directory: directory.path });
  });
  afterAll(async () => {
    await rig.stop();
    const left = await findLeftovers(directory.path);
    await directory[Symbol.asyncDispose]();
    expect(left).toEqual([]);
  });

  test('a chain is served on the Unix socket and on the port, read through all its layers', async () => {
    await rig.write('chain.conf', definition('chain', directory.file('top.qcow2'), { sizeBytes: 16 * MIB }));
    const file = fileOf(await rig.reload(), 'chain.conf');
    expect(file).toMatchObject({
      state: 'served',
      sizeBytes: 16 * MIB,
      listeners: ['unix', 'tcp'],
      error: null,
    });
    for (const uri of [rig.unix('chain'), rig.tcp('chain')]) {
      expect(await sizeAt(uri)).toBe(16 * MIB);
      for (const [index, pattern] of [0x11, 0x22, 0x33, 0].entries()) {
        expect(await reads(uri, pattern, index)).toBe(true);
      }
    }
  });

  test('layers are open read-only: others read them at the same time, and clients cannot write', async () => {
    const image = directory.file('top.qcow2');
    await using other = await startQemuNbd({
      ...{ image, format: 'qcow2', isReadOnly: true },
      socketPath: directory.file('other.sock'),
    });
    expect(await reads(other.uri, 0x33, 2)).toBe(true);
    await rig.write('chain2.conf', definition('chain2', image));
    expect(fileOf(await rig.reload(), 'chain2.conf').state).toBe('served');
    const written = await runTool('qemu-io', ['-f', 'raw', '-c', 'write -P 9 0 4k', rig.tcp('chain2')], {
      ...TOOL,
      acceptExitCodes: [0, 1],
    });
    expect(written.exitCode).toBe(1);
    await rig.remove('chain2.conf');
    await rig.reload();
  });

  test('what is written through one address is read through the other, and is in the image', async () => {
    await makeImage(directory.file('work.qcow2'), { pattern: 1 });
    await rig.write('work.conf', definition('work', directory.file('work.qcow2'), { isReadOnly: false }));
    expect(fileOf(await rig.reload(), 'work.conf').listeners).toEqual(['unix', 'tcp']);
    await runTool(
      'qemu-io',
      ['-f', 'raw', '-c', 'write -P 0x55 1M 1M', '-c', 'flush', rig.tcp('work')],
      TOOL,
    );
    expect(await reads(rig.unix('work'), 0x55, 1)).toBe(true);
    await runTool('qemu-io', ['-f', 'raw', '-c', 'write -P 0x66 2M 1M', rig.unix('work')], TOOL);
    expect(await reads(rig.tcp('work'), 0x66, 2)).toBe(true);
    await runTool(
      'qemu-io',
      ['-f', 'raw', '-c', 'write -z 0 1M', '-c', 'discard 5M 1M', rig.tcp('work')],
      TOOL,
    );
    expect(await reads(rig.unix('work'), 0, 0)).toBe(true);
    await rig.remove('work.conf');
    await rig.reload();
    const { stdout } = await runTool(
      'qemu-io',
      [
        '-r',
        '-f',
        'qcow2',
        '-c',
        'read -P 0x55 1M 1M',
        '-c',
        'read -P 0x66 2M 1M',
        directory.file('work.qcow2'),
      ],
      TOOL,
    );
    expect(stdout).not.toMatch(/failed/);
    await runTool('qemu-img', ['check', '-q', '-f', 'qcow2', directory.file('work.qcow2')], TOOL);
  });

  test('a raw file has whole sectors, and a stated size is checked', async () => {
    const raw = directory.file('odd.raw');
    await writeFile(raw, '');
    await truncate(raw, 1_000_001);
    await rig.write('odd.conf', definition('odd', raw, { format: 'raw', sizeBytes: 1_000_001 }));
    await rig.write('odd2.conf', definition('odd2', raw, { format: 'raw', sizeBytes: 999_000 }));
    const status = await rig.reload();
    expect(fileOf(status, 'odd.conf')).toMatchObject({ state: 'served', sizeBytes: 1_000_448 });
    expect(await sizeAt(rig.tcp('odd'))).toBe(1_000_448);
    expect(fileOf(status, 'odd2.conf').error?.code).toBe('SOURCE_SIZE_MISMATCH');
    expect(await namesAt(rig.tcp(''))).not.toContain('odd2');
  });

  test('a block device is served', async () => {
    const raw = directory.file('disk.raw');
    await writeFile(raw, Buffer.alloc(4 * MIB, 0x77));
    const { stdout } = await runTool('losetup', ['--find', '--show', raw], TOOL);
    const device = stdout.trim();
    try {
      await rig.write('dev.conf', definition('dev', device, { format: 'raw', sizeBytes: 4 * MIB }));
      expect(fileOf(await rig.reload(), 'dev.conf')).toMatchObject({ state: 'served', error: null });
      expect(await reads(rig.tcp('dev'), 0x77, 3)).toBe(true);
    } finally {
      await rig.remove('dev.conf');
      await rig.reload();
      await runTool('losetup', ['--detach', device], TOOL);
    }
  });

  test('adding, changing and removing other exports leaves a client and its process alone', async () => {
    const before = await rig.status();
    const client = spawn('qemu-io', ['-r', '-f', 'raw', rig.tcp('chain')], {
      stdio: ['pipe', 'pipe', 'inherit'],
    });
    let said = '';
    client.stdout.on('data', (chunk: Buffer) => (said += chunk.toString()));
    const isOut = once(client, 'close');
    client.stdin.write('read -P 0x11 0 1M\n');
    await expect.poll(() => said, WAIT).toMatch(/read 1048576/);
    await rig.write('added.conf', definition('added', directory.file('middle.qcow2')));
    await rig.reload();
    expect(await reads(rig.tcp('added'), 0x22, 1)).toBe(true);
    await rig.write(
      'added.conf',
      definition('added', directory.file('base.qcow2'), { description: 'other' }),
    );
    const changed = fileOf(await rig.reload(), 'added.conf');
    expect(changed).toMatchObject({ description: 'other', state: 'served' });
    expect(await reads(rig.tcp('added'), 0, 1)).toBe(true);
    await rig.remove('added.conf');
    const after = await rig.reload();
    expect(after.files.map(({ file }) => file)).not.toContain('added.conf');
    await expect(sizeAt(rig.tcp('added'))).rejects.toThrow();
    await expect(sizeAt(rig.unix('added'))).rejects.toThrow();
    client.stdin.end('read -P 0x33 2M 1M\nquit\n');
    await isOut;
    expect(said).not.toMatch(/failed/i);
    expect(said.match(/read 1048576\/1048576/g)).toHaveLength(2);
    expect(after.pid).toBe(before.pid);
    expect(await readPidFile(rig.pidFile)).toBe(before.pid);
    expect(after.listeners.map(({ pid }) => pid)).toEqual(before.listeners.map(({ pid }) => pid));
  });

  test('an export that is removed under its client ends that client alone', async () => {
    await rig.write('gone.conf', definition('gone', directory.file('base.qcow2')));
    await rig.reload();
    const uris = [rig.tcp('gone'), rig.tcp('chain')];
    const clients = uris.map((uri) =>
      spawn('qemu-io', ['-r', '-f', 'raw', uri], { stdio: ['pipe', 'pipe', 'pipe'] }),
    );
    const outputs = clients.map((client) => {
      const output = { text: '' };
      for (const stream of [client.stdout, client.stderr]) {
        stream.on('data', (chunk: Buffer) => (output.text += chunk.toString()));
      }
      client.stdin.write('read -P 0x11 0 1M\n');
      return output;
    });
    const ends = clients.map((client) => once(client, 'close'));
    await expect.poll(() => outputs.every(({ text }) => /read 1048576/.test(text)), WAIT).toBe(true);
    await rig.remove('gone.conf');
    await rig.reload();
    for (const client of clients) client.stdin.end('read -P 0x11 0 1M\nquit\n');
    await Promise.all(ends);
    expect(outputs[0]?.text).toMatch(/read failed/);
    expect(outputs[1]?.text).not.toMatch(/failed/);
  });

  test('a comment in a file changes nothing for its clients', async () => {
    const text = await readFile(`${rig.exportsDirectory}/chain.conf`, 'utf8');
    const client = spawn('qemu-io', ['-r', '-f', 'raw', rig.unix('chain')], {
      stdio: ['pipe', 'pipe', 'inherit'],
    });
    let said = '';
    client.stdout.on('data', (chunk: Buffer) => (said += chunk.toString()));
    const isOut = once(client, 'close');
    client.stdin.write('read -P 0x11 0 1M\n');
    await expect.poll(() => said, WAIT).toMatch(/read 1048576/);
    const before = fileOf(await rig.status(), 'chain.conf');
    await rig.write('chain.conf', `# looked at by an administrator\n${text}`);
    const after = fileOf(await rig.reload(), 'chain.conf');
    expect(after).toEqual({ ...before, digest: after.digest });
    expect(after.digest).not.toBe(before.digest);
    client.stdin.end('read -P 0x11 0 1M\nquit\n');
    await isOut;
    expect(said).not.toMatch(/failed/i);
  });
});
