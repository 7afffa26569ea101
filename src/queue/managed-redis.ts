import { mkdir, open, rename } from 'node:fs/promises';
import path from 'node:path';
import { pause, pollUntil } from '../lib/deadline.js';
import { AppError, errnoOf, isErrorCode } from '../lib/errors.js';
import type { Logger } from '../lib/log.js';
import { startServer, type ChildRegistry, type ChildServer } from '../lib/process.js';
import { findRedisServer } from './redis-binary.js';
import { probeRedis } from './redis-probe.js';

export interface ManagedRedisOptions {
  /** Data and log, kept over restarts. Nobody else's. */
  directory: string;
  /** Where the socket goes. */
  runtimeDirectory: string;
  /** Reaped by the caller before: what an earlier daemon left behind is ended already, or just ending. */
  registry: ChildRegistry;
  logger: Logger;
  /** Where executables are looked for. Default: the usual directories. */
  searchPath?: readonly string[];
}

/** A private Redis, started again on its data when it dies. Whoever started it disposes it. */
export interface ManagedRedis extends AsyncDisposable {
  readonly socketPath: string;
  /** Of the server now running; another one after a restart. */
  readonly pid: number;
}

const SEARCH_PATH = ['/usr/local/sbin', '/usr/local/bin', '/usr/sbin', '/usr/bin', '/sbin', '/bin'];
/** Loading the append-only file is part of it. */
const READY_TIMEOUT_MS = 60_000;
const STOP_TIMEOUT_MS = 10_000;
const LEFTOVER_TIMEOUT_MS = 5000;
const RESTART_MIN_MS = 100;
const RESTART_MAX_MS = 10_000;
/** A server that ran this long died of something new: it is started again at once. */
const SETTLED_MS = 60_000;
const LOG_TAIL_BYTES = 2048;

/**
 * Starts the server and waits until it answers. QUEUE_UNAVAILABLE when another server holds the
 * socket and does not go, TOOL_MISSING, TOOL_FAILED with the end of the server's log.
 */
export async function startManagedRedis(options: ManagedRedisOptions): Promise<ManagedRedis> {
  const log = options.logger.child({ component: 'redis' });
  const socketPath = path.join(options.runtimeDirectory, 'redis.sock');
  await mkdir(options.directory, { recursive: true, mode: 0o700 });
  await mkdir(options.runtimeDirectory, { recursive: true, mode: 0o700 });
  const binary = await findRedisServer(
    options.searchPath ?? SEARCH_PATH,
    path.join(options.directory, 'bin'),
  );
  await awaitFreeSocket(socketPath);
  const stopping = new AbortController();
  const launch = (): Promise<ChildServer> =>
    launchServer(binary, { ...options, socketPath, signal: stopping.signal });
  let server = await launch();
  const supervision = supervise({
    first: server,
    launch: async () => (server = await launch()),
    signal: stopping.signal,
    log,
  });
  const stopOnce = async (): Promise<void> => {
    stopping.abort(new AppError('CANCELLED', 'Redis is being stopped'));
    await supervision;
    await server.stop();
  };
  let stopped: Promise<void> | undefined;
  return {
    socketPath,
    get pid() {
      return server.pid;
    },
    [Symbol.asyncDispose]: () => (stopped ??= stopOnce()),
  };
}

/**
 * Two servers on one append-only file would destroy it. A server left behind by a crash has been
 * ended through the registry and needs a moment; one that stays is not ours to end.
 */
async function awaitFreeSocket(socketPath: string): Promise<void> {
  try {
    await pollUntil(async () => ((await probeRedis(socketPath)) === 'absent' ? true : undefined), {
      timeoutMs: LEFTOVER_TIMEOUT_MS,
      intervalMs: 50,
      what: `the end of the server on ${socketPath}`,
    });
  } catch (error) {
    if (!isErrorCode(error, 'TIMEOUT')) throw error;
    throw new AppError(
      'QUEUE_UNAVAILABLE',
      `another Redis holds ${socketPath}: is a second daemon running?`,
      {
        cause: error,
        details: { socketPath },
        retryable: false,
      },
    );
  }
}

