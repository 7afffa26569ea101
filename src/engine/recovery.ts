import type { Lease, Repository } from '../../repository/index.js';
import type { RunRow } from '../db/database.js';
import { toTimestamp } from '../lib/clock.js';
import { AppError, isErrorCode, toAppError } from '../lib/errors.js';
import type { PointId, RunId, VmId } from '../lib/id.js';
import { isPush } from './backup-steps.js';
import type { EngineContext } from './context.js';
import type { ActiveRuns } from './execute-run.js';
import { unpublishRun } from './export-publisher.js';
import type { RestoreRunRequest } from './restore.js';
import { recoverMaterialize } from './materialize.js';
import { removeRestoreLeftovers } from './restore-leftovers.js';
import type { SourceLeftovers } from './source-leftovers.js';
import { laneOf } from './run-queue.js';
import type { RunKind, RunRequest, RunResult } from './types.js';
import { toIndexRows, toRunError } from './views.js';
import { recoverVolumeRun } from './volume-runs.js';

/**
 * Ends what a crash left behind. A run whose manifest is there did complete, only its index entry and
 * its last word were lost; any other is interrupted, its partial files removed. What cannot be cleaned
 * now (a repository that is offline) stays `running` and is tried again at the next look.
 */
export interface Recovery {
  /** The runs of workers that are dead for certain. */
  recoverDead(workerIds: string[]): Promise<void>;
  /**
   * The runs without a heartbeat for too long, of workers elsewhere. Call it at intervals of
   * `recoveryIntervalMs`: a heartbeat counts as old only when two looks in a row found the same one, so
   * that a database that was away, or a clock that differs, does not end runs that live.
   */
  recoverAbandoned(): Promise<void>;
}

const MAX_RECOVERY_INTERVAL_MS = 15_000;

/** Long enough for a live worker to send a heartbeat between two looks. */
export function recoveryIntervalMs({ runs }: EngineContext['settings']): number {
  return Math.min(MAX_RECOVERY_INTERVAL_MS, Math.max(runs.abandonedAfterMs / 2, runs.heartbeatMs));
}

export function createRecovery(
  context: EngineContext,
  active: ActiveRuns,
  leftovers: Pick<SourceLeftovers, 'remove'>,
): Recovery {
  let suspects = new Map<RunId, string | null>();
  const list = (beforeMs: number, workerIds: string[]): Promise<RunRow[]> =>
    context.db.runs.listAbandoned({ heartbeatBefore: toTimestamp(beforeMs), workerIds });
  return {
    async recoverDead(workerIds) {
      const rows = await list(0, workerIds);
      await recoverRuns(
        { context, leftovers },
        rows.filter(({ workerId }) => workerId !== null && workerIds.includes(workerId)),
      );
    },
    async recoverAbandoned() {
      const before = suspects;
      suspects = new Map();
      const rows = await list(context.clock.nowMs() - context.settings.runs.abandonedAfterMs, []);
      const others = rows.filter(({ id }) => active.get(id) === undefined);
      suspects = new Map(others.map(({ id, heartbeatAt }) => [id, heartbeatAt]));
      const isProven = ({ id, heartbeatAt }: RunRow): boolean =>
        before.has(id) && before.get(id) === heartbeatAt;
      await recoverRuns({ context, leftovers }, others.filter(isProven));
    },
  };
}

async function recoverRuns(
  { context, leftovers }: { context: EngineContext; leftovers: Pick<SourceLeftovers, 'remove'> },
  abandoned: RunRow[],
): Promise<void> {
  for (const row of abandoned) {
    try {
      await recoverRun(context, row);
      // A hypervisor that cannot be asked does not keep the run from its end.
      if (row.kind === 'backup' && !isPush(row)) await leftovers.remove(row);
    } catch (error) {
      context.logger.warn({ err: error, runId: row.id }, 'an abandoned run could not be cleaned up yet');
      if (
        !isErrorCode(
          error,
          'REPOSITORY_OFFLINE',
          'REPOSITORY_IO',
          'REPOSITORY_LOCKED',
          'EXPORT_DAEMON_UNAVAILABLE',
          'DATABASE_UNAVAILABLE',
        )
      ) {
        await endAs(context, row, { state: 'interrupted', error: toAppError(error), result: null });
      }
    }
  }
}

/** Queued rows without a job (Redis lost them, or was away) get one; adding an existing job is harmless. */
export async function requeueWaiting(context: EngineContext): Promise<void> {
  for (const row of await context.db.runs.listQueued()) {
    await context.queue.add({
      runId: row.id,
      kind: row.kind as RunKind,
      lane: laneOf(row.request as RunRequest),
      attempt: row.attempt,
    });
  }
}

