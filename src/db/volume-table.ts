import type { Knex } from 'knex';
import { AppError, isErrorCode } from '../lib/errors.js';
import type { VolumeId } from '../lib/id.js';
import { toJson, uniqueKey } from './columns.js';
import { decodeCursor, toPage } from './cursor.js';
import type { DeviceMappingRow, RowPage, RowPageRequest, VolumeRow, VolumeTable } from './database.js';
import type { Session } from './session.js';
import {
  toIdentityColumns,
  toMappingRecord,
  toNameColumns,
  toVolumeRecord,
  toVolumeRow,
  type JoinedRecord,
  type MappingRecord,
  type VolumeRecord,
} from './volume-record.js';

const LIST = 'volumes';

export function createVolumeTable(session: Session): VolumeTable {
  return {
    insert: (row) => insert(session, row),
    get: (id) => findOne(session, { id }),
    findByName: (name) => findOne(session, { name_key: uniqueKey(name) }),
    list: (page) => list(session, page),
    async listAttached() {
      const records = await session.run('listing attached volumes', (db) =>
        joined(db).whereNotNull('device_mappings.volume_id').orderBy('volumes.id'),
      );
      return records.map(toVolumeRow);
    },
    update: (id, change) => update(session, id, change),
    attach: (id, mapping) => attach(session, id, mapping),
    updateMapping: (id, mapping) => updateMapping(session, id, mapping),
    async detach(id) {
      await session.run('detaching a volume', (db) =>
        db<MappingRecord>('device_mappings').where({ volume_id: id }).delete(),
      );
    },
    remove: (id) => remove(session, id),
  };
}

/** Volumes with their mappings: both appear and go at once. */
function joined(db: Knex): Knex.QueryBuilder<VolumeRecord & MappingRecord, JoinedRecord[]> {
  return db<VolumeRecord>('volumes')
    .leftJoin<MappingRecord>('device_mappings', 'device_mappings.volume_id', 'volumes.id')
    .select<JoinedRecord[]>('volumes.*', 'device_mappings.*');
}

async function findOne(session: Session, where: Partial<VolumeRecord>): Promise<VolumeRow | null> {
  const [record] = await session.run('finding a volume', (db) => joined(db).where(where));
  return record === undefined ? null : toVolumeRow(record);
}

async function list(session: Session, { limit, cursor }: RowPageRequest): Promise<RowPage<VolumeRow>> {
  const after = cursor === null ? [] : decodeCursor(LIST, cursor, 1);
  const records = await session.run('listing volumes', (db) => {
    const query = joined(db)
      .orderBy('volumes.id')
      .limit(limit + 1);
    return after[0] === undefined ? query : query.where('volumes.id', '>', after[0]);
  });
  return toPage(records.map(toVolumeRow), { list: LIST, limit, key: (row) => [row.id] });
}

async function insert(session: Session, row: Omit<VolumeRow, 'mapping'>): Promise<void> {
  const record = toVolumeRecord(row);
  try {
    await session.run('recording a volume', (db) => db<VolumeRecord>('volumes').insert(record));
  } catch (error) {
    if (!isErrorCode(error, 'CONFLICT')) throw error;
    throw await describeConflict(session, record, error);
  }
}

/** Which of the unique columns it was: drivers say it only in their message. */
async function describeConflict(
  session: Session,
  { id, name, name_key, identity, identity_key }: VolumeRecord,
  cause: unknown,
): Promise<AppError> {
  const found = await session.run('looking for the same volume', (db) =>
    db<VolumeRecord>('volumes').where({ name_key }).orWhere({ identity_key }).orWhere({ id }),
  );
  const others = found.filter((other) => other.id !== id);
  const sameName = others.find((other) => other.name_key === name_key);
  const sameIdentity = others.find((other) => other.identity_key === identity_key);
  const field = sameName !== undefined ? 'name' : sameIdentity !== undefined ? 'identity' : 'id';
  const value = { name, identity, id }[field];
  const other = sameName ?? sameIdentity ?? found[0];
  return new AppError('CONFLICT', `a volume with the ${field} ${value} exists already`, {
    cause,
    details: { field, volumeId: other?.id ?? null },
  });
}

