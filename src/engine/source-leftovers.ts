import type { RunRow } from '../db/database.js';
import { AppError, isErrorCode } from '../lib/errors.js';
import type { RunId } from '../lib/id.js';
import { parseVmSource } from '../source/disk-source.js';
import { openSource } from '../source/open-source.js';
import type { EngineContext } from './context.js';
import { sourceOptions } from './follow-machine.js';

const RETRY_MS = 5_000;
/** For one run's leftovers; a daemon that starts waits for it. */
const CLEAN_UP_TIMEOUT_MS = 60_000;

/**
 * What failed runs left at hypervisors that could not be asked then: a job there goes on saving what its guest
 * overwrites, watched by nobody. So it is tried again until it is gone. What is still here when the process ends
 * is left to the next run of the machine (earlier-runs.ts).
 */
export class SourceLeftovers implements AsyncDisposable {
  readonly #waiting = new Map<RunId, RunRow>();
  #working: Promise<void> = Promise.resolve();
  #timer: NodeJS.Timeout | undefined;
  readonly #closing = new AbortController();

  constructor(private readonly context: EngineContext) {}

  /** Removes what the run left, now if it can be, else later. Never rejects; resolves after the first try. */
  async remove(row: RunRow): Promise<void> {
    this.#waiting.set(row.id, row);
    await this.#work();
  }

  /** The run is executed once more and cleans up by itself: nothing more is removed of it here. */
  async release(runId: RunId): Promise<void> {
    this.#waiting.delete(runId);
    await this.#working;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#waiting.clear();
    clearTimeout(this.#timer);
    this.#closing.abort(new AppError('INTERRUPTED', 'the daemon is stopping'));
    await this.#working;
  }

  async #work(): Promise<void> {
    this.#working = this.#working.then(() => this.#tryAll());
    await this.#working;
    clearTimeout(this.#timer);
    if (this.#waiting.size > 0) this.#timer = setTimeout(() => void this.#work(), RETRY_MS);
  }

  async #tryAll(): Promise<void> {
    for (const row of [...this.#waiting.values()]) {
      if (!this.#waiting.has(row.id)) continue;
      try {
        await cleanUpSource(this.context, row, this.#closing.signal);
        this.#waiting.delete(row.id);
      } catch (error) {
        const what = 'what a run left at its source could not be removed yet';
        this.context.logger.warn({ err: error, runId: row.id }, what);
        // A machine that is gone has nothing of ours any more.
        if (isErrorCode(error, 'NOT_FOUND')) this.#waiting.delete(row.id);
      }
    }
  }
}

/** A job, a server, scratch space, a record nothing counts from. Nothing for disks that stand for themselves. */
async function cleanUpSource(
  context: EngineContext,
  { id, vmId, pointId }: RunRow,
  closing: AbortSignal,
): Promise<void> {
  const vm = vmId === null ? null : await context.db.vms.get(vmId);
  const source = vm === null ? null : parseVmSource(vm.source);
  if (source === null || pointId === null) return;
  const isCommitted = (await context.db.points.get(pointId)) !== null;
  await openSource(source, sourceOptions(context, id)).cleanUp(
    { runId: id, pointId, isCommitted },
    { signal: AbortSignal.any([closing, AbortSignal.timeout(CLEAN_UP_TIMEOUT_MS)]) },
  );
}
