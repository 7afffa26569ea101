import { pause } from '../../lib/deadline.js';
import { AppError, isErrorCode, toAppError } from '../../lib/errors.js';
import { SECTOR_BYTES } from '../../lib/units.js';
import { connectNbd, type NbdHandle } from '../../nbd/index.js';
import { checkScratch, watchScratch, type ScratchPlace } from '../libvirt/scratch-watch.js';
import type { SourceSettings } from '../source-settings.js';

const INTERVAL_MS = 500;
const LOOK_TIMEOUT_MS = 5000;

export interface HealthOptions {
  /** The exports of the views, which nobody else may read. */
  uris: readonly string[];
  nbd: SourceSettings['nbd'];
  scratch: ScratchPlace;
}

/**
 * Watches a snapshot while it is held. QEMU tells nobody when it gave one up, but refuses every read of it
 * from then on: so a sector of each disk is read again and again. Whoever opened it ends it.
 */
export class SnapshotHealth {
  readonly #lost = new AbortController();
  readonly #ended = new AbortController();
  readonly #options: HealthOptions;
  readonly #handles: NbdHandle[] = [];
  #watching: Promise<void> = Promise.resolve();
  #watch: { stop: () => Promise<void> } | undefined;

  private constructor(options: HealthOptions) {
    this.#options = options;
  }

  static async open(options: HealthOptions): Promise<SnapshotHealth> {
    const health = new SnapshotHealth(options);
    try {
      for (const uri of options.uris) health.#handles.push(await connectNbd({ uri, ...options.nbd }));
    } catch (error) {
      await health.end();
      throw error;
    }
    health.#watching = health.#lookAgainAndAgain();
    health.#watch = watchScratch(options.scratch, (reason) => {
      health.#lost.abort(reason);
    });
    return health;
  }

  /** Aborts with SCRATCH_FULL or SNAPSHOT_LOST as reason. */
  get lost(): AbortSignal {
    return this.#lost.signal;
  }

  /** Looks a last time and closes the connections. Answers why the snapshot is lost, null when it holds. Idempotent. */
  async end(): Promise<AppError | null> {
    if (!this.#ended.signal.aborted) {
      this.#ended.abort();
      await this.#watching;
      await this.#watch?.stop();
      await this.#look();
      for (const handle of this.#handles) await handle.close();
    }
    return this.lost.aborted ? toAppError(this.lost.reason) : null;
  }

  async #lookAgainAndAgain(): Promise<void> {
    const { signal } = this.#ended;
    while (!signal.aborted && !this.lost.aborted) {
      await this.#look();
      await pause(INTERVAL_MS, signal).catch(() => undefined);
    }
  }

  async #look(): Promise<void> {
    if (this.lost.aborted) return;
    try {
      for (const handle of this.#handles) {
        await handle.pread(0, Math.min(SECTOR_BYTES, handle.info.sizeBytes));
      }
    } catch (error) {
      this.#lost.abort(await this.#reasonOf(error));
    }
  }

  /** A snapshot that QEMU gave up for lack of room is SCRATCH_FULL, whichever of the two was noticed first. */
  async #reasonOf(error: unknown): Promise<AppError> {
    try {
      await checkScratch(this.#options.scratch, { signal: AbortSignal.timeout(LOOK_TIMEOUT_MS) });
    } catch (noRoom) {
      if (isErrorCode(noRoom, 'SCRATCH_FULL')) return toAppError(noRoom);
    }
    const { message } = toAppError(error);
    return new AppError('SNAPSHOT_LOST', `QEMU gave the snapshot up: ${message}`, { cause: error });
  }
}
