import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdir, readFile, rename, rm, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { pollUntil, withDeadline } from '../../src/lib/deadline.js';
import { runTool } from '../../src/lib/process.js';
import {
  formatExportFile,
  readExportStatus,
  reloadExportDaemon,
  type ExportDefinition,
  type ExportFileStatus,
  type ExportStatus,
} from '../../src/exports/index.js';
import { connectNbd, listExports, type NbdHandle } from '../../src/nbd/index.js';
import { nbdUnixUri } from '../lab/nbd-server.js';
import { freePort } from '../lab/port.js';

const ROOT = path.resolve(import.meta.dirname, '../..');
const TIMEOUT_MS = 30_000;
const LIMITS = { connectTimeoutMs: TIMEOUT_MS, requestTimeoutMs: TIMEOUT_MS };

/** A real holdfast-exportd in a process of its own, with its directory under `directory`. */
export interface ExportdRig extends AsyncDisposable {
  readonly pid: number;
  readonly port: number;
  readonly socketPath: string;
  readonly exportsDirectory: string;
  readonly runtimeDirectory: string;
  readonly statusFile: string;
  readonly pidFile: string;
  readonly log: () => string;
  /** Settles with the exit code. */
  readonly exited: Promise<number | null>;
  /** Writes a file by rename: a definition, or any text. */
  write(file: string, content: ExportDefinition | string): Promise<void>;
  remove(file: string): Promise<void>;
  /** SIGHUP, and waits until the directory was read after that. */
  reload(): Promise<ExportStatus>;
  status(): Promise<ExportStatus>;
  tcp(name: string): string;
  unix(name: string): string;
  stop(): Promise<void>;
  kill(): Promise<void>;
}

export interface RigOptions {
  directory: string;
  /** Merged over the rig's own. */
  settings?: Record<string, unknown>;
  port?: number;
}

/** Starts a daemon; a second start on the same directory finds its files again. */
export async function startExportd(options: RigOptions): Promise<ExportdRig> {
  const { directory } = options;
  const port = options.port ?? (await freePort());
  const place = await preparePlace(options, port);
  const child = spawnExportd(['--config', place.configFile]);
  const status = await pollUntil(
    async () => {
      if (child.process.exitCode !== null) throw new Error(`exportd ended: ${child.log()}`);
      const found = await readExportStatus(place.statusFile);
      return found?.pid === child.process.pid && found?.generation ? found : undefined;
    },
    { timeoutMs: TIMEOUT_MS, what: 'exportd becoming ready' },
  ).catch((error: unknown) => {
    child.process.kill('SIGKILL');
    throw new Error(`exportd did not start: ${child.log()}`, { cause: error });
  });
  const stopWith = async (signal: NodeJS.Signals): Promise<void> => {
    child.process.kill(signal);
    await withDeadline(child.exited, { timeoutMs: TIMEOUT_MS, what: 'the end of exportd' });
  };
  const inDirectory = (file: string): string => path.join(place.exportsDirectory, file);
  return {
    ...place,
    pid: status.pid,
    port,
    log: child.log,
    exited: child.exited,
    write: async (file, content) => {
      const partial = path.join(directory, `partial-${file}`);
      await writeFile(partial, typeof content === 'string' ? content : formatExportFile(content));
      await rename(partial, inDirectory(file));
    },
    remove: (file) => rm(inDirectory(file)),
    reload: () => reloadExportDaemon(place, { timeoutMs: TIMEOUT_MS }),
    status: async () => (await readExportStatus(place.statusFile))!,
    tcp: (name) => `nbd://127.0.0.1:${port}/${name}`,
    unix: (name) => nbdUnixUri(place.socketPath, name),
    stop: () => stopWith('SIGTERM'),
    kill: () => stopWith('SIGKILL'),
    [Symbol.asyncDispose]: () => stopWith('SIGTERM'),
  };
}

/** For a daemon that is expected to refuse: its exit code and what it said. */
export async function tryExportd(options: RigOptions): Promise<{ exitCode: number | null; output: string }> {
  const { configFile } = await preparePlace(options, options.port ?? (await freePort()));
  return runExportd(['--config', configFile]);
}

export async function runExportd(args: string[]): Promise<{ exitCode: number | null; output: string }> {
  const child = spawnExportd(args);
  const ended = withDeadline(child.exited, { timeoutMs: TIMEOUT_MS, what: 'the end of exportd' });
  try {
    return { exitCode: await ended, output: child.log() };
  } finally {
    child.process.kill('SIGKILL');
  }
}

interface Place {
  configFile: string;
  exportsDirectory: string;
  runtimeDirectory: string;
  statusFile: string;
  pidFile: string;
  socketPath: string;
}

