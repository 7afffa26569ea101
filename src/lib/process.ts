import { mkdir, readFile, readdir, rm, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { execa } from 'execa';
import { abortReason, pollUntil, withDeadline } from './deadline.js';
import { AppError, errnoOf, type ErrorDetails } from './errors.js';

const STDERR_TAIL_BYTES = 4096;
const KILL_AFTER_MS = 3000;

/** A tool ended badly. `details` has `tool`, `exitCode`, `signal` and `stderrTail`; argv is not repeated. */
export class ToolError extends AppError {
  override readonly name = 'ToolError';
  readonly stderrTail: string;

  constructor(tool: string, facts: ErrorDetails & { stderrTail: string }, cause?: unknown) {
    const lastLine = facts.stderrTail.trim().split('\n').at(-1) ?? '';
    super('TOOL_FAILED', `${tool} failed${lastLine === '' ? '' : `: ${lastLine}`}`, {
      details: { tool, ...facts },
      cause,
    });
    this.stderrTail = facts.stderrTail;
  }
}

export interface ToolOptions {
  /** Kill the tool after this long. Required: nothing waits without a deadline. */
  timeoutMs: number;
  signal?: AbortSignal | undefined;
  cwd?: string;
  /** Written to standard input; the way to hand over a secret. */
  input?: string;
  /** An open file that the tool gets as its standard input, instead of `input`. */
  stdinFd?: number;
  /** Called with each chunk of standard output while the tool runs, e.g. for `qemu-img -p`. */
  onOutput?: (chunk: string) => void;
  /** Exit codes that are answers, not failures. Default: only 0. */
  acceptExitCodes?: readonly number[];
}

export interface ToolResult {
  stdout: string;
  stderr: string;
  exitCode: number;
}

/**
 * For every child: a minimal environment, and none of execa's own handling of SIGTERM, which ends children and
 * then this process before anything was cleaned up. Children have owners here, and the parent-death signal.
 */
const childOptions = () =>
  ({
    env: { PATH: process.env['PATH'] ?? '/usr/sbin:/usr/bin:/sbin:/bin', LC_ALL: 'C' },
    extendEnv: false,
    reject: false,
    cleanup: false,
  }) as const;

/**
 * The child dies with this process also on `kill -9` of it (prctl(2) PR_SET_PDEATHSIG, set by
 * setpriv). It follows the forking thread, so children are only started from the main thread.
 */
function withParentDeath(tool: string, args: readonly string[]): [string, string[]] {
  return ['setpriv', ['--pdeathsig', 'KILL', '--', tool, ...args]];
}

/**
 * Runs a tool to its end: argument array, no shell, minimal environment with LC_ALL=C.
 * Rejects with ToolError on a bad exit, TOOL_MISSING, TIMEOUT, or the signal's reason when aborted.
 */
export async function runTool(
  tool: string,
  args: readonly string[],
  options: ToolOptions,
): Promise<ToolResult> {
  const [command, argv] = withParentDeath(tool, args);
  const child = execa(command, argv, {
    ...childOptions(),
    timeout: options.timeoutMs,
    forceKillAfterDelay: KILL_AFTER_MS,
    maxBuffer: 64 * 1024 * 1024,
    ...(options.signal === undefined ? {} : { cancelSignal: options.signal }),
    ...(options.cwd === undefined ? {} : { cwd: options.cwd }),
    ...standardInput(options),
  });
  if (options.onOutput !== undefined) {
    const listener = options.onOutput;
    child.stdout.on('data', (chunk: Buffer) => {
      listener(chunk.toString());
    });
  }
  const result = await child;
  if (options.signal?.aborted === true) throw abortReason(options.signal);
  const stderrTail = result.stderr.slice(-STDERR_TAIL_BYTES);
  if (isMissing(result.exitCode, stderrTail) || errnoOf(result.cause) === 'ENOENT') {
    throw new AppError('TOOL_MISSING', `${tool} is not installed`, { details: { tool } });
  }
  if (result.timedOut) {
    throw new AppError('TIMEOUT', `${tool} did not end within ${options.timeoutMs} ms`, {
      details: { tool, stderrTail },
    });
  }
  const accepted = options.acceptExitCodes ?? [0];
  if (result.exitCode === undefined || !accepted.includes(result.exitCode)) {
    throw new ToolError(tool, { exitCode: result.exitCode, signal: result.signal, stderrTail }, result.cause);
  }
  return { stdout: result.stdout, stderr: result.stderr, exitCode: result.exitCode };
}

function standardInput({ input, stdinFd }: ToolOptions): { input: string } | { stdin: 'ignore' | 0 } {
  if (input !== undefined) return { input };
  // execa hands any descriptor on; its types know only the standard ones.
  return { stdin: stdinFd === undefined ? 'ignore' : (stdinFd as 0) };
}

/** setpriv answers 127 (126 in other versions) when it cannot execute the tool. */
function isMissing(exitCode: number | undefined, stderr: string): boolean {
  return (exitCode === 127 || exitCode === 126) && stderr.includes('setpriv: failed to execute');
}

/** Start time of a process in clock ticks since boot, field 22 of /proc/PID/stat; undefined when it is gone or a zombie. */
export async function processStartTime(pid: number): Promise<string | undefined> {
  try {
    const stat = await readFile(`/proc/${pid}/stat`, 'utf8');
    const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
    return fields[0] === 'Z' ? undefined : fields[19];
  } catch (error) {
    if (errnoOf(error) === 'ENOENT' || errnoOf(error) === 'ESRCH') return undefined;
    throw error;
  }
}

/** True while the very process that was recorded (same pid, same start time) is alive. */
export async function isSameProcess(recorded: { pid: number; startTime: string }): Promise<boolean> {
  return (await processStartTime(recorded.pid)) === recorded.startTime;
}

interface ChildRecord {
  pid: number;
  startTime: string;
  tool: string;
  owner: string;
}

/**
 * Remembers running children on disk, one file each, so that the next start of the daemon ends
 * what a crash left behind. A record names pid and start time: a recycled pid is never signalled.
 */
export class ChildRegistry {
  constructor(private readonly directory: string) {}

  async record(child: ChildRecord): Promise<void> {
    await mkdir(this.directory, { recursive: true, mode: 0o700 });
    await writeFile(this.#file(child.pid), JSON.stringify(child), { mode: 0o600 });
  }

  async forget(pid: number): Promise<void> {
    await rm(this.#file(pid), { force: true });
  }

  /** Ends every recorded child that still lives and forgets all. Call once, before starting any. */
  async reap(): Promise<ChildRecord[]> {
    const reaped: ChildRecord[] = [];
    for (const name of await this.#names()) {
      const child = await this.#read(path.join(this.directory, name));
      if (child !== undefined && (await isSameProcess(child))) {
        process.kill(child.pid, 'SIGKILL');
        reaped.push(child);
      }
      await rm(path.join(this.directory, name), { force: true });
    }
    return reaped;
  }

  #file(pid: number): string {
    return path.join(this.directory, `${pid}.json`);
  }

  async #names(): Promise<string[]> {
    try {
      return (await readdir(this.directory)).filter((name) => name.endsWith('.json'));
    } catch (error) {
      if (errnoOf(error) === 'ENOENT') return [];
      throw error;
    }
  }

  /** A record cut short by a crash names no process; it is dropped. */
  async #read(file: string): Promise<ChildRecord | undefined> {
    const text = await readFile(file, 'utf8');
    try {
      return JSON.parse(text) as ChildRecord;
    } catch (error) {
      if (error instanceof SyntaxError) return undefined;
      throw error;
    }
  }
}

