import { pause, throwIfAborted } from '../lib/deadline.js';
import { AppError } from '../lib/errors.js';
import { formatDuration } from '../lib/units.js';

const INTERVAL_MS = 2000;

export interface ReporterOptions {
  /** Tells how far the disks are. False when nobody answers just now; rejects when the push is over. */
  report: () => Promise<boolean>;
  /** The server gives the push up when it hears nothing for this long. */
  silenceMs: number;
  notify: (text: string) => void;
  signal: AbortSignal;
}

/** Talks to the server of a push, one thing at a time, and bears its absence for as long as the server would bear ours. */
export class Reporter {
  readonly #options: ReporterOptions;
  #heardAtMs = performance.now();
  #isAway = false;
  #last: Promise<void> = Promise.resolve();

  constructor(options: ReporterOptions) {
    this.#options = options;
  }

  /** Reports until the signal aborts; rejects when the push is over, or the server away for too long. */
  async run(): Promise<void> {
    const { signal, report } = this.#options;
    while (!signal.aborted) {
      await this.#inTurn(() => this.#ask(report));
      await pause(INTERVAL_MS, signal);
    }
  }

  /** Says something until the server has heard it. */
  async insist(say: () => Promise<boolean>): Promise<void> {
    while (!(await this.#inTurn(() => this.#ask(say)))) await pause(INTERVAL_MS, this.#options.signal);
  }

  async #inTurn<T>(work: () => Promise<T>): Promise<T> {
    const turn = this.#last.then(work);
    this.#last = turn.then(
      () => undefined,
      () => undefined,
    );
    return turn;
  }

  async #ask(say: () => Promise<boolean>): Promise<boolean> {
    const { notify, silenceMs, signal } = this.#options;
    throwIfAborted(signal);
    const isHeard = await say();
    throwIfAborted(signal);
    const now = performance.now();
    if (isHeard) {
      if (this.#isAway) notify('the daemon answers again');
      this.#heardAtMs = now;
    } else {
      if (!this.#isAway) {
        notify(
          `the daemon does not answer; the copy goes on, and is given up after ${formatDuration(silenceMs)}`,
        );
      }
      if (now - this.#heardAtMs >= silenceMs) {
        throw new AppError('PUSH_SILENT', `the daemon did not answer for ${formatDuration(silenceMs)}`);
      }
    }
    this.#isAway = !isHeard;
    return isHeard;
  }
}
