import { spawn, type ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import { mkdir, readFile, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { pollUntil, withDeadline } from '../../src/lib/deadline.js';
import { AppError } from '../../src/lib/errors.js';
import type { BackupView, RepositoryView, RunState, RunView, VmView } from '../../src/engine/types.js';
import type { ConsistencyWish, DiskSource } from '../../src/source/source.js';

const ROOT = path.resolve(path.dirname(fileURLToPath(import.meta.url)), '../..');
const READY_TIMEOUT_MS = 30_000;
const STOP_TIMEOUT_MS = 45_000;
const RUN_TIMEOUT_MS = 60_000;

/** Short times, so that faults show within a test; one attempt, so that a fault is seen and not repeated. */
const TEST_SETTINGS: Settings = {
  listen: { port: 0 },
  runs: { attempts: 1, backoffMs: 200, heartbeatMs: 500, abandonedAfterMs: 5000, progressIntervalMs: 300 },
  nbd: { connectTimeoutMs: 3000, requestTimeoutMs: 3000, stallTimeoutMs: 4000 },
};

export interface Settings {
  [name: string]: unknown;
}

/** A real holdfastd in a process of its own, and a client of its API. */
export interface Daemon extends AsyncDisposable {
  readonly pid: number;
  readonly url: string;
  readonly stateDirectory: string;
  readonly log: () => string;
  /** Request to `/api/v1`; answers status and parsed body, whatever the status. */
  request(method: string, route: string, body?: unknown): Promise<Answer>;
  /** Like `request`, but any other status than expected is an error with the body in it. */
  expect<T>(status: number, method: string, route: string, body?: unknown): Promise<T>;
  /** Waits until the run has ended and answers it. */
  waitForRun(id: string, options?: { timeoutMs?: number }): Promise<RunView>;
  /** SIGTERM, and waits for the end. */
  stop(): Promise<void>;
  /** SIGKILL, and waits for the end. */
  kill(): Promise<void>;
}

export interface Answer {
  status: number;
  body: unknown;
}

/**
 * Starts a daemon with its state under `directory`; a second start on the same directory finds its state again.
 * `through` is a command that becomes the one that follows it.
 */
export async function startDaemon(options: {
  directory: string;
  settings?: Settings;
  through?: readonly string[];
}): Promise<Daemon> {
  const stateDirectory = path.join(options.directory, 'state');
  await mkdir(options.directory, { recursive: true });
  const file = path.join(options.directory, 'holdfast.yaml');
  const settings = merge(merge(TEST_SETTINGS, options.settings ?? {}), {
    stateDirectory,
    runtimeDirectory: path.join(options.directory, 'run'),
  });
  await writeFile(file, JSON.stringify(settings));
  // A test run that dies takes its daemons along.
  const argv = [
    '--pdeathsig',
    'KILL',
    '--',
    ...(options.through ?? []),
    process.execPath,
    path.join(ROOT, 'bin/holdfastd'),
    '--config',
    file,
  ];
  const child = spawn('setpriv', argv, {
    stdio: ['ignore', 'pipe', 'pipe'],
    env: { PATH: process.env['PATH'] ?? '' },
  });
  let log = '';
  for (const stream of [child.stdout, child.stderr]) {
    stream.on('data', (chunk: Buffer) => {
      log = (log + chunk.toString()).slice(-200_000);
    });
  }
  const exited = once(child, 'exit');
  const url = await pollUntil(
    () => {
      if (child.exitCode !== null) throw new Error(`holdfastd ended with ${child.exitCode}: ${log}`);
      return /"url":"([^"]+)"/.exec(log)?.[1];
    },
    { timeoutMs: READY_TIMEOUT_MS, what: 'holdfastd becoming ready' },
  ).catch((error: unknown) => {
    child.kill('SIGKILL');
    throw new Error(`holdfastd did not start: ${log}`, { cause: error });
  });
  const token = (await readFile(path.join(stateDirectory, 'admin-token'), 'utf8')).trim();
  return makeDaemon({ child, exited, url, token, stateDirectory, log: () => log });
}

interface DaemonParts {
  child: ChildProcess;
  exited: Promise<unknown>;
  url: string;
  token: string;
  stateDirectory: string;
  log: () => string;
}