export interface ServerOptions {
  /** Who owns the child, for the record: a run id or a component. */
  owner: string;
  registry?: ChildRegistry | undefined;
  /** Answers true when the server accepts work. Asked until then, or until the deadline. */
  isReady: () => Promise<boolean>;
  readyTimeoutMs: number;
  /** How long a stopped server may take to end by itself before SIGKILL. Default 3 s. */
  stopTimeoutMs?: number;
  signal?: AbortSignal | undefined;
  cwd?: string;
}

/** A running child that serves something. Whoever started it disposes it. */
export interface ChildServer extends AsyncDisposable {
  readonly pid: number;
  /** Settles when the child has ended, however it ended; never rejects. */
  readonly exited: Promise<{ exitCode: number | undefined; signal: string | undefined; stderrTail: string }>;
  readonly hasExited: boolean;
  /** SIGTERM, wait, SIGKILL. Idempotent. Resolves when the process is gone. */
  stop(): Promise<void>;
}

/**
 * Starts a server child and waits until it is ready. When it exits first, is not ready in time, or
 * the signal aborts, it is stopped and the error has its last words on stderr.
 */
export async function startServer(
  tool: string,
  args: readonly string[],
  options: ServerOptions,
): Promise<ChildServer> {
  const child = spawnServer(tool, args, options.cwd ?? '/');
  const server = superviseServer(tool, child, options);
  if (child.pid !== undefined) {
    const startTime = await processStartTime(child.pid);
    if (startTime !== undefined) {
      await options.registry?.record({ pid: child.pid, startTime, tool, owner: options.owner });
    }
  }
  try {
    await pollUntil(
      async () => {
        if (server.hasExited) {
          const { exitCode, signal, stderrTail } = await server.exited;
          if (isMissing(exitCode, stderrTail)) {
            throw new AppError('TOOL_MISSING', `${tool} is not installed`, { details: { tool } });
          }
          throw new ToolError(tool, { exitCode, signal, stderrTail });
        }
        return (await options.isReady()) ? true : undefined;
      },
      {
        timeoutMs: options.readyTimeoutMs,
        what: `${tool} becoming ready`,
        intervalMs: 5,
        signal: options.signal,
      },
    );
  } catch (error) {
    await server.stop();
    throw error;
  }
  return server;
}