async function preparePlace({ directory, settings }: RigOptions, port: number): Promise<Place> {
  const runtimeDirectory = path.join(directory, 'run');
  const place = {
    configFile: path.join(directory, 'exportd.yaml'),
    exportsDirectory: path.join(directory, 'exports.d'),
    runtimeDirectory,
    statusFile: path.join(runtimeDirectory, 'status.json'),
    pidFile: path.join(runtimeDirectory, 'exportd.pid'),
    socketPath: path.join(runtimeDirectory, 'nbd.sock'),
  };
  await mkdir(place.exportsDirectory, { recursive: true });
  const { exportsDirectory } = place;
  const all = { exportsDirectory, runtimeDirectory, tcp: { port }, ...settings };
  await writeFile(place.configFile, JSON.stringify(all));
  return place;
}

function spawnExportd(args: string[]) {
  // A test run that dies takes its daemons along.
  const argv = [
    '--pdeathsig',
    'KILL',
    '--',
    process.execPath,
    path.join(ROOT, 'bin/holdfast-exportd'),
    ...args,
  ];
  const child = spawn('setpriv', argv, {
    stdio: ['ignore', 'pipe', 'pipe'],
    env: { PATH: process.env['PATH'] ?? '', UV_THREADPOOL_SIZE: '16' },
  });
  let log = '';
  for (const stream of [child.stdout, child.stderr]) {
    stream.on('data', (chunk: Buffer) => {
      log = (log + chunk.toString()).slice(-200_000);
    });
  }
  const exited = once(child, 'close').then(([code]) => code as number | null);
  return { process: child, exited, log: () => log };
}

export function definition(
  name: string,
  imagePath: string,
  more: Partial<ExportDefinition> = {},
): ExportDefinition {
  return {
    name,
    imagePath,
    format: 'qcow2',
    isReadOnly: true,
    sizeBytes: null,
    description: null,
    materialize: false,
    own: null,
    ...more,
  };
}

export function fileOf(status: ExportStatus, file: string): ExportFileStatus {
  const found = status.files.find((known) => known.file === file);
  if (found === undefined) throw new Error(`the status knows no ${file}: ${JSON.stringify(status.files)}`);
  return found;
}

/** An image with one MiB of `pattern` at each of `offsets` MiB; on a backing file when one is named. */
export async function makeImage(
  file: string,
  options: { pattern: number; sizeMib?: number; atMib?: number; backing?: string },
): Promise<void> {
  const { pattern, sizeMib = 16, atMib = 0, backing } = options;
  const backingArgs = backing === undefined ? [`${sizeMib}M`] : [];
  await runTool(
    'qemu-img',
    [
      ...['create', '-q', '-f', 'qcow2'],
      ...(backing === undefined ? [] : ['-b', backing, '-F', 'qcow2']),
      ...[file, ...backingArgs],
    ],
    { timeoutMs: TIMEOUT_MS },
  );
  await runTool('qemu-io', ['-f', 'qcow2', '-c', `write -q -P ${pattern} ${atMib}M 1M`, file], {
    timeoutMs: TIMEOUT_MS,
  });
}

/** Reads one MiB through NBD and answers whether all of it is `pattern`. */
export async function reads(uri: string, pattern: number, atMib = 0): Promise<boolean> {
  const { stdout } = await runTool(
    'qemu-io',
    ['-r', '-f', 'raw', '-c', `read -P ${pattern} ${atMib}M 1M`, uri],
    { timeoutMs: TIMEOUT_MS, acceptExitCodes: [0, 1] },
  );
  if (/Pattern verification failed/.test(stdout)) return false;
  if (!/^read 1048576\/1048576/m.test(stdout)) throw new Error(`not read: ${stdout}`);
  return true;
}

/** The size a client sees; rejects with the server's refusal. */
export async function sizeAt(uri: string): Promise<number> {
  const { stdout } = await runTool('nbdinfo', ['--size', uri], { timeoutMs: TIMEOUT_MS });
  return Number(stdout.trim());
}

/**
 * The names a server lists. Asked of libnbd directly: `nbdinfo --list` asks more about each, which takes QEMU 0.2 s
 * for each over TCP, and QEMU ends a handshake after 10 s.
 */
export async function namesAt(uri: string): Promise<string[]> {
  const listed = await listExports({ uri, ...LIMITS });
  return listed.map(({ name }) => name).sort();
}

export function connect(uri: string): Promise<NbdHandle> {
  return connectNbd({ uri, ...LIMITS });
}

export async function readPidFile(file: string): Promise<number> {
  return Number((await readFile(file, 'utf8')).trim());
}