async function recoverRun(context: EngineContext, row: RunRow): Promise<void> {
  const result = await cleanUp(context, row);
  if (result !== null) {
    await endAs(context, row, { state: 'completed', error: null, result });
    return;
  }
  const error = new AppError('INTERRUPTED', 'the daemon stopped during the run');
  await endAs(context, row, { state: 'interrupted', error, result: null });
}

/** Answers the result when the run had in truth reached its end. */
async function cleanUp(context: EngineContext, row: RunRow): Promise<RunResult | null> {
  switch (row.kind as RunKind) {
    case 'backup':
      return recoverBackup(context, row);
    case 'delete':
      return recoverDelete(context, row);
    case 'restore':
      await removeRestoreLeftovers(context, row.id, row.request as RestoreRunRequest);
      return null;
    case 'materialize':
      return recoverMaterialize(context, row);
    case 'attach-volume':
    case 'detach-volume':
      return recoverVolumeRun(context, row);
    case 'check':
    case 'rescan':
      return null;
  }
}

async function recoverBackup(context: EngineContext, row: RunRow): Promise<RunResult | null> {
  const { repositoryId, vmId, pointId } = row;
  if (repositoryId === null || vmId === null || pointId === null) return null;
  // Before the files it is written through are removed: an agent may still be at it.
  if (isPush(row)) await unpublishRun(context, row.id);
  const repository = await context.repositories.open(repositoryId);
  await using lease = await takeLease(repository, vmId, row.id);
  // The VM is recorded before anything of it is written.
  if (lease === null) return null;
  try {
    const rows = toIndexRows(await repository.readPoint(vmId, pointId));
    await context.db.points.insert(rows.point, rows.layers);
    return { kind: 'backup', pointId };
  } catch (error) {
    if (!isErrorCode(error, 'POINT_NOT_FOUND')) throw error;
  }
  await discardFiles(context, { repository, lease, runId: row.id });
  return null;
}

/** Null when the repository does not know the VM. */
async function takeLease(repository: Repository, vmId: VmId, runId: RunId): Promise<Lease | null> {
  try {
    return await repository.acquireVmLease(vmId, { runId, purpose: 'recovery' });
  } catch (error) {
    if (isErrorCode(error, 'NOT_FOUND')) return null;
    throw error;
  }
}

async function discardFiles(
  context: EngineContext,
  { repository, lease, runId }: { repository: Repository; lease: Lease; runId: RunId },
): Promise<void> {
  const removed = await repository.discardAbandoned(lease);
  if (removed.length > 0) context.logger.info({ runId, removed }, 'removed unfinished files of a run');
}

/** The manifest went first: when it is gone, the delete is carried to its end here. */
async function recoverDelete(context: EngineContext, row: RunRow): Promise<RunResult | null> {
  const { repositoryId, vmId, pointId } = row;
  if (repositoryId === null || vmId === null || pointId === null) return null;
  const repository = await context.repositories.open(repositoryId);
  if (!(await isDeleted(repository, vmId, pointId))) {
    await using lease = await takeLease(repository, vmId, row.id);
    if (lease !== null) await discardFiles(context, { repository, lease, runId: row.id });
    return null;
  }
  await context.db.points.remove(pointId);
  await repository.sweep();
  return { kind: 'delete', freedBytes: 0 };
}

async function isDeleted(repository: Repository, vmId: VmId, pointId: PointId): Promise<boolean> {
  try {
    await repository.readPoint(vmId, pointId);
    return false;
  } catch (error) {
    if (!isErrorCode(error, 'POINT_NOT_FOUND')) throw error;
    return true;
  }
}

async function endAs(
  context: EngineContext,
  row: RunRow,
  end: { state: string; error: AppError | null; result: RunResult | null },
): Promise<void> {
  const at = toTimestamp(context.clock.nowMs());
  const isEnded = await context.db.runs.endAbandoned(row.id, row.heartbeatAt, {
    state: end.state,
    at,
    error: end.error === null ? null : toRunError(end.error),
    result: end.result,
  });
  if (!isEnded) return;
  await context.db.runEvents.append({
    runId: row.id,
    at,
    level: end.error === null ? 'info' : 'error',
    code: end.error?.code ?? 'RECOVERED',
    message: end.error?.message ?? 'the run had completed before the daemon stopped',
    details: {},
  });
}
