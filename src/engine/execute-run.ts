import type { RunRow } from '../db/database.js';
import { toTimestamp } from '../lib/clock.js';
import { AppError, isErrorCode, toAppError } from '../lib/errors.js';
import type { RunId } from '../lib/id.js';
import { ActiveRun } from './active-run.js';
import { executeBackup } from './backup.js';
import { isPush } from './backup-steps.js';
import type { EngineContext } from './context.js';
import { executeCheck, executeDelete, executeRescan } from './maintenance.js';
import { executeMaterialize } from './materialize.js';
import { executePush } from './push.js';
import { executeRestore } from './restore.js';
import { laneOf, type RunExecutor } from './run-queue.js';
import type { RunKind, RunRequest, RunResult } from './types.js';
import type { SourceLeftovers } from './source-leftovers.js';
import { toRunError } from './views.js';
import { executeAttachVolume, executeDetachVolume } from './volume-runs.js';

const EXECUTORS: Record<RunKind, (context: EngineContext, run: ActiveRun) => Promise<RunResult>> = {
  backup: (context, run) => (isPush(run.row) ? executePush : executeBackup)(context, run),
  restore: executeRestore,
  check: executeCheck,
  rescan: executeRescan,
  delete: executeDelete,
  materialize: executeMaterialize,
  'attach-volume': executeAttachVolume,
  'detach-volume': executeDetachVolume,
};

/** The runs under way in this process. */
export interface ActiveRuns {
  get(id: RunId): ActiveRun | undefined;
}

export interface RunExecution {
  readonly active: ActiveRuns;
  readonly execute: RunExecutor;
}

/**
 * Executes runs off the queue. The claim on the row decides who does the work, so that a job delivered
 * twice is harmless. Whatever happens, the row says how the run ended: completed, failed, cancelled,
 * interrupted (this process is stopping) or queued again for another attempt.
 */
export function createRunExecution(context: EngineContext, leftovers: SourceLeftovers): RunExecution {
  const active = new Map<RunId, ActiveRun>();
  return {
    active,
    async execute(runId, shutdown) {
      const row = await claim(context, runId);
      if (row === 'ended') return 'done';
      if (row === 'waiting') return 'later';
      await leftovers.release(runId);
      await using run = new ActiveRun(context, row, shutdown);
      active.set(runId, run);
      try {
        await executeClaimed(context, { run, shutdown, leftovers });
      } finally {
        active.delete(runId);
      }
      return 'done';
    },
  };
}

async function claim(context: EngineContext, runId: RunId): Promise<RunRow | 'ended' | 'waiting'> {
  const at = toTimestamp(context.clock.nowMs());
  const isClaimed = await context.db.runs.claim(runId, { workerId: context.workerId, at });
  const row = await context.db.runs.get(runId);
  if (row === null) return 'ended';
  if (isClaimed) return row;
  return row.state === 'queued' ? 'waiting' : 'ended';
}

async function executeClaimed(
  context: EngineContext,
  { run, shutdown, leftovers }: { run: ActiveRun; shutdown: AbortSignal; leftovers: SourceLeftovers },
): Promise<void> {
  const kind = run.row.kind as RunKind;
  run.log('info', {
    code: 'RUN_STARTED',
    message: `${kind} started, attempt ${run.row.attempt}`,
    details: {
      workerId: context.workerId,
    },
  });
  try {
    const result = await EXECUTORS[kind](context, run);
    await run.end({ state: 'completed', error: null, result });
  } catch (error) {
    const reason = failureOf(error, run, shutdown);
    if (reason.code === 'INTERNAL')
      context.logger.error({ err: error, runId: run.id }, 'run failed unexpectedly');
    try {
      if (await retry(context, run, reason)) return;
      run.log('error', { code: reason.code, message: reason.message, details: reason.details });
      await run.end({ state: stateOf(reason), error: toRunError(reason), result: null });
    } finally {
      // A hypervisor that hangs does not keep the run from its end.
      if (!run.isSourceClean) void leftovers.remove(run.row);
    }
  }
}

/** When the signal aborted, its reason is why the work failed, whatever error came out of it. */
function failureOf(error: unknown, run: ActiveRun, shutdown: AbortSignal): AppError {
  if (shutdown.aborted) {
    return new AppError('INTERRUPTED', 'the daemon is stopping', { cause: error });
  }
  if (run.signal.aborted) return toAppError(run.signal.reason);
  return toAppError(error);
}

function stateOf(reason: AppError): string {
  if (reason.code === 'CANCELLED') return 'cancelled';
  return reason.code === 'INTERRUPTED' ? 'interrupted' : 'failed';
}

/** The one place that retries: the row is queued again and the queue delivers it after the back-off. */
async function retry(context: EngineContext, run: ActiveRun, reason: AppError): Promise<boolean> {
  const { attempts, backoffMs } = context.settings.runs;
  const { attempt } = run.row;
  if (!reason.retryable || attempt >= attempts) return false;
  // An agent works with exports that are gone now: it starts again by itself.
  if (run.progress.push !== null) return false;
  const delayMs = backoffMs * 2 ** (attempt - 1);
  run.log('warning', {
    code: reason.code,
    message: `${reason.message}; trying again in ${Math.round(delayMs / 1000)} s`,
    details: {
      ...reason.details,
      attempt,
    },
  });
  if (!(await run.requeue())) return false;
  try {
    await context.queue.add(
      {
        runId: run.id,
        kind: run.row.kind as RunKind,
        lane: laneOf(run.row.request as RunRequest),
        attempt: attempt + 1,
      },
      { delayMs },
    );
  } catch (error) {
    // The row is queued; reconciliation hands it to the queue when that is back.
    if (!isErrorCode(error, 'QUEUE_UNAVAILABLE')) throw error;
    context.logger.warn({ err: error, runId: run.id }, 'the queue is away, the run waits in the database');
  }
  return true;
}
