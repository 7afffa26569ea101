import { randomUUID } from 'node:crypto';
import { throwIfAborted, withDeadline } from '../lib/deadline.js';
import { AppError, isErrorCode } from '../lib/errors.js';
import { startSpoken, type SpokenChild } from '../lib/process.js';
import { localUri } from './libvirt-uri.js';
import { explainFailure, virsh, type VirshOptions } from './virsh.js';

/** Longer than any answer that libvirt gives; the rest of what virsh writes is dropped from the front. */
const MAX_WORDS = 64 * 1024 * 1024;
/** virsh edits its input like a terminal's: bytes beyond these may mean something to it. */
const PLAIN_LINE = /^[\x20-\x7e]*$/;
/** virsh connects anew by itself when libvirtd was restarted, and says so as if it were an error. */
const REMARKS = /^error: (Reconnected to the hypervisor|Disconnected from .*)\n/gm;

/**
 * One virsh that stays connected: a command costs milliseconds, not a process and a connection, which for a remote
 * libvirt is a login. That is most of a run in which little has changed, and a guest may stand still meanwhile.
 */
export class VirshSession implements AsyncDisposable {
  readonly #child: SpokenChild;
  #stdout = '';
  #stderr = '';
  #isBusy = false;
  #hasEnded = false;
  #wake: (() => void) | undefined;

  private constructor(uri: string) {
    const listen = (keep: (text: string) => void) => (text: string) => {
      keep(text);
      this.#wake?.();
    };
    this.#child = startSpoken('virsh', ['--connect', uri], {
      stdout: listen((text) => (this.#stdout = (this.#stdout + text).slice(-MAX_WORDS))),
      stderr: listen((text) => (this.#stderr = (this.#stderr + text).slice(-MAX_WORDS))),
    });
    void this.#child.exited.then(() => {
      this.#hasEnded = true;
      this.#wake?.();
    });
  }

  /** Resolves when it is connected; rejects as `virsh` does. */
  static async open(options: VirshOptions): Promise<VirshSession> {
    const session = new VirshSession(localUri(options.uri));
    try {
      await session.run(['uri'], options);
      return session;
    } catch (error) {
      await session[Symbol.asyncDispose]();
      throw error;
    }
  }

  /**
   * Like `virsh`, with all remarks. After a deadline, an abort or a lost connection the session is over, as nobody
   * knows what becomes of the command. What it cannot do, then, or while it waits for an answer, or ever, a process
   * of its own does.
   */
  readonly run: typeof virsh = async (args, options) => {
    const line = args.map((arg) => `'${arg.replaceAll("'", "'\\''")}'`).join(' ');
    if (this.#hasEnded || this.#isBusy || !PLAIN_LINE.test(line)) return virsh(args, options);
    const { timeoutMs, signal } = options;
    const command = args[0] ?? '';
    this.#isBusy = true;
    try {
      throwIfAborted(signal);
      const asked = this.#ask(line);
      const { output, errors } = await withDeadline(asked, { timeoutMs, signal, what: `virsh ${command}` });
      if (/^error: /m.test(errors)) throw explainFailure(command, { stderr: errors });
      return output;
    } catch (error) {
      const isOver = signal?.aborted === true || isErrorCode(error, 'TIMEOUT', 'SOURCE_UNREACHABLE');
      if (isOver) await this[Symbol.asyncDispose]();
      throw error;
    } finally {
      this.#isBusy = false;
    }
  };

  async #ask(line: string): Promise<{ output: string; errors: string }> {
    // Unknown to whoever could have it written into an answer. Input is echoed; there, the quotes stand within it.
    const mark = randomUUID();
    const [begin, end, errorEnd] = [`begin-${mark}\n`, `end-${mark}\n`, `error: end-${mark}\n`];
    this.#stdout = '';
    this.#stderr = '';
    this.#child.write(`echo begin-''${mark}; ${line}; echo end-''${mark}; echo --err end-''${mark}\n`);
    while (!this.#stdout.includes(end) || !this.#stderr.endsWith(errorEnd)) {
      if (this.#hasEnded) throw unreachable(this.#stderr);
      await new Promise<void>((resolve) => {
        this.#wake = resolve;
      });
    }
    const start = this.#stdout.indexOf(begin) + begin.length;
    // After each command virsh writes an empty line more.
    const output = this.#stdout.slice(start, this.#stdout.lastIndexOf(end)).replace(/\n$/, '');
    return { output, errors: this.#stderr.slice(0, -errorEnd.length).replaceAll(REMARKS, '') };
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#child.kill();
    await this.#child.exited;
  }
}

/** It ended where it should have answered: with the words of a connection that failed, or without any. */
function unreachable(stderr: string): AppError {
  const error = explainFailure('virsh', { stderr });
  return stderr.trim() === '' ? new AppError('SOURCE_UNREACHABLE', error.message) : error;
}