async function launchServer(
  binary: string,
  options: ManagedRedisOptions & { socketPath: string; signal: AbortSignal },
): Promise<ChildServer> {
  const logFile = path.join(options.directory, 'redis.log');
  await keepLastLog(logFile);
  try {
    return await startServer(binary, serverArguments(options.directory, options.socketPath, logFile), {
      owner: 'redis',
      registry: options.registry,
      readyTimeoutMs: READY_TIMEOUT_MS,
      stopTimeoutMs: STOP_TIMEOUT_MS,
      isReady: async () => (await probeRedis(options.socketPath)) === 'ready',
      signal: options.signal,
      cwd: options.directory,
    });
  } catch (error) {
    if (!isErrorCode(error, 'TOOL_FAILED', 'TIMEOUT')) throw error;
    throw new AppError('TOOL_FAILED', 'redis-server did not start', {
      cause: error,
      details: { tool: 'redis-server', logTail: await readTail(logFile) },
    });
  }
}

function serverArguments(directory: string, socketPath: string, logFile: string): string[] {
  return [
    ...['--port', '0', '--unixsocket', socketPath, '--unixsocketperm', '700', '--protected-mode', 'yes'],
    ...['--dir', directory, '--appendonly', 'yes', '--appendfsync', 'everysec', '--save', ''],
    // Cut off by a crash, the file ends in half a command: that one is dropped, the rest is loaded.
    ...['--aof-load-truncated', 'yes', '--maxmemory-policy', 'noeviction'],
    ...['--daemonize', 'no', '--supervised', 'no', '--logfile', logFile, '--loglevel', 'notice'],
  ];
}

/** The log of the run before this one stays; older ones go, so that restarts do not fill the disk. */
async function keepLastLog(logFile: string): Promise<void> {
  try {
    await rename(logFile, `${logFile}.1`);
  } catch (error) {
    if (errnoOf(error) !== 'ENOENT') throw error;
  }
}

async function readTail(file: string): Promise<string> {
  try {
    await using handle = await open(file, 'r');
    const { size } = await handle.stat();
    const start = Math.max(0, size - LOG_TAIL_BYTES);
    const { buffer, bytesRead } = await handle.read(Buffer.alloc(LOG_TAIL_BYTES), 0, LOG_TAIL_BYTES, start);
    return buffer.toString('utf8', 0, bytesRead);
  } catch (error) {
    if (errnoOf(error) === 'ENOENT') return '';
    throw error;
  }
}

interface Supervision {
  first: ChildServer;
  launch: () => Promise<ChildServer>;
  signal: AbortSignal;
  log: Logger;
}

/** Until the signal: waits for the server's end and starts it again, ever more slowly while it keeps dying. */
async function supervise({ first, launch, signal, log }: Supervision): Promise<void> {
  const aborted = new Promise<void>((resolve) => {
    signal.addEventListener('abort', () => {
      resolve();
    });
  });
  let server: ChildServer | undefined = first;
  let waitMs = RESTART_MIN_MS;
  for (;;) {
    if (server !== undefined) {
      const startMs = performance.now();
      const end = await Promise.race([server.exited, aborted]);
      if (end === undefined) return;
      if (performance.now() - startMs >= SETTLED_MS) waitMs = RESTART_MIN_MS;
      log.error({ exitCode: end.exitCode, signal: end.signal, waitMs }, 'Redis ended and is started again');
    }
    try {
      await pause(waitMs, signal);
      waitMs = Math.min(waitMs * 2, RESTART_MAX_MS);
      server = await launch();
      log.info({ pid: server.pid }, 'Redis runs again');
    } catch (error) {
      server = undefined;
      if (signal.aborted) return;
      log.error({ err: error, waitMs }, 'Redis could not be started again');
    }
  }
}
