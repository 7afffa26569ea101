import type { RunRow } from '../db/database.js';
import { pause } from '../lib/deadline.js';
import { AppError, isErrorCode } from '../lib/errors.js';
import type { RunId } from '../lib/id.js';
import { parseVmSource } from '../source/disk-source.js';
import { openSource } from '../source/open-source.js';
import type { EngineContext } from './context.js';
import { sourceOptions } from './follow-machine.js';

const RETRY_MS = 5_000;
const CLEAN_UP_TIMEOUT_MS = 60_000;
/** Who waits for the first try waits no longer: a daemon that starts must not hang on a hypervisor that does. */
const FIRST_TRY_MS = 10_000;

/**
 * What failed runs left at hypervisors that could not be asked then: a job there goes on saving what its guest
 * overwrites, watched by nobody. So each is tried again until it is gone, whatever the others do. What is still
 * here when the process ends is left to the next run of the machine (earlier-runs.ts).
 */
export class SourceLeftovers implements AsyncDisposable {
  readonly #removing = new Map<RunId, { stop: AbortController; done: Promise<void> }>();

  constructor(private readonly context: EngineContext) {}

  /** Call when the run does not run any more. Never rejects; resolves after the first try, or some seconds of it. */
  async remove(row: RunRow): Promise<void> {
    await this.release(row.id);
    const stop = new AbortController();
    const first = this.#try(row, stop.signal);
    const done = this.#keepTrying(row, first, stop.signal).finally(() => {
      if (this.#removing.get(row.id)?.stop === stop) this.#removing.delete(row.id);
    });
    this.#removing.set(row.id, { stop, done });
    const waiting = new AbortController();
    await Promise.race([first, Promise.allSettled([pause(FIRST_TRY_MS, waiting.signal)])]);
    waiting.abort();
  }

  /** The run is executed once more and cleans up by itself: nothing more is removed of it here. */
  async release(runId: RunId): Promise<void> {
    const removing = this.#removing.get(runId);
    removing?.stop.abort(new AppError('INTERRUPTED', 'the clean-up of a run was given up'));
    await removing?.done;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await Promise.all([...this.#removing.keys()].map((runId) => this.release(runId)));
  }

  async #keepTrying(row: RunRow, first: Promise<boolean>, signal: AbortSignal): Promise<void> {
    let isDone = await first;
    while (!isDone) {
      try {
        await pause(RETRY_MS, signal);
      } catch (error) {
        if (signal.aborted) return;
        throw error;
      }
      isDone = await this.#try(row, signal);
    }
  }

  /** True when nothing of the run is left, or it is none of ours any more. */
  async #try(row: RunRow, signal: AbortSignal): Promise<boolean> {
    try {
      // Another worker may have taken it for its next attempt, which removes what the one before left.
      if ((await this.context.db.runs.get(row.id))?.state === 'running') return true;
      await cleanUpSource(this.context, row, signal);
      return true;
    } catch (error) {
      const what = 'what a run left at its source could not be removed yet';
      this.context.logger.warn({ err: error, runId: row.id }, what);
      // A machine that is gone has nothing of ours any more.
      return isErrorCode(error, 'NOT_FOUND');
    }
  }
}

/** A job, a server, scratch space, a record nothing counts from. Nothing for disks that stand for themselves. */
async function cleanUpSource(
  context: EngineContext,
  { id, vmId, pointId }: RunRow,
  stopped: AbortSignal,
): Promise<void> {
  const vm = vmId === null ? null : await context.db.vms.get(vmId);
  const source = vm === null ? null : parseVmSource(vm.source);
  if (source === null || pointId === null) return;
  const isCommitted = (await context.db.points.get(pointId)) !== null;
  await openSource(source, sourceOptions(context, id)).cleanUp(
    { runId: id, pointId, isCommitted },
    { signal: AbortSignal.any([stopped, AbortSignal.timeout(CLEAN_UP_TIMEOUT_MS)]) },
  );
}
