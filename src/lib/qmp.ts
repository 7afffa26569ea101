import { once } from 'node:events';
import net from 'node:net';
import { abortReason, pollUntil, withDeadline } from './deadline.js';
import { AppError, errnoOf, isErrorCode } from './errors.js';
import { MIB } from './units.js';

/** Answers are long (the schema has some hundred KiB), but not without bound. */
const MAX_LINE_BYTES = 16 * MIB;
/** A monitor that is free greets at once; one that serves somebody else says nothing until that one leaves. */
const GREETING_TIMEOUT_MS = 10_000;

export interface QmpOptions {
  /** Limit for each command. */
  timeoutMs: number;
  /** Its abort ends the connection, and with it what is waited for. */
  signal?: AbortSignal | undefined;
}

/** QEMU said no. `details` has the command, and QEMU's error class and words. */
export class QmpError extends AppError {
  override readonly name = 'QmpError';
  readonly errorClass: string;
  readonly description: string;

  constructor(command: string, error: { class: string; desc: string }) {
    super('SOURCE_REFUSED', `QEMU refused ${command}: ${error.desc}`, {
      details: { command, class: error.class, description: error.desc },
    });
    this.errorClass = error.class;
    this.description = error.desc;
  }
}

interface Pending {
  command: string;
  resolve: (value: unknown) => void;
  reject: (error: AppError) => void;
}

/**
 * One connection to QEMU's control protocol. Commands may be sent before earlier ones are answered: QEMU
 * executes them in their order. Events are passed over. Whoever connected disposes it.
 */
export class QmpClient implements AsyncDisposable {
  readonly #socket: net.Socket;
  readonly #options: QmpOptions;
  readonly #pending = new Map<number, Pending>();
  readonly #greeting: Promise<void>;
  #greet: { resolve: () => void; reject: (error: AppError) => void } | undefined;
  #parts: Buffer[] = [];
  #partBytes = 0;
  #lastId = 0;
  #end: AppError | undefined;
  #isUninterrupted = false;
  readonly #onAbort = (): void => {
    const { signal } = this.#options;
    if (signal?.aborted === true && !this.#isUninterrupted) this.#close(abortReason(signal));
  };

