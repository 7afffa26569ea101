import type { Knex } from 'knex';
import { AppError } from '../lib/errors.js';
import type { DiskId, RunId, VmId } from '../lib/id.js';
import { chunks, CHUNK_ROWS, toJson, uniqueKey } from './columns.js';
import { decodeCursor, toPage } from './cursor.js';
import type { RowPage, RowPageRequest, VmRow, VmTable } from './database.js';
import type { PointRecord } from './point-record.js';
import type { Session } from './session.js';
import { toDiskRecord, toVmRecord, toVmRow, type DiskRecord, type VmRecord } from './vm-record.js';

const LIST = 'vms';
/** Ids named in a refusal. */
const MAX_NAMED = 20;

export function createVmTable(session: Session): VmTable {
  return {
    insert: (vm) => insert(session, vm),
    get: (id) => findOne(session, { id }),
    findByName: (name) => findOne(session, { name_key: uniqueKey(name) }),
    findBySourceKey: (key) => findOne(session, { source_key: key }),
    async listBySourceKey(prefix) {
      const vms = await session.run('listing discovered VMs', (db) =>
        db<VmRecord>('vms')
          .whereRaw('substr(source_key, 1, ?) = ?', [characters(prefix), prefix])
          .orderBy('id'),
      );
      const disks = await readDisks(
        session,
        vms.map(({ id }) => id),
      );
      return vms.map((vm) => toVmRow(vm, disks));
    },
    follow: (vm) => follow(session, vm),
    findAdoptable: (lineagePrefix) => findAdoptable(session, lineagePrefix),
    list: (page) => list(session, page),
    updateDisk: (id, change) => updateDisk(session, id, change),
    remove: (id) => session.transaction('removing a VM', (trx) => remove(trx, id)),
  };
}

/** As `substr` of both engines counts: code points. */
function characters(text: string): number {
  return Array.from(text).length;
}

async function findOne(session: Session, where: Partial<VmRecord>): Promise<VmRow | null> {
  const vm = await session.run('finding a VM', (db) => db<VmRecord>('vms').where(where).first());
  return vm === undefined ? null : toVmRow(vm, await readDisks(session, [vm.id]));
}

async function findAdoptable(session: Session, lineagePrefix: string): Promise<VmRow | null> {
  const disk = await session.run('finding a VM by its disks', (db) =>
    db<DiskRecord>('vm_disks')
      .whereRaw('substr(lineage, 1, ?) = ?', [characters(lineagePrefix), lineagePrefix])
      .where('source', toJson(null))
      .orderBy('vm_id', 'desc')
      .first('vm_id'),
  );
  if (disk === undefined) return null;
  const vm = await findOne(session, { id: disk.vm_id });
  return vm?.sourceKey === null ? vm : null;
}

async function follow(session: Session, vm: VmRow): Promise<void> {
  const { id } = vm;
  // When it was recorded does not change.
  const change: Partial<VmRecord> = toVmRecord(vm);
  delete change.created_at;
  const disks = vm.disks.map(toDiskRecord);
  await session.transaction(
    'following a VM',
    async (trx) => {
      const count = await trx<VmRecord>('vms').where({ id }).update(change);
      if (count === 0) throw new AppError('NOT_FOUND', `there is no VM ${id}`, { details: { vmId: id } });
      const known = new Set(await trx<DiskRecord>('vm_disks').where({ vm_id: id }).pluck('id'));
      for (const disk of disks) {
        if (known.has(disk.id)) await trx<DiskRecord>('vm_disks').where({ id: disk.id }).update(disk);
        else await trx<DiskRecord>('vm_disks').insert(disk);
      }
    },
    {
      unique: {
        message: `a VM named ${vm.name}, or a disk with the same name or number, exists already`,
        details: { field: 'name', name: vm.name },
      },
    },
  );
}

async function insert(session: Session, vm: VmRow): Promise<void> {
  const record = toVmRecord(vm);
  const disks = vm.disks.map(toDiskRecord);
  await session.transaction(
    'recording a VM',
    async (trx) => {
      await trx<VmRecord>('vms').insert(record);
      for (const some of chunks(disks, CHUNK_ROWS)) await trx<DiskRecord>('vm_disks').insert(some);
    },
    {
      unique: {
        message: `a VM named ${vm.name}, or a disk with the same name or number, exists already`,
        details: { field: 'name', name: vm.name },
      },
    },
  );
}

function readDisks(session: Session, vmIds: VmId[]): Promise<DiskRecord[]> {
  return session.run('reading disks', (db) =>
    db<DiskRecord>('vm_disks').whereIn('vm_id', vmIds).orderBy('disk_number'),
  );
}

async function list(session: Session, { limit, cursor }: RowPageRequest): Promise<RowPage<VmRow>> {
  const after = cursor === null ? [] : decodeCursor(LIST, cursor, 1);
  const records = await session.run('listing VMs', (db) => {
    const query = db<VmRecord>('vms')
      .select('*')
      .orderBy('id')
      .limit(limit + 1);
    return after[0] === undefined ? query : query.where('id', '>', after[0]);
  });
  const page = toPage(records, { list: LIST, limit, key: (record) => [record.id] });
  const disks = await readDisks(
    session,
    page.rows.map((record) => record.id),
  );
  return { rows: page.rows.map((record) => toVmRow(record, disks)), nextCursor: page.nextCursor };
}

async function updateDisk(
  session: Session,
  id: DiskId,
  change: { sizeBytes?: number; lineage?: string; source?: unknown },
): Promise<void> {
  const columns: Partial<DiskRecord> = {
    ...(change.sizeBytes === undefined ? {} : { size_bytes: change.sizeBytes }),
    ...(change.lineage === undefined ? {} : { lineage: change.lineage }),
    ...(change.source === undefined ? {} : { source: toJson(change.source) }),
  };
  const count = await session.run('updating a disk', (db) =>
    // The id again, so that an empty change still finds out whether the disk is there.
    db<DiskRecord>('vm_disks')
      .where({ id })
      .update({ id, ...columns }),
  );
  if (count === 0) throw new AppError('NOT_FOUND', `there is no disk ${id}`, { details: { diskId: id } });
}

/** The locked VM row keeps new points and runs of it away: their foreign keys wait for it. */
async function remove(trx: Knex, id: VmId): Promise<void> {
  const vm = await trx<VmRecord>('vms').where({ id }).forUpdate().first('id');
  if (vm === undefined) throw new AppError('NOT_FOUND', `there is no VM ${id}`, { details: { vmId: id } });
  const activeRuns = await trx<{ id: RunId; vm_id: VmId; state: string }>('runs')
    .where({ vm_id: id })
    .whereIn('state', ['queued', 'running'])
    .limit(MAX_NAMED)
    .pluck('id');
  if (activeRuns.length > 0) {
    throw new AppError('CONFLICT', 'the VM has queued or running runs', { details: { runIds: activeRuns } });
  }
  const point = await trx<PointRecord>('recovery_points').where({ vm_id: id }).first('id');
  if (point !== undefined) {
    throw new AppError('CONFLICT', 'the VM has recovery points', { details: { vmId: id } });
  }
  await trx('runs').where({ vm_id: id }).update({ vm_id: null, pair_key: null });
  await trx('vm_disks').where({ vm_id: id }).delete();
  await trx('vms').where({ id }).delete();
}
