import { spawn } from 'node:child_process';
import { once } from 'node:events';
import net from 'node:net';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { processStartTime, runTool } from '../../src/lib/process.js';
import { findLeftovers } from '../lab/leftovers.js';
import { makeLabDirectory, type LabDirectory } from '../lab/directory.js';
import {
  connect,
  definition,
  fileOf,
  makeImage,
  namesAt,
  reads,
  sizeAt,
  startExportd,
  type ExportdRig,
} from './rig.js';

const WAIT = { timeout: 10_000, interval: 20 };

/** An interactive client: tell it commands, see what it says. */
function startClient(uri: string, ...args: string[]) {
  const child = spawn('qemu-io', ['-f', 'raw', ...args, uri], { stdio: ['pipe', 'pipe', 'pipe'] });
  let said = '';
  for (const stream of [child.stdout, child.stderr])
    stream.on('data', (chunk: Buffer) => (said += chunk.toString()));
  const closed = once(child, 'close');
  return {
    said: () => said,
    tell: async (command: string, answer: RegExp) => {
      child.stdin.write(`${command}\n`);
      await expect.poll(() => said, WAIT).toMatch(answer);
    },
    end: async (...commands: string[]) => {
      child.stdin.end(`${[...commands, 'quit'].join('\n')}\n`);
      await closed;
      return said;
    },
  };
}

describe('supervision', () => {
  let directory: LabDirectory;
  let rig: ExportdRig;

  beforeEach(async () => {
    directory = await makeLabDirectory();
    await makeImage(directory.file('disk.qcow2'), { pattern: 0x11 });
    await makeImage(directory.file('work.qcow2'), { pattern: 0x22 });
    rig = await startExportd({ directory: directory.path });
    await rig.write('disk.conf', definition('disk', directory.file('disk.qcow2')));
    await rig.write('work.conf', definition('work', directory.file('work.qcow2'), { isReadOnly: false }));
    await rig.reload();
  });
  afterEach(async () => {
    if (!(await hasEnded(rig.pid))) await rig.stop();
    const left = await findLeftovers(directory.path);
    await directory[Symbol.asyncDispose]();
    expect(left).toEqual([]);
  });

  async function hasEnded(pid: number): Promise<boolean> {
    return (await processStartTime(pid)) === undefined;
  }

  async function daemonOf(listener: string): Promise<number> {
    return (await rig.status()).listeners.find(({ id }) => id === listener)!.pid!;
  }

  async function namesOrNone(uri: string): Promise<string[]> {
    try {
      return await namesAt(uri);
    } catch {
      return [];
    }
  }

  test.each(['unix', 'tcp'])(
    'the storage daemon of %s that dies is back with every export',
    async (listener) => {
      const other = startClient(listener === 'unix' ? rig.tcp('disk') : rig.unix('disk'), '-r');
      await other.tell('read -P 0x11 0 1M', /read 1048576/);
      const uri = listener === 'unix' ? rig.unix('') : rig.tcp('');
      process.kill(await daemonOf(listener), 'SIGKILL');
      const killedAt = performance.now();
      await expect.poll(() => namesOrNone(uri), WAIT).toEqual(['disk', 'work']);
      expect(performance.now() - killedAt).toBeLessThan(1500);
      const status = await rig.reload();
      expect(status.pid).toBe(rig.pid);
      expect(status.events.map(({ kind, listener: at }) => `${kind} ${String(at)}`)).toEqual([
        `storage-daemon-ended ${listener}`,
        `storage-daemon-restarted ${listener}`,
      ]);
      expect(status.listeners.find(({ id }) => id === listener)).toMatchObject({ state: 'up', restarts: 1 });
      expect(fileOf(status, 'work.conf').listeners).toEqual(['unix', 'tcp']);
      expect(await reads(rig.tcp('work'), 0x22)).toBe(true);
      expect(await reads(rig.unix('work'), 0x22)).toBe(true);
      expect(await other.end('read -P 0x11 0 1M')).not.toMatch(/failed/);
    },
  );

  test('a writer sees the death of the daemon that had its image, also through the other address', async () => {
    await using writer = await connect(rig.tcp('work'));
    await writer.pwrite(1024 * 1024, Buffer.alloc(65_536, 0x33));
    process.kill(await daemonOf('unix'), 'SIGKILL');
    await expect.poll(() => namesOrNone(rig.unix('')), WAIT).toEqual(['disk', 'work']);
    await rig.reload();
    // What it wrote may be lost: a flush that succeeds now would be a lie.
    await expect(writer.flush()).rejects.toThrow();
    expect(await reads(rig.tcp('work'), 0x22)).toBe(true);
  });

  test('SIGTERM under a writer flushes and closes what it wrote', async () => {
    await using writer = await connect(rig.tcp('work'));
    await writer.pwrite(1024 * 1024, Buffer.alloc(1024 * 1024, 0x44));
    await rig.stop();
    await expect(writer.pread(0, 512)).rejects.toThrow();
    const image = directory.file('work.qcow2');
    await runTool('qemu-img', ['check', '-q', '-f', 'qcow2', image], { timeoutMs: 20_000 });
    const args = ['-r', '-f', 'qcow2', '-c', 'read -P 0x44 1M 1M', image];
    const { stdout } = await runTool('qemu-io', args, { timeoutMs: 20_000 });
    expect(stdout).toMatch(/^read 1048576/m);
  });

  test('a killed export daemon takes its children along, and the next one serves all again', async () => {
    const children = (await rig.status()).listeners.map(({ pid }) => pid!);
    await rig.kill();
    await expect
      .poll(async () => (await Promise.all(children.map(hasEnded))).every(Boolean), WAIT)
      .toBe(true);
    rig = await startExportd({ directory: directory.path, port: rig.port });
    expect(await namesAt(rig.tcp(''))).toEqual(['disk', 'work']);
    expect(await reads(rig.unix('work'), 0x22)).toBe(true);
  });

  test('a port that another took meanwhile is tried until it is free; the socket serves on', async () => {
    const status = await rig.status();
    const daemon = status.listeners.find(({ id }) => id === 'tcp')!.pid!;
    // The thief waits for the port without ever letting go: it is quicker than the restart.
    process.kill(rig.pid, 'SIGSTOP');
    process.kill(daemon, 'SIGKILL');
    const thief = net.createServer();
    await expect
      .poll(
        () =>
          new Promise<string>((resolve) => {
            thief.once('error', (error) => resolve(error.message));
            thief.listen(rig.port, '127.0.0.1', () => resolve('listening'));
          }),
        WAIT,
      )
      .toBe('listening');
    process.kill(rig.pid, 'SIGCONT');
    try {
      await expect
        .poll(async () => (await rig.status()).events.map(({ kind }) => kind), WAIT)
        .toContain('restart-failed');
      const down = (await rig.status()).listeners.find(({ id }) => id === 'tcp');
      expect(down).toMatchObject({ state: 'down', pid: null, error: { code: 'CONFLICT' } });
      expect(await sizeAt(rig.unix('disk'))).toBe(16 * 1024 * 1024);
      await rig.remove('work.conf');
      expect(fileOf(await rig.reload(), 'disk.conf').listeners).toEqual(['unix']);
    } finally {
      thief.close();
    }
    await expect.poll(() => namesOrNone(rig.tcp('')), WAIT).toEqual(['disk']);
  });
});