function makeDaemon(parts: DaemonParts): Daemon {
  const { child, exited, url, token } = parts;
  const end = async (signal: NodeJS.Signals): Promise<void> => {
    if (child.exitCode === null && child.signalCode === null) {
      child.kill(signal);
      await withDeadline(exited, { timeoutMs: STOP_TIMEOUT_MS, what: `holdfastd ending on ${signal}` });
    }
  };
  const request = async (method: string, route: string, body?: unknown): Promise<Answer> => {
    const answer = await fetch(`${url}/api/v1${route}`, {
      method,
      headers: {
        authorization: `Bearer ${token}`,
        ...(body === undefined ? {} : { 'content-type': 'application/json' }),
      },
      ...(body === undefined ? {} : { body: JSON.stringify(body) }),
      signal: AbortSignal.timeout(30_000),
    });
    const text = await answer.text();
    return { status: answer.status, body: text === '' ? null : (JSON.parse(text) as unknown) };
  };
  const daemon: Daemon = {
    pid: child.pid ?? -1,
    url,
    stateDirectory: parts.stateDirectory,
    log: parts.log,
    request,
    async expect<T>(status: number, method: string, route: string, body?: unknown) {
      const answer = await request(method, route, body);
      if (answer.status !== status) {
        throw new Error(`${method} ${route}: ${answer.status} ${JSON.stringify(answer.body)}`);
      }
      return answer.body as T;
    },
    async waitForRun(id, { timeoutMs = RUN_TIMEOUT_MS } = {}) {
      return pollUntil(
        async () => {
          const run = await daemon.expect<RunView>(200, 'GET', `/runs/${id}`);
          return run.state === 'queued' || run.state === 'running' ? undefined : run;
        },
        { timeoutMs, intervalMs: 30, what: `run ${id} ending` },
      );
    },
    stop: () => end('SIGTERM'),
    kill: () => end('SIGKILL'),
    [Symbol.asyncDispose]: () => end('SIGTERM'),
  };
  return daemon;
}

function merge(base: Settings, over: Settings): Settings {
  const merged: Settings = { ...base };
  for (const [key, value] of Object.entries(over)) {
    const before = merged[key];
    merged[key] = isSection(before) && isSection(value) ? merge(before, value) : value;
  }
  return merged;
}

function isSection(value: unknown): value is Settings {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

/** A daemon with one repository and one virtual machine: what most tests start from. */
export interface Setup {
  repository: RepositoryView;
  vm: VmView;
}

export async function setUp(
  daemon: Daemon,
  options: { root: string; disks: { name: string; source: DiskSource }[]; hash?: string; vmName?: string },
): Promise<Setup> {
  const repository = await daemon.expect<RepositoryView>(201, 'POST', '/repositories', {
    name: path.basename(options.root),
    root: options.root,
    ...(options.hash === undefined ? {} : { hash: options.hash }),
  });
  const vm = await daemon.expect<VmView>(201, 'POST', '/vms', {
    name: options.vmName ?? 'web01',
    disks: options.disks,
  });
  return { repository, vm };
}

export interface BackupOptions {
  type?: 'full' | 'incremental' | 'auto';
  bitmaps?: { diskId: string; name: string; sincePointId: string }[];
  bytesPerSecond?: number;
  consistency?: ConsistencyWish;
  whenBusy?: 'refuse' | 'queue';
  expectState?: RunState;
}

/** Requests a backup; answers the run, under way. */
export async function startBackup(
  daemon: Daemon,
  setup: Setup,
  options: BackupOptions = {},
): Promise<RunView> {
  const { type = 'auto', bitmaps, bytesPerSecond, consistency, whenBusy } = options;
  return daemon.expect<RunView>(202, 'POST', '/backups', {
    vmId: setup.vm.id,
    repositoryId: setup.repository.id,
    type,
    ...(bitmaps === undefined ? {} : { bitmaps }),
    ...(bytesPerSecond === undefined ? {} : { bytesPerSecond }),
    ...(consistency === undefined ? {} : { consistency }),
    ...(whenBusy === undefined ? {} : { whenBusy }),
  });
}

/** Requests a backup and waits for its end, which must be the expected one (default: completed). */
export async function backUp(daemon: Daemon, setup: Setup, options: BackupOptions = {}): Promise<RunView> {
  const run = await daemon.waitForRun((await startBackup(daemon, setup, options)).id);
  const expected = options.expectState ?? 'completed';
  if (run.state !== expected) {
    throw new AppError(
      'INTERNAL',
      `the backup ended as ${run.state}, not ${expected}: ${JSON.stringify(run.error)}`,
    );
  }
  return run;
}

/** Restores every disk of a point to raw files named after the disks; answers the files by disk name. */
export async function restoreRaw(
  daemon: Daemon,
  pointId: string,
  directory: string,
): Promise<Record<string, string>> {
  const point = await daemon.expect<BackupView>(200, 'GET', `/backups/${pointId}`);
  await mkdir(directory, { recursive: true });
  const files = Object.fromEntries(
    point.layers.map(({ diskName }) => [diskName, path.join(directory, `${diskName}-${pointId}.raw`)]),
  );
  const run = await daemon.expect<RunView>(202, 'POST', '/restore/images', {
    pointId,
    disks: point.layers.map(({ diskId, diskName }) => ({
      diskId,
      target: { kind: 'file', path: files[diskName], format: 'raw' },
    })),
  });
  const ended = await daemon.waitForRun(run.id);
  if (ended.state !== 'completed')
    throw new Error(`the restore ended as ${ended.state}: ${JSON.stringify(ended)}`);
  return files;
}
