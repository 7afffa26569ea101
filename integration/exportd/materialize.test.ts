import { mkdir } from 'node:fs/promises';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import type { ExportDefinition, MaterializeStatus } from '../../src/exports/index.js';
import { runTool } from '../../src/lib/process.js';
import { findLeftovers } from '../lab/leftovers.js';
import { makeLabDirectory, type LabDirectory } from '../lab/directory.js';
import { freePort } from '../lab/port.js';
import { startSlowFile } from '../lab/slow-file.js';
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
import { makeKeys } from './tls.js';

const MIB = 1024 * 1024;
const TOOL = { timeoutMs: 20_000 };
const WAIT = { timeout: 20_000, interval: 20 };
const MIBS = 24;

let directory: LabDirectory;
let rig: ExportdRig;

beforeEach(async () => {
  directory = await makeLabDirectory();
  await makeImage(directory.file('fast.qcow2'), { pattern: 0x11, sizeMib: MIBS });
  await io(directory.file('fast.qcow2'), `write -q -P 0x11 0 ${MIBS}M`);
});
afterEach(async () => {
  await rig.stop();
  const left = await findLeftovers(directory.path);
  await directory[Symbol.asyncDispose]();
  expect(left).toEqual([]);
});

function io(file: string, ...commands: string[]) {
  return runTool('qemu-io', ['-f', 'qcow2', ...commands.flatMap((command) => ['-c', command]), file], TOOL);
}

async function backingOf(image: string): Promise<string | undefined> {
  const { stdout } = await runTool('qemu-img', ['info', '-U', '-f', 'qcow2', '--output=json', image], TOOL);
  return (JSON.parse(stdout) as { 'backing-filename'?: string })['backing-filename'];
}

/** `overlay.qcow2` on `middle.qcow2` on a base: MiB 0 of each layer is its own, the rest is the base's. */
async function makeChain(base: string): Promise<string> {
  await makeImage(directory.file('middle.qcow2'), { pattern: 0x22, atMib: 1, backing: base });
  await makeImage(directory.file('overlay.qcow2'), { pattern: 0x33, atMib: 2, backing: 'middle.qcow2' });
  return directory.file('overlay.qcow2');
}

/** Takes some seconds to be read. */
function startSlowBase(bytesPerSecond = 8 * MIB) {
  const [content, file] = [directory.file('fast.qcow2'), directory.file('slow.qcow2')];
  return startSlowFile({ content, file, bytesPerSecond });
}

function overlay(more: Partial<ExportDefinition> = {}): ExportDefinition {
  return definition('disk', directory.file('overlay.qcow2'), { isReadOnly: false, ...more });
}

async function serve(image: ExportDefinition): Promise<MaterializeStatus | null> {
  await rig.write('disk.conf', image);
  const file = fileOf(await rig.reload(), 'disk.conf');
  expect(file.error).toBeNull();
  return file.materialize;
}

async function progress(): Promise<MaterializeStatus | null> {
  return fileOf(await rig.status(), 'disk.conf').materialize;
}

async function untilCompleted(): Promise<void> {
  await expect.poll(progress, WAIT).toEqual({
    state: 'completed',
    ...{ doneBytes: MIBS * MIB, totalBytes: MIBS * MIB, error: null },
  });
}

async function untilBegun(): Promise<void> {
  await expect.poll(async () => (await progress())?.doneBytes, WAIT).toBeGreaterThan(2 * MIB);
  expect((await progress())?.state).toBe('running');
}

/** Through whatever names it; the whole disk. */
async function expectContent(uri: string): Promise<void> {
  for (const [index, pattern] of [0x11, 0x22, 0x33, 0x11].entries()) {
    expect(await reads(uri, pattern, index)).toBe(true);
  }
  expect(await reads(uri, 0x11, MIBS - 1)).toBe(true);
}