  constructor(socket: net.Socket, options: QmpOptions) {
    this.#socket = socket;
    this.#options = options;
    this.#greeting = new Promise((resolve, reject) => {
      this.#greet = { resolve, reject };
    });
    // Nobody waits for it yet when the socket ends before.
    this.#greeting.catch(() => undefined);
    options.signal?.addEventListener('abort', this.#onAbort);
    socket.on('data', (chunk: Buffer) => {
      this.#receive(chunk);
    });
    socket.on('error', (error) => {
      this.#close(unreachable(`the connection to QEMU broke: ${error.message}`, error));
    });
    socket.on('close', () => {
      this.#close(unreachable('QEMU closed the connection'));
    });
  }

  /** Waits for the greeting and leaves negotiation mode. */
  async negotiate(): Promise<void> {
    this.#onAbort();
    const limitMs = Math.min(this.#options.timeoutMs, GREETING_TIMEOUT_MS);
    await withDeadline(this.#greeting, { timeoutMs: limitMs, what: 'the QMP greeting' }).catch(
      (error: unknown) => {
        if (!(error instanceof AppError) || error.code !== 'TIMEOUT') throw error;
        throw new AppError(
          'SOURCE_BUSY',
          'the QMP socket does not answer: somebody else is connected to it',
          {
            cause: error,
          },
        );
      },
    );
    await this.execute('qmp_capabilities');
  }

  /**
   * Sends a command and answers what QEMU returns, unchecked. Rejects with QmpError when QEMU says no, and
   * with SOURCE_UNREACHABLE when there is no answer.
   */
  async execute(command: string, args: Record<string, unknown> = {}): Promise<unknown> {
    if (this.#end !== undefined) throw this.#end;
    const id = (this.#lastId += 1);
    const answer = new Promise<unknown>((resolve, reject) => {
      this.#pending.set(id, { command, resolve, reject });
    });
    this.#socket.write(`${JSON.stringify({ execute: command, arguments: args, id })}\n`);
    const { timeoutMs } = this.#options;
    try {
      return await withDeadline(answer, { timeoutMs, what: command });
    } catch (error) {
      if (!(error instanceof AppError) || error.code !== 'TIMEOUT') throw error;
      throw unreachable(`QEMU did not answer ${command} within ${timeoutMs} ms`, error);
    } finally {
      this.#pending.delete(id);
    }
  }

  /** Does its commands whether the signal aborts or not; an abort meanwhile takes effect afterwards. */
  async uninterrupted<T>(work: () => Promise<T>): Promise<T> {
    this.#onAbort();
    if (this.#end !== undefined) throw this.#end;
    this.#isUninterrupted = true;
    try {
      return await work();
    } finally {
      this.#isUninterrupted = false;
      this.#onAbort();
    }
  }

  [Symbol.asyncDispose](): Promise<void> {
    this.#close(unreachable('the connection to QEMU was closed'));
    return Promise.resolve();
  }

  #close(reason: AppError): void {
    if (this.#end !== undefined) return;
    this.#end = reason;
    this.#options.signal?.removeEventListener('abort', this.#onAbort);
    this.#socket.destroy();
    this.#greet?.reject(reason);
    for (const pending of this.#pending.values()) pending.reject(reason);
  }

  #receive(chunk: Buffer): void {
    let rest = chunk;
    for (let end = rest.indexOf(10); end !== -1; end = rest.indexOf(10)) {
      const line = Buffer.concat([...this.#parts, rest.subarray(0, end)]).toString('utf8');
      this.#parts = [];
      this.#partBytes = 0;
      rest = rest.subarray(end + 1);
      this.#take(line);
    }
    if (rest.length === 0) return;
    this.#parts.push(rest);
    this.#partBytes += rest.length;
    if (this.#partBytes > MAX_LINE_BYTES) this.#close(notQmp('its answer does not end'));
  }

  #take(line: string): void {
    if (line.trim() === '' || this.#end !== undefined) return;
    const message = parseMessage(line);
    if (message === undefined) {
      this.#close(notQmp('it does not speak JSON'));
    } else if ('QMP' in message) {
      this.#greet?.resolve();
    } else if (!('event' in message)) {
      this.#settle(message);
    }
  }

  /** An answer to a command that is not waited for any more is dropped; one that names none is about our own syntax. */
  #settle(message: Record<string, unknown>): void {
    const pending = this.#pending.get(typeof message['id'] === 'number' ? message['id'] : NaN);
    const error = message['error'];
    if (pending === undefined) return;
    if (error === undefined) pending.resolve(message['return']);
    else pending.reject(new QmpError(pending.command, readError(error)));
  }
}

/**
 * Connects to a QMP Unix socket, which serves one client at a time. Rejects with SOURCE_UNREACHABLE when
 * nobody listens there, SOURCE_BUSY when nothing greets us, SOURCE_REFUSED when it is no QMP monitor.
 */
export async function connectQmp(socketPath: string, options: QmpOptions): Promise<QmpClient> {
  const socket = await openSocket(socketPath, options);
  const client = new QmpClient(socket, options);
  try {
    await client.negotiate();
  } catch (error) {
    await client[Symbol.asyncDispose]();
    throw error;
  }
  return client;
}

/** QEMU lets one client wait in line; there is no place for a further one until that one's turn came. */
async function openSocket(socketPath: string, { timeoutMs, signal }: QmpOptions): Promise<net.Socket> {
  try {
    return await pollUntil(() => tryToConnect(socketPath), {
      timeoutMs: Math.min(timeoutMs, GREETING_TIMEOUT_MS),
      what: `a place at ${socketPath}`,
      signal,
    });
  } catch (error) {
    if (!isErrorCode(error, 'TIMEOUT')) throw error;
    throw new AppError('SOURCE_BUSY', 'several others wait for the QMP socket', { cause: error });
  }
}

/** A Unix socket connects or refuses at once. Undefined when the line is full. */
async function tryToConnect(socketPath: string): Promise<net.Socket | undefined> {
  const socket = net.connect(socketPath);
  try {
    await once(socket, 'connect');
    return socket;
  } catch (error) {
    socket.destroy();
    const errno = errnoOf(error);
    if (errno === 'EAGAIN') return undefined;
    throw new AppError('SOURCE_UNREACHABLE', `no QEMU listens on ${socketPath}: ${errno}`, {
      cause: error,
      details: { isGone: errno === 'ENOENT' || errno === 'ECONNREFUSED' },
    });
  }
}

function parseMessage(line: string): Record<string, unknown> | undefined {
  try {
    const value: unknown = JSON.parse(line);
    return typeof value === 'object' && value !== null ? (value as Record<string, unknown>) : undefined;
  } catch (error) {
    if (error instanceof SyntaxError) return undefined;
    throw error;
  }
}

function readError(error: unknown): { class: string; desc: string } {
  const { class: errorClass, desc } = (error ?? {}) as { class?: unknown; desc?: unknown };
  return { class: String(errorClass), desc: String(desc).slice(0, 1000) };
}

function unreachable(message: string, cause?: unknown): AppError {
  return new AppError('SOURCE_UNREACHABLE', message, { cause });
}

/** True when nobody listens on the socket: the QEMU that had it, and all that was added to it, is gone. */
export function isQemuGone(error: unknown): boolean {
  return isErrorCode(error, 'SOURCE_UNREACHABLE') && (error as AppError).details['isGone'] === true;
}

function notQmp(why: string): AppError {
  return new AppError('SOURCE_REFUSED', `the socket is not a QMP monitor: ${why}`);
}
