import { spawn } from 'node:child_process';
import { mkdir, open, readFile, writeFile } from 'node:fs/promises';
import net from 'node:net';
import path from 'node:path';
import { once } from 'node:events';
import { pollUntil } from '../../src/lib/deadline.js';
import { AppError, errnoOf } from '../../src/lib/errors.js';
import { isSameProcess } from '../../src/lib/process.js';

const START_TIMEOUT_MS = 60_000;
/** The daemon gives running runs 30 s to clean up. */
const STOP_TIMEOUT_MS = 45_000;

export interface DaemonPlace {
  /** What survives: database, Redis data, token, log. */
  stateDirectory: string;
  /** Sockets; a short path. */
  runtimeDirectory: string;
  port: number;
  /** Default true: the daemon outlives this process. Else it is stopped when this process ends, however it ends. */
  isDetached?: boolean;
  /** More of its configuration. */
  settings?: Record<string, unknown>;
}

export interface RunningDaemon {
  pid: number;
  url: string;
  tokenFile: string;
  logFile: string;
  configFile: string;
}

interface Holder {
  pid: number;
  startTime: string;
}

/** A TCP port nobody listens on now. */
export async function findFreePort(): Promise<number> {
  const server = net.createServer().listen(0, '127.0.0.1');
  await once(server, 'listening');
  const address = server.address();
  server.close();
  await once(server, 'close');
  if (address === null || typeof address === 'string')
    throw new AppError('INTERNAL', 'no TCP port was given');
  return address.port;
}

/** The daemon that lives on a state directory, or undefined. */
async function findHolder(stateDirectory: string): Promise<Holder | undefined> {
  try {
    const holder = JSON.parse(await readFile(path.join(stateDirectory, 'holdfastd.lock'), 'utf8')) as Holder;
    return (await isSameProcess(holder)) ? holder : undefined;
  } catch (error) {
    if (errnoOf(error) === 'ENOENT' || error instanceof SyntaxError) return undefined;
    throw error;
  }
}

/** Stops the daemon on a state directory, if one runs. Answers whether one did. */
export async function stopDaemon(stateDirectory: string): Promise<boolean> {
  const holder = await findHolder(stateDirectory);
  if (holder === undefined) return false;
  process.kill(holder.pid, 'SIGTERM');
  await pollUntil(async () => ((await isSameProcess(holder)) ? undefined : true), {
    timeoutMs: STOP_TIMEOUT_MS,
    intervalMs: 50,
    what: `the end of holdfastd (pid ${holder.pid})`,
  });
  return true;
}

/**
 * Starts the compiled daemon, on its embedded defaults where the settings say nothing. An earlier one on the same state directory is stopped first.
 */
export async function startDaemon(place: DaemonPlace): Promise<RunningDaemon> {
  await stopDaemon(place.stateDirectory);
  await mkdir(place.stateDirectory, { recursive: true, mode: 0o700 });
  await mkdir(place.runtimeDirectory, { recursive: true, mode: 0o700 });
  const configFile = path.join(place.stateDirectory, 'holdfast.yaml');
  // JSON is YAML.
  const settings = {
    ...place.settings,
    stateDirectory: place.stateDirectory,
    runtimeDirectory: place.runtimeDirectory,
    listen: { host: '127.0.0.1', port: place.port },
  };
  await writeFile(configFile, `${JSON.stringify(settings, undefined, 2)}\n`, { mode: 0o600 });
  const logFile = path.join(place.stateDirectory, 'holdfastd.log');
  const daemon = {
    pid: 0,
    url: `http://127.0.0.1:${place.port}`,
    tokenFile: path.join(place.stateDirectory, 'admin-token'),
    logFile,
    configFile,
  };
  const child = await spawnDaemon({ configFile, logFile, isDetached: place.isDetached ?? true });
  try {
    await waitUntilReady(daemon, child);
  } catch (error) {
    child.kill('SIGTERM');
    throw error;
  }
  child.unref();
  return { ...daemon, pid: child.pid ?? 0 };
}

type Child = ReturnType<typeof spawn>;

async function spawnDaemon(options: {
  configFile: string;
  logFile: string;
  isDetached: boolean;
}): Promise<Child> {
  const log = await open(options.logFile, 'a', 0o600);
  try {
    const program = path.resolve(import.meta.dirname, '../../bin/holdfastd');
    const argv = [process.execPath, program, '--config', options.configFile];
    const [command = '', ...args] = options.isDetached
      ? argv
      : ['setpriv', '--pdeathsig', 'TERM', '--', ...argv];
    return spawn(command, args, {
      detached: options.isDetached,
      stdio: ['ignore', log.fd, log.fd],
      cwd: '/',
      // Only what any program has: settings of another Holdfast in this shell are not this one's.
      env: { PATH: process.env['PATH'], HOME: process.env['HOME'], LC_ALL: 'C.UTF-8' },
    });
  } finally {
    await log.close();
  }
}

async function waitUntilReady(daemon: RunningDaemon, child: Child): Promise<void> {
  let failure: Error | undefined;
  child.once('error', (error) => {
    failure = error;
  });
  await pollUntil(
    async () => {
      if (failure !== undefined) throw failure;
      if (child.exitCode !== null || child.signalCode !== null) {
        throw new AppError(
          'INTERNAL',
          `holdfastd ended while it started:\n${await readTail(daemon.logFile)}`,
        );
      }
      return (await answers(daemon.url)) ? true : undefined;
    },
    { timeoutMs: START_TIMEOUT_MS, intervalMs: 50, what: 'holdfastd becoming ready' },
  );
}

/** A daemon whose repository is not mounted answers 503, and is ready all the same. */
async function answers(url: string): Promise<boolean> {
  try {
    const response = await fetch(`${url}/api/v1/health`, { signal: AbortSignal.timeout(5000) });
    await response.body?.cancel();
    return response.status === 200 || response.status === 503;
  } catch {
    // Not listening yet; the deadline decides.
    return false;
  }
}

async function readTail(file: string): Promise<string> {
  return (await readFile(file, 'utf8')).trimEnd().split('\n').slice(-15).join('\n');
}
