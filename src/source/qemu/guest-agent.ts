import { randomInt } from 'node:crypto';
import net from 'node:net';
import { z } from 'zod';
import { withDeadline } from '../../lib/deadline.js';
import { AppError, errnoOf } from '../../lib/errors.js';
import { checkAnswer, commandText, readAnswer, type AgentCall, type GuestAgent } from '../agent-protocol.js';
import type { FreezableGuest } from '../guest-freeze.js';
import { armGuard, sendCommand } from '../thaw-guard.js';

/** Answers to what is asked here are short; the agent belongs to the guest and may send anything. */
const MAX_RECEIVED_BYTES = 1024 * 1024;
/** Stands before what begins a conversation, on both sides; it cannot be part of JSON. */
const DELIMITER = 0xff;
const MAX_SYNC_ID = 2 ** 31;
const countSchema = z.number().int().nonnegative();

/**
 * A guest whose agent is reached through the Unix socket of its channel, which serves one client at a time.
 * It is connected to when first asked and held until disposal, so that nothing is waited for between freeze and
 * thaw: the guest's side notices a new client only after up to 100 ms.
 */
export function openQemuGuest(
  socket: string,
  options: { agentTimeoutMs: number },
): FreezableGuest & AsyncDisposable {
  const agent = new SocketAgent(socket);
  return {
    ping: async ({ signal }) => {
      await agent.execute('guest-ping', {}, { timeoutMs: options.agentTimeoutMs, signal });
    },
    freeze: async (control) =>
      checkAnswer(countSchema, await agent.execute('guest-fsfreeze-freeze', {}, control)),
    thaw: async (control) =>
      checkAnswer(countSchema, await agent.execute('guest-fsfreeze-thaw', {}, control)),
    guard: async (limitMs) => {
      const lines = [`\u00ff${syncText(newSyncId())}\n`, `${commandText('guest-fsfreeze-thaw', {})}\n`];
      const guard = await armGuard({ undo: sendCommand(socket, lines), limitMs });
      return { kind: 'process', reason: null, disarm: () => guard.disarm() };
    },
    [Symbol.asyncDispose]: () => {
      agent.close();
      return Promise.resolve();
    },
  };
}

function newSyncId(): number {
  return randomInt(MAX_SYNC_ID);
}

function syncText(id: number): string {
  return commandText('guest-sync-delimited', { id });
}

/** A connection that failed or was left in the middle of an answer is closed; the next command makes a new one. */
class SocketAgent implements GuestAgent {
  #connection: Connection | undefined;

  constructor(private readonly socket: string) {}

  async execute(command: string, parameters: Record<string, unknown>, call: AgentCall): Promise<unknown> {
    this.#connection ??= new Connection(this.socket);
    const asked = this.#connection.ask(commandText(command, parameters));
    let answer: string;
    try {
      answer = await withDeadline(asked, { ...call, what: `the guest agent's answer to ${command}` });
    } catch (error) {
      this.close();
      throw error;
    }
    return readAnswer(command, answer);
  }

  close(): void {
    this.#connection?.close();
    this.#connection = undefined;
  }
}

/** One client's conversation with an agent. Commands are asked one after the other. */
class Connection {
  readonly #socket: net.Socket;
  #received = Buffer.alloc(0);
  #isSynchronized = false;
  #failure: AppError | undefined;
  #wake: (() => void) | undefined;

  constructor(private readonly path: string) {
    this.#socket = net.connect(path);
    this.#socket.on('data', (chunk) => {
      this.#received = Buffer.concat([this.#received, chunk]);
      if (this.#received.length > MAX_RECEIVED_BYTES) this.#fail('it sent too much');
      this.#wake?.();
    });
    this.#socket.on('error', (error) => {
      this.#fail(errnoOf(error) ?? error.message, error);
    });
    this.#socket.on('close', () => {
      this.#fail('the connection was closed');
    });
  }

  close(): void {
    this.#fail('the connection was closed by us');
  }

  /** The line the agent answers. */
  async ask(text: string): Promise<string> {
    if (!this.#isSynchronized) await this.#synchronize();
    this.#socket.write(`${text}\n`);
    return this.#nextLine();
  }

  /** Until the agent answers to us: what comes first may be for who was there before. */
  async #synchronize(): Promise<void> {
    const id = newSyncId();
    this.#socket.write(Buffer.from([DELIMITER]));
    this.#socket.write(`${syncText(id)}\n`);
    for (;;) {
      const start = this.#received.indexOf(DELIMITER);
      this.#received = start === -1 ? Buffer.alloc(0) : this.#received.subarray(start + 1);
      if (start === -1) await this.#more();
      else if (readAnswer('guest-sync-delimited', await this.#nextLine()) === id) break;
    }
    this.#isSynchronized = true;
  }

  async #nextLine(): Promise<string> {
    for (;;) {
      const end = this.#received.indexOf('\n');
      if (end === -1) {
        await this.#more();
        continue;
      }
      const line = this.#received.subarray(0, end).toString();
      this.#received = this.#received.subarray(end + 1);
      return line;
    }
  }

  async #more(): Promise<void> {
    if (this.#failure === undefined) {
      await new Promise<void>((resolve) => {
        this.#wake = resolve;
      });
    }
    if (this.#failure !== undefined) throw this.#failure;
  }

  #fail(why: string, cause?: unknown): void {
    this.#failure ??= new AppError('SOURCE_UNREACHABLE', `the guest agent is not reached: ${why}`, {
      cause,
      details: { socket: this.path },
    });
    this.#socket.destroy();
    this.#wake?.();
  }
}