describe('an image that is to stand alone', () => {
  test('takes up its chain while clients write and read, who notice nothing', async () => {
    await using _slow = await startSlowBase(4 * MIB);
    const image = await makeChain('slow.qcow2');
    rig = await startExportd({ directory: directory.path });
    expect(await serve(overlay())).toBeNull();
    const { listeners } = await rig.status();
    await using writer = await connect(rig.tcp('disk'));
    await using reader = await connect(rig.unix('disk'));
    expect(await serve(overlay({ materialize: true }))).toMatchObject({
      ...{ state: 'running', totalBytes: MIBS * MIB, error: null },
    });
    const seen = new Set<number>();
    let written = 0;
    for (let state = 'running'; state === 'running'; written += 1) {
      await writer.pwrite(4 * MIB + (written % 256) * 65_536, Buffer.alloc(65_536, (written % 256) + 1));
      expect((await reader.pread(2 * MIB, 4096)).equals(Buffer.alloc(4096, 0x33))).toBe(true);
      const now = (await progress())!;
      seen.add(now.doneBytes);
      state = now.state;
    }
    await untilCompleted();
    expect([...seen].filter((bytes) => bytes > 0 && bytes < MIBS * MIB)).not.toEqual([]);
    expect((await rig.status()).listeners).toEqual(listeners);
    await writer.flush();
    expect(written).toBeGreaterThan(10);
    for (let index = 0; index < Math.min(written, 256); index += 1) {
      const round = Math.floor((written - 1 - index) / 256) * 256 + index;
      const data = await reader.pread(4 * MIB + index * 65_536, 4096);
      expect(data.equals(Buffer.alloc(4096, (round % 256) + 1))).toBe(true);
    }
    await expectContent(rig.tcp('disk'));
    expect(await backingOf(image)).toBeUndefined();
    // Nobody has the chain open any more: it can be written to, and the disk does not see it.
    await io(directory.file('middle.qcow2'), 'write -q -P 0x99 1M 1M');
    expect(await reads(rig.unix('disk'), 0x22, 1)).toBe(true);
  });

  test('is whole from the moment it is called completed, also when everything is killed then', async () => {
    const image = await makeChain('fast.qcow2');
    rig = await startExportd({ directory: directory.path });
    await serve(overlay({ materialize: true }));
    const daemon = (await rig.status()).listeners[0]!.pid!;
    await untilCompleted();
    process.kill(daemon, 'SIGKILL');
    await rig.kill();
    expect(await backingOf(image)).toBeUndefined();
    const reference = directory.file('reference.qcow2');
    await makeImage(reference, { pattern: 0x33, atMib: 2, backing: 'middle.qcow2' });
    await runTool('qemu-img', ['compare', '-q', '-f', 'qcow2', '-F', 'qcow2', image, reference], TOOL);
    await runTool('qemu-img', ['check', '-q', '-f', 'qcow2', image], TOOL);
    rig = await startExportd({ directory: directory.path, port: rig.port });
    await untilCompleted();
    await expectContent(rig.tcp('disk'));
  });

  test('stays what it was when the key is taken away, and goes on when it is set again', async () => {
    await using _slow = await startSlowBase();
    const image = await makeChain('slow.qcow2');
    rig = await startExportd({ directory: directory.path });
    await serve(overlay({ materialize: true }));
    await using client = await connect(rig.unix('disk'));
    await untilBegun();
    const startMs = performance.now();
    expect(await serve(overlay())).toBeNull();
    expect(performance.now() - startMs).toBeLessThan(2000);
    expect(await backingOf(image)).toBe('middle.qcow2');
    expect((await client.pread(MIB, 512)).equals(Buffer.alloc(512, 0x22))).toBe(true);
    expect((await serve(overlay({ materialize: true })))?.state).toBe('running');
    await untilCompleted();
    await expectContent(rig.unix('disk'));
  });

  test('goes on by itself when its storage daemon died', async () => {
    await using _slow = await startSlowBase();
    await makeChain('slow.qcow2');
    rig = await startExportd({ directory: directory.path });
    await serve(overlay({ materialize: true }));
    await untilBegun();
    process.kill((await rig.status()).listeners[0]!.pid!, 'SIGKILL');
    await untilCompleted();
    expect((await rig.status()).listeners.map(({ restarts }) => restarts)).toEqual([1, 0]);
    await expectContent(rig.tcp('disk'));
  });

  test.each(['stop', 'kill'] as const)('goes on after a %s of the export daemon', async (end) => {
    await using _slow = await startSlowBase();
    const image = await makeChain('slow.qcow2');
    rig = await startExportd({ directory: directory.path });
    await serve(overlay({ materialize: true }));
    await untilBegun();
    const startMs = performance.now();
    await rig[end]();
    expect(performance.now() - startMs).toBeLessThan(3000);
    expect(await backingOf(image)).toBe('middle.qcow2');
    rig = await startExportd({ directory: directory.path, port: rig.port });
    expect((await progress())?.state).toBe('running');
    await untilCompleted();
    await expectContent(rig.tcp('disk'));
  });

  test('whose chain goes bad has the reason, and is not called complete', async () => {
    const slow = await startSlowBase(2 * MIB);
    await makeChain('slow.qcow2');
    rig = await startExportd({ directory: directory.path });
    await serve(overlay({ materialize: true }));
    await untilBegun();
    await slow[Symbol.asyncDispose]();
    await expect.poll(async () => (await progress())?.state, WAIT).toBe('failed');
    const failed = await progress();
    expect(failed?.error).toMatchObject({ code: 'TOOL_FAILED' });
    expect(failed?.error?.message).toMatch(/^QEMU cannot copy: (Transport endpoint|Software caused)/);
    expect(failed?.doneBytes).toBeLessThan(MIBS * MIB);
    // A reading of the directory for another's sake does not hide it.
    expect(fileOf(await rig.reload(), 'disk.conf').materialize).toEqual(failed);
    expect(await backingOf(directory.file('overlay.qcow2'))).toBe('middle.qcow2');
    expect(await reads(rig.tcp('disk'), 0x33, 2)).toBe(true);
    expect(await serve(overlay())).toBeNull();
  });

  test('is let go when its export is removed meanwhile', async () => {
    await using _slow = await startSlowBase();
    const image = await makeChain('slow.qcow2');
    rig = await startExportd({ directory: directory.path });
    await serve(overlay({ materialize: true }));
    await untilBegun();
    await rig.remove('disk.conf');
    expect((await rig.reload()).files).toEqual([]);
    expect(await namesAt(rig.unix(''))).toEqual([]);
    await io(image, 'write -q -P 0x44 3M 1M');
    await runTool('qemu-img', ['check', '-q', '-f', 'qcow2', image], TOOL);
  });

  test('may be an export with an identity', async () => {
    await mkdir(directory.file('identities'));
    const keys = await makeKeys(directory.file('identities/agent.psk'), 'agent');
    await makeChain('fast.qcow2');
    const identitiesDirectory = directory.file('identities');
    rig = await startExportd({
      directory: directory.path,
      settings: { tls: { psk: { identitiesDirectory } } },
    });
    const port = await freePort();
    const own = { identity: { kind: 'psk' as const, user: 'agent' }, at: { port } };
    await serve(overlay({ own, materialize: true }));
    await untilCompleted();
    expect(await sizeAt(`nbds://agent@127.0.0.1:${port}/disk?tls-psk-file=${keys}`)).toBe(MIBS * MIB);
    expect(await backingOf(directory.file('overlay.qcow2'))).toBeUndefined();
  });
});
