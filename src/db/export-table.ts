import type { Knex } from 'knex';
import { AppError, isErrorCode } from '../lib/errors.js';
import type { DiskId, ExportId, PointId, RunId, VolumeId } from '../lib/id.js';
import { checkLength, fromJson, MAX_EXPORT_NAME_LENGTH, toJson } from './columns.js';
import { decodeCursor, toPage, whereBefore } from './cursor.js';
import type { ExportFilter, ExportRow, ExportTable, RowPage, RowPageRequest } from './database.js';
import type { Session } from './session.js';

interface ExportRecord {
  id: ExportId;
  name: string;
  kind: ExportRow['kind'];
  state: ExportRow['state'];
  point_id: PointId | null;
  disk_id: DiskId | null;
  run_id: RunId | null;
  volume_id: VolumeId | null;
  created_at: string;
  expires_at: string | null;
  facts: string;
}

const LIST = 'exports';

export function createExportTable(session: Session): ExportTable {
  return {
    insert: (row) => insert(session, row),
    async get(id) {
      const record = await session.run('reading an export', (db) =>
        db<ExportRecord>('exports').where({ id }).first(),
      );
      return record === undefined ? null : toRow(record);
    },
    list: (filter, page) => list(session, filter, page),
    async listAll(filter) {
      const records = await session.run('listing all exports', (db) =>
        filtered(db, filter).select<ExportRecord[]>('*').orderBy('created_at').orderBy('id'),
      );
      return records.map(toRow);
    },
    update: (id, change) => update(session, id, change),
    async remove(id) {
      await session.run('removing an export', (db) => db<ExportRecord>('exports').where({ id }).delete());
    },
  };
}

async function insert(session: Session, row: ExportRow): Promise<void> {
  checkLength(row.name, MAX_EXPORT_NAME_LENGTH, 'name');
  const record = toRecord(row);
  try {
    await session.run('recording an export', (db) => db<ExportRecord>('exports').insert(record));
  } catch (error) {
    if (!isErrorCode(error, 'CONFLICT')) throw error;
    throw await describeConflict(session, record, error);
  }
}

/** The other one may be gone again; then nothing names it. */
async function describeConflict(
  session: Session,
  { id, name }: ExportRecord,
  cause: unknown,
): Promise<AppError> {
  const other = await session.run('looking for the same export', (db) =>
    db<ExportRecord>('exports').where({ name }).orWhere({ id }).first('id', 'name'),
  );
  const field = other?.id === id && other.name !== name ? 'id' : 'name';
  const value = { id, name }[field];
  return new AppError('CONFLICT', `an export with the ${field} ${value} exists already`, {
    cause,
    details: { field, exportId: other?.id ?? null },
  });
}

async function list(
  session: Session,
  filter: ExportFilter,
  { limit, cursor }: RowPageRequest,
): Promise<RowPage<ExportRow>> {
  const before = cursor === null ? null : decodeCursor(LIST, cursor, 2);
  const records = await session.run('listing exports', (db) => {
    const query = filtered(db, filter)
      .select<ExportRecord[]>('*')
      .orderBy('created_at', 'desc')
      .orderBy('id', 'desc')
      .limit(limit + 1);
    if (before !== null) whereBefore(query, 'created_at', before);
    return query;
  });
  const rows = records.map(toRow);
  return toPage(rows, { list: LIST, limit, key: (row) => [row.createdAt, row.id] });
}

function filtered(
  db: Knex,
  { kind, pointId, runId, volumeId }: ExportFilter,
): Knex.QueryBuilder<ExportRecord> {
  const query = db<ExportRecord>('exports');
  if (kind !== undefined) void query.where('kind', kind);
  if (pointId !== undefined) void query.where('point_id', pointId);
  if (runId !== undefined) void query.where('run_id', runId);
  if (volumeId !== undefined) void query.where('volume_id', volumeId);
  return query;
}

async function update(
  session: Session,
  id: ExportId,
  { state, expiresAt, facts }: Parameters<ExportTable['update']>[1],
): Promise<void> {
  const columns: Partial<ExportRecord> = {
    ...(state === undefined ? {} : { state }),
    ...(expiresAt === undefined ? {} : { expires_at: expiresAt }),
    ...(facts === undefined ? {} : { facts: toJson(facts) }),
  };
  const count = await session.run('updating an export', (db) =>
    // The id again, so that an empty change still finds out whether the export is there.
    db<ExportRecord>('exports')
      .where({ id })
      .update({ id, ...columns }),
  );
  if (count === 0) throw new AppError('NOT_FOUND', `there is no export ${id}`, { details: { exportId: id } });
}

function toRecord(row: ExportRow): ExportRecord {
  return {
    id: row.id,
    name: row.name,
    kind: row.kind,
    state: row.state,
    point_id: row.pointId,
    disk_id: row.diskId,
    run_id: row.runId,
    volume_id: row.volumeId,
    created_at: row.createdAt,
    expires_at: row.expiresAt,
    facts: toJson(row.facts),
  };
}

function toRow(record: ExportRecord): ExportRow {
  return {
    id: record.id,
    name: record.name,
    kind: record.kind,
    state: record.state,
    pointId: record.point_id,
    diskId: record.disk_id,
    runId: record.run_id,
    volumeId: record.volume_id,
    createdAt: record.created_at,
    expiresAt: record.expires_at,
    facts: fromJson(record.facts),
  };
}
