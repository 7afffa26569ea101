import type { HashAlgorithm } from '../nbd/index.js';
import type { RepositoryId } from '../lib/id.js';
import { AppError, isErrorCode } from '../lib/errors.js';
import { checkLength, MAX_NAME_LENGTH, MAX_ROOT_LENGTH, uniqueKey } from './columns.js';
import { decodeCursor, toPage } from './cursor.js';
import type { RepositoryRow, RepositoryTable } from './database.js';
import type { Session } from './session.js';

interface RepositoryRecord {
  id: RepositoryId;
  name: string;
  name_key: string;
  root: string;
  root_key: string;
  hash: HashAlgorithm;
  created_at: string;
}

const LIST = 'repositories';

export function createRepositoryTable(session: Session): RepositoryTable {
  return {
    insert: (row) => insert(session, row),
    async get(id) {
      const record = await session.run('reading a repository', (db) =>
        db<RepositoryRecord>('repositories').where({ id }).first(),
      );
      return record === undefined ? null : toRow(record);
    },
    async list({ limit, cursor }) {
      const after = cursor === null ? [] : decodeCursor(LIST, cursor, 1);
      const records = await session.run('listing repositories', (db) => {
        const query = db<RepositoryRecord>('repositories')
          .select('*')
          .orderBy('id')
          .limit(limit + 1);
        return after[0] === undefined ? query : query.where('id', '>', after[0]);
      });
      return toPage(records.map(toRow), { list: LIST, limit, key: (row) => [row.id] });
    },
  };
}

async function insert(session: Session, row: RepositoryRow): Promise<void> {
  checkLength(row.name, MAX_NAME_LENGTH, 'name');
  checkLength(row.root, MAX_ROOT_LENGTH, 'root');
  const record: RepositoryRecord = {
    id: row.id,
    name: row.name,
    name_key: uniqueKey(row.name),
    root: row.root,
    root_key: uniqueKey(row.root),
    hash: row.hash,
    created_at: row.createdAt,
  };
  try {
    await session.run('recording a repository', (db) => db<RepositoryRecord>('repositories').insert(record));
  } catch (error) {
    if (!isErrorCode(error, 'CONFLICT')) throw error;
    throw await describeConflict(session, record, error);
  }
}

/** Which of the unique columns it was: drivers say it only in their message. */
async function describeConflict(
  session: Session,
  { id, name_key, root_key, name, root }: RepositoryRecord,
  cause: unknown,
): Promise<AppError> {
  const others = await session.run('looking for the same repository', (db) =>
    db<RepositoryRecord>('repositories').where({ name_key }).orWhere({ root_key }).orWhere({ id }),
  );
  const sameName = others.find((other) => other.name_key === name_key);
  const field = sameName !== undefined ? 'name' : others.some((o) => o.root_key === root_key) ? 'root' : 'id';
  const value = { name, root, id }[field];
  return new AppError('CONFLICT', `a repository with the ${field} ${value} exists already`, {
    cause,
    details: { field, repositoryId: others[0]?.id ?? null },
  });
}

function toRow(record: RepositoryRecord): RepositoryRow {
  return {
    id: record.id,
    name: record.name,
    root: record.root,
    hash: record.hash,
    createdAt: record.created_at,
  };
}
