import { scanRepository, type Repository } from '../../repository/index.js';
import { toTimestamp } from '../lib/clock.js';
import { CleanupStack } from '../lib/cleanup.js';
import { AppError, isErrorCode } from '../lib/errors.js';
import type { PointId, RunId, VmId } from '../lib/id.js';
import type { VmRow } from '../db/database.js';
import type { ActiveRun } from './active-run.js';
import type { EngineContext } from './context.js';
import { isPinning } from './export-record.js';
import type { RunRequest, RunResult } from './types.js';
import { toIndexRows } from './views.js';

type CheckRunRequest = Extract<RunRequest, { kind: 'check' }>;

async function openOfRun(context: EngineContext, run: ActiveRun): Promise<Repository> {
  if (run.row.repositoryId === null) throw new AppError('INTERNAL', `run ${run.id} names no repository`);
  return context.repositories.open(run.row.repositoryId);
}

/** Checks a repository, a VM or a point; findings are the result and the log, not a failure of the run. */
export async function executeCheck(context: EngineContext, run: ActiveRun): Promise<RunResult> {
  const request = run.row.request as CheckRunRequest;
  const repository = await openOfRun(context, run);
  await run.enter('verify');
  const report = await repository.check({
    content: request.content,
    signal: run.signal,
    ...(request.vmId === null ? {} : { vmId: request.vmId }),
    ...(request.pointId === null ? {} : { pointId: request.pointId }),
    onProgress: ({ doneBytes, totalBytes }) => {
      run.setShare(totalBytes === 0 ? 1 : doneBytes / totalBytes);
    },
  });
  for (const finding of report.findings) {
    const { severity, code, message, ...details } = finding;
    run.log(severity, { code, message, details });
  }
  return { kind: 'check', report };
}

/**
 * Makes the database's index of one repository anew from the manifests. All or nothing: an unreadable
 * manifest fails the run and leaves the index as it was.
 */
export async function executeRescan(context: EngineContext, run: ActiveRun): Promise<RunResult> {
  const repository = await openOfRun(context, run);
  await run.enter('discover');
  const now = toTimestamp(context.clock.nowMs());
  const vms: VmRow[] = [];
  const points: ReturnType<typeof toIndexRows>[] = [];
  for await (const { vm, points: manifests } of scanRepository(repository)) {
    run.signal.throwIfAborted();
    vms.push({
      id: vm.vmId,
      name: vm.name,
      createdAt: now,
      sourceKey: null,
      source: null,
      facts: null,
      disks: vm.disks.map(({ diskId, number, name, sizeBytes, sourceLineage }) => ({
        id: diskId,
        vmId: vm.vmId,
        number,
        name,
        sizeBytes,
        lineage: sourceLineage,
        source: null,
        facts: null,
      })),
    });
    points.push(...manifests.map(toIndexRows));
  }
  await run.enter('finalize');
  await run.insist(() =>
    context.db.points.replaceRepository(repository.marker.repositoryId, { vms, points }),
  );
  await followChanges({ context, run, repository }, new Set(points.map(({ point }) => point.id)));
  run.log('info', {
    code: 'RESCANNED',
    message: `found ${vms.length} virtual machines and ${points.length} points`,
  });
  return { kind: 'rescan', vms: vms.length, points: points.length };
}

/** Points that came or went between the reading of the manifests and the replacement of the index. */
async function followChanges(
  { context, run, repository }: { context: EngineContext; run: ActiveRun; repository: Repository },
  indexed: ReadonlySet<PointId>,
): Promise<void> {
  const gone = new Set(indexed);
  for await (const { points } of scanRepository(repository)) {
    for (const manifest of points) {
      gone.delete(manifest.pointId);
      if (indexed.has(manifest.pointId)) continue;
      const rows = toIndexRows(manifest);
      await run.insist(() => context.db.points.insert(rows.point, rows.layers));
    }
  }
  for (const pointId of gone) await run.insist(() => context.db.points.remove(pointId));
}

/** Removes a point nothing stands on: manifest first, then files, then the index. */
export async function executeDelete(context: EngineContext, run: ActiveRun): Promise<RunResult> {
  const { vmId, pointId } = run.row;
  if (vmId === null || pointId === null) throw new AppError('INTERNAL', 'a delete run without VM or point');
  const repository = await openOfRun(context, run);
  await run.enter('discover');
  await requireUnused(context, run.id, pointId);
  await using cleanup = new CleanupStack();
  const lease = cleanup.use(await repository.acquireVmLease(vmId, { runId: run.id, purpose: 'delete' }));
  await run.enter('finalize');
  const freedBytes = await deletePoint(repository, { vmId, pointId, lease });
  await run.insist(() => context.db.points.remove(pointId));
  run.log('info', { code: 'POINT_DELETED', message: `point ${pointId} is gone`, details: { freedBytes } });
  return { kind: 'delete', freedBytes };
}

/** A delete that ran before and died after the manifest went has nothing left to do here. */
async function deletePoint(
  repository: Repository,
  what: { vmId: VmId; pointId: PointId; lease: Parameters<Repository['deletePoint']>[2] },
): Promise<number> {
  try {
    return (await repository.deletePoint(what.vmId, what.pointId, what.lease)).freedBytes;
  } catch (error) {
    if (isErrorCode(error, 'POINT_NOT_FOUND')) return 0;
    throw error;
  }
}

/** POINT_IN_USE while another run works with the point, or an export needs its layers. */
export async function requireUnused(
  context: EngineContext,
  self: RunId | null,
  pointId: PointId,
): Promise<void> {
  const users = (await context.db.runs.countActiveForPoint(pointId)).filter((id) => id !== self);
  if (users.length > 0) {
    throw new AppError('POINT_IN_USE', `the point is used by ${users.length} active run(s)`, {
      details: { runIds: users },
    });
  }
  const exports = (await context.db.exports.listAll({ pointId })).filter(isPinning);
  if (exports.length > 0) {
    throw new AppError('POINT_IN_USE', `the point is published by ${exports.length} export(s)`, {
      details: { exportIds: exports.map(({ id }) => id) },
    });
  }
}
