import { createHash } from 'node:crypto';
import { addTotals, NOTHING_COPIED, type CopyTotals } from '../nbd/copy-windows.js';
import type { CopySession, CopyWindow, WindowResult } from '../nbd/index.js';

/** A window that knows which stretch of the disk it is about. */
export interface DiskWindow extends CopyWindow {
  /** End of the stretch. */
  end: number;
  copyBytes: number;
}

interface Batch {
  entries: Buffer[];
  totals: CopyTotals;
  end: number;
  copyBytes: number;
}

/**
 * What of a disk is safe at the sink: windows count once a flush has succeeded that began after they had settled.
 * What a lost connection leaves unsafe is forgotten, and comes again.
 */
export class SafeWindows {
  readonly #digest = createHash('sha256');
  #end = 0;
  #totals = NOTHING_COPIED;

  /** Where the disk goes on, in bytes. */
  get end(): number {
    return this.#end;
  }

  get totals(): CopyTotals {
    return this.#totals;
  }

  /** SHA-256, in hexadecimal, over the sums entries of all windows in order. The last call of all. */
  digest(): string {
    return this.#digest.digest('hex');
  }

  add(batch: Batch): void {
    for (const entries of batch.entries) this.#digest.update(entries);
    this.#totals = addTotals(this.#totals, batch.totals);
    this.#end = batch.end;
  }
}

interface FlusherOptions {
  /** Where the session begins. */
  fromBytes: number;
  /** How much is copied between flushes. */
  flushBytes: number;
  /** Called with windows in order. */
  onSafe: (batch: Batch) => void;
}

/** Makes windows of one session safe while later ones are copied. */
export class Flusher {
  readonly #session: CopySession;
  readonly #options: FlusherOptions;
  #batch: Batch;
  #flushing: Promise<void> = Promise.resolve();

  constructor(session: CopySession, options: FlusherOptions) {
    this.#session = session;
    this.#options = options;
    this.#batch = emptyBatch(options.fromBytes);
  }

  async settled(result: WindowResult, window: DiskWindow): Promise<void> {
    const batch = this.#batch;
    batch.entries.push(result.entries);
    batch.totals = addTotals(batch.totals, result);
    batch.end = window.end;
    batch.copyBytes += window.copyBytes;
    if (batch.copyBytes >= this.#options.flushBytes) await this.#startFlush();
  }

  /** All that settled is safe when this resolves. */
  async finish(): Promise<void> {
    await this.#startFlush();
    await this.#flushing;
  }

  /** Nothing becomes safe any more when this resolves; the session must be closed. */
  async stop(): Promise<void> {
    await Promise.allSettled([this.#flushing]);
  }

  async #startFlush(): Promise<void> {
    await this.#flushing;
    const batch = this.#batch;
    this.#batch = emptyBatch(batch.end);
    this.#flushing = this.#session.flush().then(() => {
      this.#options.onSafe(batch);
    });
    // Handled by whoever waits for it next.
    this.#flushing.catch(() => undefined);
  }
}

function emptyBatch(end: number): Batch {
  return { entries: [], totals: NOTHING_COPIED, end, copyBytes: 0 };
}