// eslint-disable-next-line @typescript-eslint/explicit-function-return-type -- execa's result type depends on its options
function spawnServer(tool: string, args: readonly string[], cwd: string) {
  const [command, argv] = withParentDeath(tool, args);
  return execa(command, argv, {
    ...childOptions(),
    stdin: 'ignore',
    stdout: 'ignore',
    buffer: false,
    cwd,
  });
}

function superviseServer(
  tool: string,
  child: ReturnType<typeof spawnServer>,
  options: ServerOptions,
): ChildServer {
  let stderrTail = '';
  let ended = false;
  child.stderr.on('data', (chunk: Buffer) => {
    stderrTail = (stderrTail + chunk.toString()).slice(-STDERR_TAIL_BYTES);
  });
  const exited = child.then(async (result) => {
    ended = true;
    if (child.pid !== undefined) await options.registry?.forget(child.pid);
    return { exitCode: result.exitCode, signal: result.signal, stderrTail };
  });
  const stopOnce = async (): Promise<void> => {
    if (!ended) {
      child.kill('SIGTERM');
      const graceMs = options.stopTimeoutMs ?? KILL_AFTER_MS;
      try {
        await withDeadline(exited, { timeoutMs: graceMs, what: `${tool} ending` });
      } catch (error) {
        if (!(error instanceof AppError) || error.code !== 'TIMEOUT') throw error;
        child.kill('SIGKILL');
      }
    }
    await exited;
  };
  let stopping: Promise<void> | undefined;
  const stop = (): Promise<void> => (stopping ??= stopOnce());
  return {
    get pid() {
      return child.pid ?? -1;
    },
    exited,
    get hasExited() {
      return ended;
    },
    stop,
    [Symbol.asyncDispose]: stop,
  };
}

/** A running child that is spoken to on its standard input. */
export interface SpokenChild {
  readonly pid: number;
  /** Settles when the child has ended, however it ended; never rejects. */
  readonly exited: Promise<{ exitCode: number | undefined; signal: string | undefined; cause: unknown }>;
  /** Told after its end, nothing happens. */
  write(text: string): void;
  /** The last it is told: writes `text` and closes its standard input. Told after its end, nothing happens. */
  end(text: string): void;
  kill(): void;
}

export interface ChildListeners {
  stdout: (text: string) => void;
  /** Absent: nobody hears it. */
  stderr?: (text: string) => void;
}

/** Starts a child whose words go to the listeners as they come. Whoever started it kills it. */
export function startSpoken(tool: string, args: readonly string[], listeners: ChildListeners): SpokenChild {
  return spawnSpoken(withParentDeath(tool, args), { listeners, isDetached: false });
}

/**
 * Starts a child that is there for the case that this process dies: it leads a session of its own, has no
 * parent-death signal and stands in no registry, so nothing of ours ends it. It sees our end as the end of
 * its standard input, and must have a limit of its own. Resolves when it has written its first output;
 * rejects with ToolError when it ends before, TIMEOUT when it is too late.
 */
export async function startDetached(
  tool: string,
  args: readonly string[],
  options: { readyTimeoutMs: number },
): Promise<SpokenChild> {
  let isReady: () => void = () => undefined;
  const ready = new Promise<void>((resolve) => (isReady = resolve));
  const child = spawnSpoken([tool, args], {
    listeners: {
      stdout: () => {
        isReady();
      },
    },
    isDetached: true,
  });
  const tooEarly = child.exited.then(({ cause, ...facts }) => {
    throw new ToolError(tool, { ...facts, stderrTail: '' }, cause);
  });
  const started = Promise.race([ready, tooEarly]);
  try {
    await withDeadline(started, { timeoutMs: options.readyTimeoutMs, what: `${tool} becoming ready` });
  } catch (error) {
    child.kill();
    throw error;
  }
  return child;
}

function spawnSpoken(
  [command, args]: [string, readonly string[]],
  { listeners, isDetached }: { listeners: ChildListeners; isDetached: boolean },
): SpokenChild {
  const child = execa(command, args, {
    ...childOptions(),
    detached: isDetached,
    stdin: 'pipe',
    stderr: listeners.stderr === undefined ? 'ignore' : 'pipe',
    buffer: false,
    cwd: '/',
  });
  child.stdout.setEncoding('utf8').on('data', listeners.stdout);
  if (listeners.stderr !== undefined) child.stderr?.setEncoding('utf8').on('data', listeners.stderr);
  return {
    get pid() {
      return child.pid ?? -1;
    },
    exited: child.then(({ exitCode, signal, cause }) => ({ exitCode, signal, cause })),
    write: (text) => child.stdin.write(text),
    end: (text) => child.stdin.end(text),
    kill: () => child.kill('SIGKILL'),
  };
}
