import type { PointManifest, Repository } from '../../repository/index.js';
import type { PointRow } from '../db/database.js';
import { AppError } from '../lib/errors.js';
import { newId, type PointId } from '../lib/id.js';
import type { EngineContext } from './context.js';
import type { Engine } from './engine.js';
import { requireUnused } from './maintenance.js';
import { startRun } from './run-use-cases.js';
import { toBackupView, toChainView } from './views.js';

type BackupUseCases = Pick<
  Engine,
  | 'requestBackup'
  | 'listBackups'
  | 'getBackup'
  | 'getBackupChain'
  | 'getBackupStats'
  | 'requestDelete'
  | 'requestRestore'
>;

export function createBackupUseCases(context: EngineContext): BackupUseCases {
  const { db } = context;
  const getRow = async (id: PointId): Promise<PointRow> => {
    const row = await db.points.get(id);
    if (row === null) throw new AppError('POINT_NOT_FOUND', `there is no recovery point ${id}`);
    return row;
  };
  return {
    async requestBackup(input, actor) {
      const vm = await db.vms.get(input.vmId);
      if (vm === null) throw new AppError('NOT_FOUND', `there is no virtual machine ${input.vmId}`);
      if ((await db.repositories.get(input.repositoryId)) === null) {
        throw new AppError('NOT_FOUND', `there is no repository ${input.repositoryId}`);
      }
      for (const { diskId } of input.bitmaps) {
        if (vm.disks.some(({ id }) => id === diskId)) continue;
        throw new AppError('INVALID_INPUT', `disk ${diskId} is none of ${vm.name}`, {
          details: { field: 'bitmaps', diskId },
        });
      }
      const { type, bitmaps, bytesPerSecond } = input;
      return startRun(
        context,
        {
          kind: 'backup',
          repositoryId: input.repositoryId,
          vmId: input.vmId,
          pointId: newId<PointId>(context.clock.nowMs()),
          request: { kind: 'backup', type, bitmaps, bytesPerSecond },
          turn: input.whenBusy === 'queue' ? 'wait' : 'refuse',
        },
        actor,
      );
    },
    async listBackups(filter, page) {
      const { rows, nextCursor } = await db.points.list(filter, page);
      return { items: rows.map(toBackupView), nextCursor };
    },
    async getBackup(id) {
      return toBackupView(await getRow(id));
    },
    async getBackupChain(id) {
      const row = await getRow(id);
      const repository = await context.repositories.open(row.repositoryId);
      const point = await repository.readPoint(row.vmId, id);
      const points = await standsOn(repository, point);
      return Promise.all(
        point.disks.map(async (disk) =>
          toChainView(disk, await repository.openChain(point, disk.diskId), points),
        ),
      );
    },
    async getBackupStats(filter) {
      const stats = await db.points.stats(filter);
      return { ...stats, incrementalPoints: stats.points - stats.fullPoints };
    },
    async requestDelete(id, actor) {
      const row = await getRow(id);
      const dependents = await db.points.dependents(id);
      if (dependents.length > 0) {
        throw new AppError('POINT_HAS_DEPENDENTS', `${dependents.length} point(s) stand on point ${id}`, {
          details: { dependents },
        });
      }
      await requireUnused(context, null, id);
      return startRun(
        context,
        {
          kind: 'delete',
          repositoryId: row.repositoryId,
          vmId: row.vmId,
          pointId: id,
          request: { kind: 'delete' },
          turn: 'refuse',
        },
        actor,
      );
    },
    async requestRestore(input, actor) {
      const row = await getRow(input.pointId);
      requireDistinctTargets(input.disks);
      return startRun(
        context,
        {
          kind: 'restore',
          repositoryId: row.repositoryId,
          vmId: row.vmId,
          pointId: input.pointId,
          request: {
            kind: 'restore',
            disks: input.disks,
            overwrite: input.overwrite,
            acceptDamage: input.acceptDamage,
          },
          turn: 'none',
        },
        actor,
      );
    },
  };
}

async function standsOn(repository: Repository, point: PointManifest): Promise<PointManifest[]> {
  const points = await repository.listPoints(point.vmId);
  return points.filter(({ sequence }) => sequence <= point.sequence);
}

/** Two disks written to one target would destroy each other. */
function requireDistinctTargets(disks: { diskId: string; target: { kind: string } }[]): void {
  if (disks.length === 0) {
    throw new AppError('INVALID_INPUT', 'no disk to restore was named', { details: { field: 'disks' } });
  }
  const seen = new Set<string>();
  for (const { diskId, target } of disks) {
    const place =
      'path' in target ? `path:${String(target.path)}` : `uri:${'uri' in target ? String(target.uri) : ''}`;
    for (const key of [`disk:${diskId}`, place]) {
      if (seen.has(key)) {
        throw new AppError('INVALID_INPUT', 'a disk or a target is named twice', {
          details: { field: 'disks' },
        });
      }
      seen.add(key);
    }
  }
}
