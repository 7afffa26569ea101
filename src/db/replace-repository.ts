import type { Knex } from 'knex';
import { AppError } from '../lib/errors.js';
import type { PointId, RepositoryId } from '../lib/id.js';
import { chunks, CHUNK_ROWS, MAX_NAME_LENGTH, uniqueKey } from './columns.js';
import type { LayerRow, PointRow, VmRow } from './database.js';
import { insertPoints, type PointRecord } from './point-record.js';
import { toDiskRecord, toVmRecord, type DiskRecord, type VmRecord } from './vm-record.js';

export interface RepositoryContent {
  vms: VmRow[];
  points: { point: PointRow; layers: LayerRow[] }[];
}

/** Replaces what is known of one repository, inside the caller's transaction. */
export async function replaceRepository(
  trx: Knex,
  repositoryId: RepositoryId,
  content: RepositoryContent,
): Promise<void> {
  const known = await trx<{ id: RepositoryId }>('repositories')
    .where({ id: repositoryId })
    .forUpdate()
    .first('id');
  if (known === undefined) {
    throw new AppError('NOT_FOUND', `there is no repository ${repositoryId}`, { details: { repositoryId } });
  }
  const foreign = content.points.find(({ point }) => point.repositoryId !== repositoryId);
  if (foreign !== undefined) {
    throw new AppError('INVALID_INPUT', 'a point of another repository is in the list', {
      details: { pointId: foreign.point.id, repositoryId: foreign.point.repositoryId },
    });
  }
  await removePoints(trx, repositoryId);
  await addMissingVms(trx, content.vms);
  await insertPoints(trx, content.points);
}

async function removePoints(trx: Knex, repositoryId: RepositoryId): Promise<void> {
  const ids = await trx<PointRecord>('recovery_points')
    .where({ repository_id: repositoryId })
    .pluck<PointId[]>('id');
  for (const some of chunks(ids, CHUNK_ROWS)) {
    await trx<PointRecord>('recovery_points').whereIn('id', some).delete();
  }
}

async function addMissingVms(trx: Knex, vms: VmRow[]): Promise<void> {
  for (const vm of vms) {
    const known = await trx<VmRecord>('vms').where({ id: vm.id }).first('id');
    if (known === undefined) await trx<VmRecord>('vms').insert(toVmRecord(await withFreeName(trx, vm)));
    const knownDisks = new Set(await trx<DiskRecord>('vm_disks').where({ vm_id: vm.id }).pluck('id'));
    const missing = vm.disks.filter((disk) => !knownDisks.has(disk.id)).map(toDiskRecord);
    for (const some of chunks(missing, CHUNK_ROWS)) await trx<DiskRecord>('vm_disks').insert(some);
  }
}

/** A VM of the repository may be called like another one that is configured here: its id is put behind the name. */
async function withFreeName(trx: Knex, vm: VmRow): Promise<VmRow> {
  const taken = await trx<VmRecord>('vms')
    .where({ name_key: uniqueKey(vm.name) })
    .first('id');
  if (taken === undefined) return vm;
  const suffix = ` (${vm.id})`;
  return { ...vm, name: vm.name.slice(0, MAX_NAME_LENGTH - suffix.length) + suffix };
}
