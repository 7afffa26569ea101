import type { RunRow } from '../db/database.js';
import { toTimestamp } from '../lib/clock.js';
import { pollUntil } from '../lib/deadline.js';
import { AppError, isErrorCode, toAppError, type ErrorDetails } from '../lib/errors.js';
import type { DiskId, PointId, RunId } from '../lib/id.js';
import type { EngineContext } from './context.js';
import type { PushView, RunDiskProgress, RunEvent, RunProgress, RunStage } from './types.js';

/** How long a run outlives its database: then it is given up and found again by recovery. */
const DATABASE_OUTAGE_MS = 10 * 60_000;
/** Rates are averaged over about this long. */
const RATE_WINDOW_MS = 5_000;

/**
 * A run under way in this process: its signal, its log and its progress. The heartbeat keeps the claim
 * on the row; when the row says that the run is no longer ours, or that somebody wants it cancelled,
 * the signal aborts. A database that is away for a while does not fail the run: what could not be
 * written is kept and written later.
 */
export class ActiveRun implements AsyncDisposable {
  readonly id: RunId;
  readonly signal: AbortSignal;
  /** False while something of this run may be at its source, and for good when it could not be removed. */
  isSourceClean = true;
  readonly #controller = new AbortController();
  readonly #timer: NodeJS.Timeout;
  #stage: RunStage | null = null;
  #disks: RunDiskProgress[] = [];
  #share: number | null = null;
  #push: PushView | null = null;
  #pendingEvents: Omit<RunEvent, 'sequence'>[] = [];
  #beating: Promise<void> | undefined;
  #lastBytes = 0;
  #lastBytesAtMs: number;
  #lastStoredAtMs = 0;
  #rate = 0;
  #progressAtMs: number;
  #isDirty = true;

  constructor(
    private readonly context: EngineContext,
    readonly row: RunRow,
    private readonly shutdown: AbortSignal,
  ) {
    this.id = row.id;
    this.signal = AbortSignal.any([this.#controller.signal, shutdown]);
    this.#progressAtMs = this.#lastBytesAtMs = context.clock.monotonicMs();
    const everyMs = Math.min(context.settings.runs.heartbeatMs, 500);
    this.#timer = setInterval(() => {
      this.#beating ??= this.#beat().finally(() => (this.#beating = undefined));
    }, everyMs);
  }

  /** Ends the run's work; the first reason counts. */
  abort(reason: AppError): void {
    this.#controller.abort(reason);
  }

