import type { PointManifest, Repository } from '../../repository/index.js';
import type { PointRow, VmRow } from '../db/database.js';
import { AppError } from '../lib/errors.js';
import { newId, type PointId } from '../lib/id.js';
import type { EngineContext } from './context.js';
import type { Actor, BackupRequest, Engine } from './engine.js';
import { estimateBackup } from './estimate.js';
import { requireVm } from './machine-use-cases.js';
import { requireUnused } from './maintenance.js';
import { startRun } from './run-use-cases.js';
import type { ChainView, RunView } from './types.js';
import { toBackupView, toChainView } from './views.js';

type BackupUseCases = Pick<
  Engine,
  | 'requestBackup'
  | 'estimateBackup'
  | 'listBackups'
  | 'getBackup'
  | 'getBackupChain'
  | 'getBackupStats'
  | 'requestDelete'
>;

export function createBackupUseCases(context: EngineContext): BackupUseCases {
  const { db } = context;
  return {
    requestBackup: (input, actor) => requestBackup(context, input, actor),
    async estimateBackup(input) {
      await requireBackupOf(context, input);
      return estimateBackup(context, input);
    },
    async listBackups(filter, page) {
      const { rows, nextCursor } = await db.points.list(filter, page);
      return { items: rows.map(toBackupView), nextCursor };
    },
    async getBackup(id) {
      return toBackupView(await requirePoint(context, id));
    },
    getBackupChain: (id) => readChains(context, id),
    async getBackupStats(filter) {
      const stats = await db.points.stats(filter);
      return { ...stats, incrementalPoints: stats.points - stats.fullPoints };
    },
    requestDelete: (id, actor) => requestDelete(context, id, actor),
  };
}

/** POINT_NOT_FOUND unless the index has it. */
export async function requirePoint(context: EngineContext, id: PointId): Promise<PointRow> {
  const row = await context.db.points.get(id);
  if (row === null) throw new AppError('POINT_NOT_FOUND', `there is no recovery point ${id}`);
  return row;
}

async function requestBackup(context: EngineContext, input: BackupRequest, actor: Actor): Promise<RunView> {
  await requireBackupOf(context, input);
  const { repositoryId, vmId, type, bitmaps, bytesPerSecond, consistency, disks, whenBusy } = input;
  const pointId = newId<PointId>(context.clock.nowMs());
  const request = { kind: 'backup' as const, type, bitmaps, bytesPerSecond, consistency, disks };
  return startRun(
    context,
    { kind: 'backup', repositoryId, vmId, pointId, request, turn: whenBusy === 'refuse' ? 'refuse' : 'wait' },
    actor,
  );
}

/** The VM, when both are there, and every disk that is named is one of the VM. */
export async function requireBackupOf(
  context: EngineContext,
  input: Pick<BackupRequest, 'vmId' | 'repositoryId' | 'bitmaps'>,
): Promise<VmRow> {
  const vm = await requireVm(context, input.vmId);
  if ((await context.db.repositories.get(input.repositoryId)) === null) {
    throw new AppError('NOT_FOUND', `there is no repository ${input.repositoryId}`);
  }
  for (const { diskId } of input.bitmaps) {
    if (vm.disks.some(({ id }) => id === diskId)) continue;
    throw new AppError('INVALID_INPUT', `disk ${diskId} is none of ${vm.name}`, {
      details: { field: 'bitmaps', diskId },
    });
  }
  return vm;
}

async function requestDelete(context: EngineContext, id: PointId, actor: Actor): Promise<RunView> {
  const { repositoryId, vmId } = await requirePoint(context, id);
  const dependents = await context.db.points.dependents(id);
  if (dependents.length > 0) {
    throw new AppError('POINT_HAS_DEPENDENTS', `${dependents.length} point(s) stand on point ${id}`, {
      details: { dependents },
    });
  }
  await requireUnused(context, null, id);
  const request = { kind: 'delete' as const };
  return startRun(
    context,
    { kind: 'delete', repositoryId, vmId, pointId: id, request, turn: 'refuse' },
    actor,
  );
}

async function readChains(context: EngineContext, id: PointId): Promise<ChainView[]> {
  const { repositoryId, vmId } = await requirePoint(context, id);
  const repository = await context.repositories.open(repositoryId);
  const point = await repository.readPoint(vmId, id);
  const points = await standsOn(repository, point);
  return Promise.all(
    point.disks.map(async (disk) =>
      toChainView(disk, await repository.openChain(point, disk.diskId), points),
    ),
  );
}

async function standsOn(repository: Repository, point: PointManifest): Promise<PointManifest[]> {
  const points = await repository.listPoints(point.vmId);
  return points.filter(({ sequence }) => sequence <= point.sequence);
}