async function update(
  session: Session,
  id: VolumeId,
  { name, identity, sizeBytes, facts }: Parameters<VolumeTable['update']>[1],
): Promise<void> {
  const columns: Partial<VolumeRecord> = {
    ...(name === undefined ? {} : toNameColumns(name)),
    ...(identity === undefined ? {} : toIdentityColumns(identity)),
    ...(sizeBytes === undefined ? {} : { size_bytes: sizeBytes }),
    ...(facts === undefined ? {} : { facts: toJson(facts) }),
  };
  const one = (db: Knex): Knex.QueryBuilder<VolumeRecord, VolumeRecord[]> =>
    db<VolumeRecord>('volumes').where({ id });
  try {
    // The id again, so that an empty change still finds out whether the volume is there.
    const count = await session.run('updating a volume', (db) => one(db).update({ id, ...columns }));
    if (count === 0) throw noVolume(id);
  } catch (error) {
    if (!isErrorCode(error, 'CONFLICT')) throw error;
    const [own] = await session.run('reading a volume', (db) => one(db));
    throw own === undefined ? noVolume(id) : await describeConflict(session, { ...own, ...columns }, error);
  }
}

function noVolume(id: VolumeId): AppError {
  return new AppError('NOT_FOUND', `there is no volume ${id}`, { details: { volumeId: id } });
}

async function attach(session: Session, id: VolumeId, mapping: DeviceMappingRow): Promise<void> {
  const record = toMappingRecord(id, mapping);
  try {
    await session.run('attaching a volume', (db) => db<MappingRecord>('device_mappings').insert(record), {
      foreignKey: {
        code: 'NOT_FOUND',
        message: `there is no volume ${id}`,
        details: { volumeId: id },
      },
    });
  } catch (error) {
    if (!isErrorCode(error, 'CONFLICT')) throw error;
    throw await describeMapping(session, record, error);
  }
}

async function updateMapping(session: Session, id: VolumeId, mapping: DeviceMappingRow): Promise<void> {
  const record = toMappingRecord(id, mapping);
  try {
    const count = await session.run('following the device of a volume', (db) =>
      db<MappingRecord>('device_mappings').where({ volume_id: id }).update(record),
    );
    if (count === 0) {
      throw new AppError('NOT_FOUND', `the volume ${id} is not attached`, {
        details: { volumeId: id },
      });
    }
  } catch (error) {
    if (!isErrorCode(error, 'CONFLICT')) throw error;
    throw await describeMapping(session, record, error);
  }
}

/** Whose the device is: another volume's rather than this one's, because that is what was not known. */
async function describeMapping(
  session: Session,
  { volume_id, device_path, path_key, device_number }: MappingRecord,
  cause: unknown,
): Promise<AppError> {
  const others = await session.run('looking for the same device', (db) =>
    db<MappingRecord>('device_mappings')
      .where({ path_key })
      .orWhere({ device_number })
      .orWhere({ volume_id }),
  );
  const other = others.find((mapping) => mapping.volume_id !== volume_id) ?? others[0];
  const isItself = other?.volume_id === volume_id;
  const message = isItself
    ? `the volume ${volume_id} is attached already, as ${other.device_path}`
    : `the device ${device_path} (${device_number}) belongs to another volume`;
  return new AppError('CONFLICT', message, {
    cause,
    details: { volumeId: other?.volume_id ?? null, devicePath: other?.device_path ?? null },
  });
}

/** The foreign key of the mapping refuses it. */
async function remove(session: Session, id: VolumeId): Promise<boolean> {
  const count = await session.run(
    'removing a volume',
    (db) => db<VolumeRecord>('volumes').where({ id }).delete(),
    {
      foreignKey: {
        code: 'CONFLICT',
        message: `the volume ${id} is attached`,
        details: { volumeId: id },
      },
    },
  );
  return count === 1;
}