  /** What the API shows while the run is here, fresher than the row. */
  get progress(): RunProgress {
    const planned = this.#disks.reduce((sum, disk) => sum + disk.totalBytes, 0);
    const done = this.#doneBytes();
    const share = this.#share ?? (planned === 0 ? null : Math.min(1, done / planned));
    const rest = planned - done;
    const etaSeconds = this.#rate > 0 && this.#stage === 'transfer' ? Math.max(0, rest / this.#rate) : null;
    return {
      share,
      bytesPerSecond: Math.round(this.#rate),
      etaSeconds,
      disks: this.#disks,
      push: this.#push,
    };
  }

  get stage(): RunStage | null {
    return this.#stage;
  }

  async enter(stage: RunStage): Promise<void> {
    this.signal.throwIfAborted();
    this.#stage = stage;
    this.#share = null;
    this.#touch();
    await this.#store();
  }

  setDisks(disks: RunDiskProgress[]): void {
    this.#disks = disks;
    this.#touch();
  }

  updateDisk(diskId: DiskId, change: Partial<RunDiskProgress>): void {
    const before = this.#doneBytes();
    this.#disks = this.#disks.map((disk) => (disk.diskId === diskId ? { ...disk, ...change } : disk));
    if (this.#doneBytes() !== before) this.#touch();
  }

  /** Progress of a step that is not counted in bytes of a disk, 0…1. */
  setShare(share: number): void {
    if (share !== this.#share) this.#touch();
    this.#share = share;
  }

  /** Stored at once: the agent waits for it. */
  async setPush(push: PushView): Promise<void> {
    this.#push = push;
    this.#touch();
    await this.#store();
  }

  async setPoint(pointId: PointId): Promise<void> {
    await this.insist(() =>
      this.context.db.runs.update(this.id, this.context.workerId, { pointId }).then(() => undefined),
    );
  }

  log(level: RunEvent['level'], entry: { code: string; message: string; details?: ErrorDetails }): void {
    this.#pendingEvents.push({ at: this.#now(), level, details: {}, ...entry });
  }

  /**
   * Does what must reach the database, waiting for it to come back if need be. Not while this process
   * stops: then the run stays as it is, and recovery ends it.
   */
  async insist<T>(work: () => Promise<T>): Promise<T> {
    const done = await pollUntil(
      async () => {
        try {
          return { answer: await work() };
        } catch (error) {
          if (!isErrorCode(error, 'DATABASE_UNAVAILABLE') || this.shutdown.aborted) throw error;
          return undefined;
        }
      },
      { timeoutMs: DATABASE_OUTAGE_MS, intervalMs: 1000, what: 'the database coming back' },
    );
    return done.answer;
  }

  /** The last entry of the run: an ended state, or queued again. False when the row was no longer ours. */
  async end(end: { state: string; error: unknown; result: unknown }): Promise<boolean> {
    this.#stopBeating();
    await this.#beating;
    return this.insist(async () => {
      await this.#flushEvents();
      return this.context.db.runs.end(this.id, this.context.workerId, {
        ...end,
        at: this.#now(),
        progress: { ...this.progress, bytesPerSecond: this.#averageRate(), etaSeconds: null },
      });
    });
  }

  async requeue(): Promise<boolean> {
    this.#stopBeating();
    await this.#beating;
    return this.insist(async () => {
      await this.#flushEvents();
      return this.context.db.runs.requeue(this.id, this.context.workerId);
    });
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#stopBeating();
    await this.#beating;
  }

  #stopBeating(): void {
    clearInterval(this.#timer);
  }

  #now(): string {
    return toTimestamp(this.context.clock.nowMs());
  }

  #doneBytes(): number {
    return this.#disks.reduce((sum, disk) => sum + disk.bytesRead + disk.bytesZeroed, 0);
  }

  #touch(): void {
    this.#progressAtMs = this.context.clock.monotonicMs();
    this.#isDirty = true;
  }

  #averageRate(): number {
    const startedMs = this.row.startedAt === null ? 0 : Date.parse(this.row.startedAt);
    const seconds = Math.max(0.001, (this.context.clock.nowMs() - startedMs) / 1000);
    return Math.round(this.#doneBytes() / seconds);
  }

  async #beat(): Promise<void> {
    this.#measureRate();
    const { runs } = this.context.settings;
    // Of a push the agent's silence counts (push-agent.ts); one that lives and moves nothing is only shown as stalled.
    const isPushed = this.#push !== null && this.#stage === 'transfer';
    if (!isPushed && this.context.clock.monotonicMs() - this.#progressAtMs > runs.failStalledAfterMs) {
      this.abort(new AppError('NBD_STALLED', `no progress for ${runs.failStalledAfterMs} ms`));
    }
    try {
      await this.#flushEvents();
      const wanted = await this.context.db.runs.isCancelRequested([this.id]);
      if (wanted.length > 0) this.abort(new AppError('CANCELLED', 'cancelled on request'));
      const sinceStoreMs = this.context.clock.monotonicMs() - this.#lastStoredAtMs;
      if (sinceStoreMs >= Math.min(runs.progressIntervalMs, runs.heartbeatMs)) await this.#store();
    } catch (error) {
      if (!isErrorCode(error, 'DATABASE_UNAVAILABLE')) {
        this.context.logger.error({ err: error, runId: this.id }, 'heartbeat of a run failed');
        this.abort(toAppError(error));
      }
    }
  }

  async #store(): Promise<void> {
    this.#lastStoredAtMs = this.context.clock.monotonicMs();
    const now = this.#now();
    const change = { heartbeatAt: now, stage: this.#stage, progress: this.progress };
    const isDirty = this.#isDirty;
    this.#isDirty = false;
    try {
      const isOurs = await this.context.db.runs.update(this.id, this.context.workerId, {
        ...change,
        ...(isDirty ? { progressAt: now } : {}),
      });
      if (!isOurs) this.abort(new AppError('INTERRUPTED', 'the run was taken from this worker'));
    } catch (error) {
      this.#isDirty ||= isDirty;
      if (!isErrorCode(error, 'DATABASE_UNAVAILABLE')) throw error;
    }
  }

  #measureRate(): void {
    const nowMs = this.context.clock.monotonicMs();
    const elapsedMs = nowMs - this.#lastBytesAtMs;
    if (elapsedMs < 100) return;
    const done = this.#doneBytes();
    const current = Math.max(0, ((done - this.#lastBytes) * 1000) / elapsedMs);
    const weight = Math.min(1, elapsedMs / RATE_WINDOW_MS);
    this.#rate = this.#rate === 0 ? current : this.#rate * (1 - weight) + current * weight;
    this.#lastBytes = done;
    this.#lastBytesAtMs = nowMs;
  }

  async #flushEvents(): Promise<void> {
    for (let event = this.#pendingEvents[0]; event !== undefined; event = this.#pendingEvents[0]) {
      await this.context.db.runEvents.append({ runId: this.id, ...event });
      this.#pendingEvents.shift();
    }
  }
}
