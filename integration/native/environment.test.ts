import { writeFile } from 'node:fs/promises';
import path from 'node:path';
import { afterAll, afterEach, beforeAll, beforeEach, expect, test } from 'vitest';
import { runTool, ToolError } from '../../src/lib/process.js';
import { makeRaw } from '../lab/disk-image.js';
import { makeLabDirectory, type LabDirectory } from '../lab/directory.js';
import { startNbdkit, startQemuNbd, type LabNbdServer } from '../lab/nbd-server.js';

const MIB = 1024 * 1024;
const DOOR = path.resolve(import.meta.dirname, '../../native/lib/index.ts');
const ROOT = path.resolve(import.meta.dirname, '../..');
/** The children run under the sanitizers when these tests do. */
const SANITIZER = ['LD_PRELOAD', 'ASAN_OPTIONS', 'UBSAN_OPTIONS'].flatMap((name) => {
  const value = process.env[name];
  return value === undefined ? [] : [`${name}=${value}`];
});
/** No cache that other processes, and workers beside each other, read and write at the same time. */
const ALONE = ['TSX_DISABLE_CACHE=1'];
let lab: LabDirectory;
let server: LabNbdServer;
let count = 0;

beforeAll(async () => {
  lab = await makeLabDirectory();
  await makeRaw({
    path: lab.file('disk.raw'),
    sizeBytes: 64 * MIB,
    regions: [{ offset: 0, length: 8 * MIB }],
  });
});
/** One for each test: nbdkit 1.32 aborts when a client with several requests under way vanishes. */
beforeEach(async () => {
  server = await startNbdkit({
    socketPath: lab.file(`n${count++}.sock`),
    plugin: ['file', lab.file('disk.raw')],
    filters: ['delay'],
    parameters: ['rdelay=20ms'],
  });
});
afterEach(async () => {
  await server.stop();
});
afterAll(async () => {
  await lab[Symbol.asyncDispose]();
});

const PRELUDE = (): string => `
import { Worker, isMainThread, parentPort } from 'node:worker_threads';
import { readdirSync } from 'node:fs';
import { tsImport } from ${JSON.stringify(path.join(ROOT, 'node_modules/tsx/dist/esm/api/index.mjs'))};
// A worker has no loader of its own.
const { connectNbd, openCopySession } = await tsImport(${JSON.stringify(DOOR)}, import.meta.url);
const uri = ${JSON.stringify(server.uri)};
const connect = () => connectNbd({ uri, connectTimeoutMs: 5000, requestTimeoutMs: 60000 });
const session = () => openCopySession({ source: { kind: 'nbd', uri, connections: 2 }, sink: { kind: 'null' },
  diskBytes: 64 * 1048576, hash: 'xxh3-128', clusterBytes: 65536, requestBytes: 65536,
  connectTimeoutMs: 5000, stallTimeoutMs: 60000 });
const whole = { rows: Float64Array.of(0, 64 * 1048576, 0, 0, 0), zeroPolicy: 'skip', emitEntries: true };
`;

/** Runs a script in a process of its own and answers what it printed. */
async function runChild(
  script: string,
  options: { acceptExitCodes?: number[]; findLeaks?: boolean } = {},
): Promise<{ stdout: string; stderr: string; exitCode: number }> {
  const file = lab.file(`child${Math.floor(performance.now() * 1000)}.mjs`);
  await writeFile(file, PRELUDE() + script);
  const leaks = options.findLeaks === true ? 'detect_leaks=1' : 'detect_leaks=0';
  const environment = SANITIZER.map((it) => it.replace('detect_leaks=0', leaks));
  try {
    return await runTool('env', [...environment, ...ALONE, 'node', '--expose-gc', file], {
      timeoutMs: 60_000,
      cwd: ROOT,
      acceptExitCodes: options.acceptExitCodes ?? [0],
    });
  } catch (error) {
    if (error instanceof ToolError) throw new Error(`the child said: ${error.stderrTail}`, { cause: error });
    throw error;
  }
}

test('a process that exits with requests in flight exits with its own code', async () => {
  const { exitCode } = await runChild(
    `
    const handle = await connect();
    for (let i = 0; i < 100; i++) handle.pread(i * 4096, 4096).catch(() => {});
    const copy = await session();
    copy.submit(whole).catch(() => {});
    setTimeout(() => process.exit(7), 100);`,
    { acceptExitCodes: [7] },
  );
  expect(exitCode).toBe(7);
});

test('an idle handle and an idle session do not keep a process alive, work under way does', async () => {
  const { stdout } = await runChild(`
    const handle = await connect();
    const copy = await session();
    handle.pread(0, 4096).then((data) => console.log('read', data.length));
    copy.submit(whole).then((result) => console.log('copied', result.bytesRead));`);
  expect(stdout.trim().split('\n').sort()).toEqual([`copied ${64 * MIB}`, 'read 4096']);
});

test('an uncaught exception with work under way ends the process as always', async () => {
  const { stderr } = await runChild(
    `
    const copy = await session();
    copy.submit(whole).catch(() => {});
    setTimeout(() => { throw new Error('on purpose'); }, 50);`,
    { acceptExitCodes: [1] },
  );
  expect(stderr).toContain('on purpose');
});

test('worker threads have handles of their own and may be terminated in the middle', async () => {
  await server.stop();
  server = await startQemuNbd({
    image: lab.file('disk.raw'),
    format: 'raw',
    socketPath: lab.file('q.sock'),
    isReadOnly: true,
    shared: 20,
  });
  const { stdout } = await runChild(`
    if (isMainThread) {
      for (let round = 0; round < 3; round++) {
        const workers = [0, 1].map(() => new Worker(new URL(import.meta.url)));
        await Promise.all(workers.map((worker) => new Promise((resolve, reject) => { worker.once('message', resolve); worker.once('error', reject); })));
        await Promise.all(workers.map((worker) => worker.terminate()));
      }
      const handle = await connect();
      console.log((await handle.pread(0, 512)).length);
      await handle.close();
    } else {
      const handle = await connect();
      const copy = await session();
      copy.submit(whole).catch(() => {});
      handle.pread(0, 65536).then((data) => parentPort.postMessage(data.length));
      for (let i = 0; i < 100; i++) handle.pread(i * 4096, 4096).catch(() => {});
    }`);
  expect(stdout.trim()).toBe('512');
});

test('closed handles and sessions leave no thread behind', async () => {
  const { stdout } = await runChild(
    `
    // Under the sanitizers a leak of the addon fails this child.
    const threads = () => readdirSync('/proc/self/task').length;
    await (await connect()).close();
    const before = threads();
    for (let i = 0; i < 20; i++) { const h = await connect(); await h.pread(0, 512); await h.close(); }
    for (let i = 0; i < 5; i++) { const s = await session(); await s.close(); }
    const deadline = performance.now() + 5000;
    while (threads() > before && performance.now() < deadline) await new Promise((resolve) => setTimeout(resolve, 20));
    globalThis.gc();
    console.log(threads() - before <= 0);`,
    { findLeaks: true },
  );
  expect(stdout.trim()).toBe('true');
});
