import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { readFile } from 'node:fs/promises';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { pause } from '../../src/lib/deadline.js';
import { runTool } from '../../src/lib/process.js';
import { findLeftovers } from '../lab/leftovers.js';
import { makeLabDirectory, type LabDirectory } from '../lab/directory.js';
import { startQemuNbd } from '../lab/nbd-server.js';
import {
  connect,
  definition,
  fileOf,
  makeImage,
  namesAt,
  sizeAt,
  startExportd,
  type ExportdRig,
} from './rig.js';

const MANY = { timeoutMs: 120_000 };
const MIB = 1024 * 1024;
const CHUNK = 256 * 1024;
/** Of the time of a plain qemu-nbd. */
const LIMIT = 1.05;

/** Numbered images of one MiB of data, and export files of some of them. */
async function makeImages(directory: LabDirectory, count: number): Promise<void> {
  await makeImage(directory.file('image-0.qcow2'), { pattern: 0x11, sizeMib: 4 });
  for (let number = 1; number < count; number += 1) {
    await runTool(
      'cp',
      ['--reflink=auto', directory.file('image-0.qcow2'), directory.file(`image-${number}.qcow2`)],
      MANY,
    );
  }
}

describe('figures of the export daemon', () => {
  let directory: LabDirectory;
  let rig: ExportdRig;
  const image = (number: number) => directory.file(`image-${number}.qcow2`);
  const add = (number: number) => rig.write(`e${number}.conf`, definition(`e${number}`, image(number)));

  beforeAll(async () => {
    directory = await makeLabDirectory();
    await makeImages(directory, 550);
    rig = await startExportd({ directory: directory.path });
  }, 120_000);
  afterAll(async () => {
    await rig.stop();
    const left = await findLeftovers(directory.path);
    await directory[Symbol.asyncDispose]();
    expect(left).toEqual([]);
  });

  test('one export more among 200 is visible within 200 ms of SIGHUP', async () => {
    for (let number = 0; number < 200; number += 1) await add(number);
    await rig.reload();
    const times: number[] = [];
    for (let number = 200; number < 205; number += 1) {
      await add(number);
      const startMs = performance.now();
      const { files } = await rig.reload();
      times.push(performance.now() - startMs);
      expect(files).toHaveLength(number + 1);
      expect(await sizeAt(rig.tcp(`e${number}`))).toBe(4 * MIB);
    }
    console.log(`SIGHUP to visible among 200: ${times.map((time) => time.toFixed(0)).join(', ')} ms`);
    expect(times.sort((a, b) => a - b)[2]).toBeLessThan(200);
  });

  test('a storage daemon that dies is back with every export within a second', async () => {
    const { listeners, events } = await rig.status();
    const startMs = performance.now();
    process.kill(listeners.find(({ id }) => id === 'tcp')!.pid!, 'SIGKILL');
    await expect
      .poll(async () => (await rig.status()).events.length, { timeout: 10_000, interval: 10 })
      .toBe(events.length + 2);
    const tookMs = performance.now() - startMs;
    console.log(`storage daemon back with 205 exports: ${tookMs.toFixed(0)} ms`);
    expect(await namesAt(rig.tcp(''))).toHaveLength(205);
    expect(tookMs).toBeLessThan(1000);
  });

  test('500 exports on one port; a restart serves them all within 3 s', async () => {
    for (let number = 205; number < 500; number += 1) await add(number);
    const startMs = performance.now();
    const status = await rig.reload();
    const addedMs = performance.now() - startMs;
    expect(status.files.filter(({ state }) => state === 'served')).toHaveLength(500);
    expect(await namesAt(rig.tcp(''))).toHaveLength(500);
    const resident = await Promise.all(status.listeners.map(({ pid }) => residentMib(pid!)));
    await rig.stop();
    const restartMs = performance.now();
    rig = await startExportd({ directory: directory.path, port: rig.port });
    const restartedMs = performance.now() - restartMs;
    const listed = await namesAt(rig.tcp(''));
    console.log(
      `295 added in ${addedMs.toFixed(0)} ms; restart with 500: ${restartedMs.toFixed(0)} ms; ` +
        `resident ${resident.join(' and ')} MiB`,
    );
    expect(listed).toHaveLength(500);
    expect(restartedMs).toBeLessThan(3000);
  });

  test('64 clients copy while 50 are added, 50 removed, 50 changed: none of them sees an error', async () => {
    const before = await rig.status();
    const isOver = { value: false };
    let bytes = 0;
    // Of exports that nothing is done to, half of them on each address.
    const clients = Array.from({ length: 64 }, async (_unused, index) => {
      await using client = await connect(index % 2 === 0 ? rig.tcp(`e${index}`) : rig.unix(`e${index}`));
      while (!isOver.value) {
        for (let at = 0; at < 4 * MIB; at += CHUNK) {
          const data = await client.pread(at, CHUNK);
          if (data[0] !== (at < MIB ? 0x11 : 0)) throw new Error(`e${index} read wrong bytes`);
          bytes += CHUNK;
        }
        await pause(20);
      }
    });
    const watched = Promise.all(clients);
    for (let step = 0; step < 10; step += 1) {
      for (let i = step * 5; i < step * 5 + 5; i += 1) {
        await add(500 + i);
        await rig.remove(`e${400 + i}.conf`);
        const changed = 300 + i;
        await rig.write(
          `e${changed}.conf`,
          definition(`e${changed}`, image(100), { description: `${step}` }),
        );
      }
      await rig.reload();
    }
    isOver.value = true;
    await watched;
    const after = await rig.status();
    expect(after.files.filter(({ state }) => state === 'served')).toHaveLength(500);
    expect(after.pid).toBe(before.pid);
    expect(after.listeners).toEqual(before.listeners);
    console.log(`read under 150 changes: ${Math.round(bytes / MIB)} MiB`);
    expect(bytes).toBeGreaterThan(64 * 4 * MIB);
    const names = await namesAt(rig.tcp(''));
    expect(names).toContain('e549');
    expect(names).not.toContain('e400');
    expect(fileOf(after, 'e349.conf').description).toBe('9');
  });

  test('300 clients at once on the port are all answered, and one more', async () => {
    const clients = await Promise.all(Array.from({ length: 300 }, () => connect(rig.tcp('e0'))));
    try {
      const first = await Promise.all(clients.map((client) => client.pread(0, 4096)));
      expect(first.every((data) => data.equals(Buffer.alloc(4096, 0x11)))).toBe(true);
      expect(await sizeAt(rig.tcp('e0'))).toBe(4 * MIB);
    } finally {
      await Promise.all(clients.map((client) => client.close()));
    }
  });
});

