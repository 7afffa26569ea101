import type { RunId } from '../lib/id.js';
import type { RunKind, RunRequest } from './types.js';

/**
 * Runs of one lane never wait for those of the other. `work`: they read and write disks, a few at a time.
 * `attended`: they mostly wait for somebody else (an agent, the export daemon), and somebody waits for them.
 */
export type RunLane = 'work' | 'attended';

const ATTENDED: ReadonlySet<RunRequest['kind']> = new Set([
  'push',
  'materialize',
  'attach-volume',
  'detach-volume',
]);

export function laneOf(request: Pick<RunRequest, 'kind'>): RunLane {
  return ATTENDED.has(request.kind) ? 'attended' : 'work';
}

/**
 * The queue as the engine sees it (implemented in src/queue over BullMQ).
 * Puts runs into the queue and takes them off; the run's row in the database stays the truth.
 */
export interface RunQueue extends AsyncDisposable {
  /**
   * Adds the run; adding it again is harmless (the job id is the run id and attempt). `delayMs` for
   * a retry's back-off. Rejects with QUEUE_UNAVAILABLE when Redis does not answer within its deadline.
   */
  add(
    run: { runId: RunId; kind: RunKind; lane: RunLane; attempt: number },
    options?: { delayMs?: number },
  ): Promise<void>;
  /**
   * Drops every job, also those that a dead worker still holds the lock of, so that the rows can be put
   * again at once. Only for whoever has the queue alone, before any worker takes jobs.
   */
  clear(): Promise<void>;
  ping(timeoutMs: number): Promise<void>;
}

/**
 * Executes one run. Never rejects for a failed run (the row records it); a rejection is a fault in
 * Holdfast or an unreachable database, and the job is tried again. `later`: another run of the same VM
 * and repository goes first; the job is delivered again after a short delay.
 */
export type RunExecutor = (runId: RunId, signal: AbortSignal) => Promise<'done' | 'later'>;
