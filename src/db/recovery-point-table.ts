import type { Knex } from 'knex';
import type { PointId } from '../lib/id.js';
import { decodeCursor, toPage, whereBefore } from './cursor.js';
import type { PointFilter, PointRow, RecoveryPointTable, RowPage, RowPageRequest } from './database.js';
import {
  insertPoints,
  toPointRow,
  type LayerRecord,
  type ManifestRecord,
  type PointRecord,
} from './point-record.js';
import { replaceRepository } from './replace-repository.js';
import type { Session } from './session.js';

const LIST = 'points';

export function createRecoveryPointTable(session: Session): RecoveryPointTable {
  return {
    insert: (point, layers) => insert(session, { point, layers }),
    async get(id) {
      const rows = await readPoints(session, [id]);
      return rows[0] ?? null;
    },
    list: (filter, page) => list(session, filter, page),
    async remove(id) {
      // Manifest and layers go with it (ON DELETE CASCADE).
      await session.run('removing a point', (db) =>
        db<PointRecord>('recovery_points').where({ id }).delete(),
      );
    },
    dependents: (id) =>
      session.run('looking for dependent points', (db) =>
        db<LayerRecord>('layers as child')
          .join('layers as parent', 'parent.id', 'child.parent_layer_id')
          .where('parent.point_id', id)
          .whereNot('child.point_id', id)
          .distinct('child.point_id')
          .orderBy('child.point_id')
          .pluck<PointId[]>('child.point_id'),
      ),
    stats: (filter) => stats(session, filter),
    replaceRepository: (repositoryId, content) =>
      session.transaction('replacing the index of a repository', (trx) =>
        replaceRepository(trx, repositoryId, content),
      ),
  };
}

type NewPoint = Parameters<typeof insertPoints>[1][number];

async function insert(session: Session, entry: NewPoint): Promise<void> {
  const { point } = entry;
  const isThere = (db: Knex): Promise<boolean> =>
    db<PointRecord>('recovery_points')
      .where({ id: point.id })
      .first('id')
      .then((found) => found !== undefined);
  await session.transaction(
    'recording a point',
    async (trx) => {
      // Of two inserts of the same point at once the second waits here, and then finds it.
      await trx('vms').where({ id: point.vmId }).forUpdate().first('id');
      if (!(await isThere(trx))) await insertPoints(trx, [entry]);
    },
    {
      unique: {
        message: 'a layer of the point is recorded for another point already',
        details: { pointId: point.id },
      },
      foreignKey: {
        code: 'NOT_FOUND',
        message: 'the VM, a disk or the repository of the point does not exist',
        details: { vmId: point.vmId, repositoryId: point.repositoryId },
      },
    },
  );
}

/** First the ids of the page from an index, then only those rows with their manifests. */
async function list(
  session: Session,
  filter: PointFilter,
  { limit, cursor }: RowPageRequest,
): Promise<RowPage<PointRow>> {
  const before = cursor === null ? null : decodeCursor(LIST, cursor, 2);
  const keys = await session.run('listing points', (db) => {
    const query = filtered(db, filter)
      .select<Pick<PointRecord, 'id' | 'committed_at'>[]>('id', 'committed_at')
      .orderBy('committed_at', 'desc')
      .orderBy('id', 'desc')
      .limit(limit + 1);
    if (before !== null) whereBefore(query, 'committed_at', before);
    return query;
  });
  const page = toPage(keys, { list: LIST, limit, key: (row) => [row.committed_at, row.id] });
  const rows = await readPoints(
    session,
    page.rows.map((row) => row.id),
  );
  return { rows, nextCursor: page.nextCursor };
}

/** Newest first; a point removed meanwhile is left out. */
async function readPoints(session: Session, ids: PointId[]): Promise<PointRow[]> {
  if (ids.length === 0) return [];
  const records = await session.run('reading points', (db) =>
    db<PointRecord>('recovery_points')
      .join<ManifestRecord>('point_manifests', 'point_manifests.point_id', 'recovery_points.id')
      .whereIn('recovery_points.id', ids)
      .select<(PointRecord & ManifestRecord)[]>('recovery_points.*', 'point_manifests.manifest'),
  );
  const byId = new Map(records.map((record) => [record.id, record]));
  return ids.flatMap((id) => {
    const record = byId.get(id);
    return record === undefined ? [] : [toPointRow(record)];
  });
}

function filtered(db: Knex, { vmId, repositoryId }: PointFilter): Knex.QueryBuilder<PointRecord> {
  const query = db<PointRecord>('recovery_points');
  if (vmId !== undefined) void query.where('vm_id', vmId);
  if (repositoryId !== undefined) void query.where('repository_id', repositoryId);
  return query;
}

interface StatsRecord {
  points: number;
  full_points: number | string | null;
  vms: number;
  file_bytes: number | string | null;
  oldest: string | null;
  newest: string | null;
}

async function stats(session: Session, filter: PointFilter): ReturnType<RecoveryPointTable['stats']> {
  const record = await session.run('counting points', async (db) => {
    const rows = await filtered(db, filter).select<StatsRecord[]>(
      db.raw('count(*) as points'),
      db.raw(`sum(case when point_type = 'full' then 1 else 0 end) as full_points`),
      db.raw('count(distinct vm_id) as vms'),
      db.raw('sum(file_bytes) as file_bytes'),
      db.raw('min(captured_at) as oldest'),
      db.raw('max(captured_at) as newest'),
    );
    return rows[0];
  });
  // MariaDB answers sums as decimal text.
  return {
    points: record?.points ?? 0,
    fullPoints: Number(record?.full_points ?? 0),
    vms: record?.vms ?? 0,
    fileBytes: Number(record?.file_bytes ?? 0),
    oldestCapturedAt: record?.oldest ?? null,
    newestCapturedAt: record?.newest ?? null,
  };
}