describe('the speed of a chain', () => {
  test('three layers through an export are read as fast as through qemu-nbd', async () => {
    await using directory = await makeLabDirectory();
    const mib = 768;
    await makeLayer(directory.file('a.qcow2'), mib, [0, 512]);
    await makeLayer(directory.file('b.qcow2'), mib, [256, 384], 'a.qcow2');
    await makeLayer(directory.file('c.qcow2'), mib, [512, 768], 'b.qcow2');
    await using plain = await startQemuNbd({
      ...{ image: directory.file('c.qcow2'), format: 'qcow2', isReadOnly: true },
      socketPath: directory.file('plain.sock'),
    });
    await using rig = await startExportd({ directory: directory.path });
    await rig.write('c.conf', definition('c', directory.file('c.qcow2')));
    expect(fileOf(await rig.reload(), 'c.conf').state).toBe('served');
    const ratio = await compare(rig.unix('c'), plain.uri);
    console.log(`export ÷ qemu-nbd over a Unix socket: ${ratio.toFixed(3)}`);
    expect(ratio).toBeLessThan(LIMIT);
  }, 120_000);
});

const ROUNDS = 21;

/** How much longer one copy takes than the other, by the medians of copies made in turns. */
async function compare(one: string, other: string): Promise<number> {
  const mine: number[] = [];
  const plain: number[] = [];
  for (let round = 0; round < ROUNDS; round += 1) {
    const turns = [[one, mine] as const, [other, plain] as const];
    for (const [uri, times] of round % 2 === 0 ? turns : turns.reverse()) {
      const startMs = performance.now();
      const { exitCode, stderr } = await copyToNull(uri);
      expect(`${exitCode} ${stderr}`).toBe('0 ');
      times.push(performance.now() - startMs);
    }
  }
  return median(mine) / median(plain);
}

function median(times: readonly number[]): number {
  return [...times].sort((a, b) => a - b)[Math.floor(times.length / 2)] ?? NaN;
}

async function makeLayer(
  file: string,
  mib: number,
  [from, to]: [number, number],
  backing?: string,
): Promise<void> {
  const base = backing === undefined ? [] : ['-b', backing, '-F', 'qcow2'];
  await runTool('qemu-img', ['create', '-q', '-f', 'qcow2', ...base, file, `${mib}M`], MANY);
  const writes = Array.from({ length: (to - from) / 64 }, (_unused, index) => [
    ...['-c', `write -q -P ${index + 1} ${from + index * 64}M 64M`],
  ]);
  await runTool('qemu-io', ['-f', 'qcow2', ...writes.flat(), file], MANY);
}

async function copyToNull(uri: string): Promise<{ exitCode: number | null; stderr: string }> {
  const child = spawn('nbdcopy', [uri, 'null:'], { stdio: ['ignore', 'ignore', 'pipe'] });
  let stderr = '';
  child.stderr.on('data', (chunk: Buffer) => (stderr += chunk.toString()));
  const [exitCode] = (await once(child, 'close')) as [number | null];
  return { exitCode, stderr };
}

async function residentMib(pid: number): Promise<number> {
  const status = await readFile(`/proc/${pid}/status`, 'utf8');
  return Math.round(Number(/^VmRSS:\s+(\d+)/m.exec(status)?.[1]) / 1024);
}
