import type { ExportListenerStatus, ListenAddress } from '../exports/index.js';
import { systemClock } from '../lib/clock.js';
import { AppError, isErrorCode, toAppError } from '../lib/errors.js';
import { QmpError } from '../lib/qmp.js';
import type { BlockStreamOptions } from './block-stream.js';
import type { Credentials } from './credentials.js';
import { StorageDaemon, type DaemonPlace, type OfferedExport } from './storage-daemon.js';

export interface ListenerSettings {
  id: string;
  address: ListenAddress;
  credentials: Credentials | null;
}

/** A daemon that ended this soon after its start is started again with more and more delay. */
const SHORT_LIFE_MS = 10_000;
const FIRST_DELAY_MS = 100;
const LONGEST_DELAY_MS = 5000;

/**
 * An address with the storage daemon that serves it. When that ends without being asked, `onEnded` is called; it
 * is for the owner to start the listener again and to offer the exports anew. Whoever made it closes it.
 */
export class Listener {
  readonly settings: ListenerSettings;
  readonly #place: DaemonPlace;
  readonly #onEnded: (listener: Listener, message: string) => void;
  #daemon: StorageDaemon | undefined;
  #error: AppError | null = null;
  #starts = 0;
  #startedAtMs = 0;
  #shortLives = 0;
  #isClosed = false;

  constructor(
    settings: ListenerSettings,
    place: DaemonPlace,
    onEnded: (listener: Listener, message: string) => void,
  ) {
    this.settings = settings;
    this.#place = place;
    this.#onEnded = onEnded;
  }

  get id(): string {
    return this.settings.id;
  }

  get isUp(): boolean {
    return this.#daemon !== undefined && this.#error === null;
  }

  /** False until its first start, and while that fails. */
  get wasUp(): boolean {
    return this.#starts > 0;
  }

  /** How long to wait before the next start: nothing after a single failure or short life. */
  get restartDelayMs(): number {
    if (this.#shortLives < 2) return 0;
    return Math.min(FIRST_DELAY_MS * 2 ** (this.#shortLives - 2), LONGEST_DELAY_MS);
  }

  /** Starts the storage daemon, or starts it again; it offers nothing yet. Rejects as `StorageDaemon.start` does. */
  async start(): Promise<void> {
    await this.#daemon?.stop();
    this.#daemon = undefined;
    if (this.#wasClosed()) return;
    try {
      const { address, credentials } = this.settings;
      const daemon = await StorageDaemon.start(address, credentials, this.#place);
      this.#daemon = daemon;
      this.#error = null;
      this.#starts += 1;
      this.#startedAtMs = systemClock.monotonicMs();
      void daemon.exited.then(({ exitCode, signal, stderrTail }) => {
        this.#noteEnd(daemon, `${signal ?? `exit code ${String(exitCode)}`} ${stderrTail.trim()}`.trim());
      });
    } catch (error) {
      this.#error = toAppError(error);
      this.#shortLives += 1;
      throw error;
    }
    // It may have been closed meanwhile.
    if (this.#wasClosed()) await this.#daemon.stop();
  }

  offers(name: string): boolean {
    return this.isUp && this.#daemon?.has(name) === true;
  }

  /**
   * Offers an export, and answers true; false when the listener is down, or goes down meanwhile. Rejects with
   * QmpError when QEMU refuses the export, and TIMEOUT when it is the one that QEMU stands still over.
   */
  async add(offered: OfferedExport): Promise<boolean> {
    if (this.#daemon === undefined || !this.isUp) return false;
    try {
      await this.#daemon.add(offered);
      return true;
    } catch (error) {
      if (error instanceof QmpError) throw error;
      const isFirst = this.#abandon(error);
      // QEMU takes exports in turn: the first that waits in vain is the one to blame, and must not be offered again.
      if (isFirst && error instanceof AppError && isErrorCode(error.cause, 'TIMEOUT')) {
        throw new AppError('TIMEOUT', 'QEMU does not come back from opening its image', { cause: error });
      }
      return false;
    }
  }

  /**
   * Copies what the backing files of an offered image hold into it, as `streamNode` does, and answers true; false
   * when the listener is down, or goes down meanwhile.
   */
  async stream(name: string, options: BlockStreamOptions): Promise<boolean> {
    const daemon = this.#daemon;
    if (daemon === undefined || !this.isUp) return false;
    try {
      await daemon.stream(name, options);
      return true;
    } catch (error) {
      if (!isErrorCode(error, 'SOURCE_UNREACHABLE')) throw error;
      // By now there may be another one in its place.
      if (daemon === this.#daemon) this.#abandon(error);
      return false;
    }
  }

  /** Stops offering these. A listener that cannot do it goes down, so that nothing is offered against the files. */
  async remove(names: readonly string[]): Promise<void> {
    if (this.#daemon === undefined || !this.isUp) return;
    try {
      await this.#daemon.remove(names);
    } catch (error) {
      this.#abandon(error);
    }
  }

  /** Disconnects all clients and ends the storage daemon. Idempotent. */
  async close(): Promise<void> {
    this.#isClosed = true;
    await this.#daemon?.stop();
  }

  status(): ExportListenerStatus {
    return {
      id: this.id,
      address: this.settings.address,
      tls: this.settings.credentials?.kind ?? 'none',
      state: this.isUp ? 'up' : 'down',
      pid: this.isUp ? (this.#daemon?.pid ?? null) : null,
      restarts: Math.max(0, this.#starts - 1),
      error: this.#error === null ? null : { code: this.#error.code, message: this.#error.message },
    };
  }

  #wasClosed(): boolean {
    return this.#isClosed;
  }

  /**
   * It does not answer: what it offers is not known any more, and its end makes it start anew. Answers whether
   * this error is the first.
   */
  #abandon(error: unknown): boolean {
    // On its way to a proper end, in which it still flushes.
    if (this.#isClosed) return false;
    const isFirst = this.#error === null;
    this.#error ??= toAppError(error);
    this.#daemon?.kill();
    return isFirst;
  }

  #noteEnd(daemon: StorageDaemon, message: string): void {
    if (this.#isClosed || daemon !== this.#daemon) return;
    this.#shortLives =
      systemClock.monotonicMs() - this.#startedAtMs < SHORT_LIFE_MS ? this.#shortLives + 1 : 0;
    this.#error ??= new AppError('TOOL_FAILED', `the storage daemon ended: ${message}`);
    this.#onEnded(this, message);
  }
}
