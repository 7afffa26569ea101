import type { TokenId } from '../lib/id.js';
import { checkLength, MAX_NAME_LENGTH } from './columns.js';
import type { TokenRow, TokenTable } from './database.js';
import type { Session } from './session.js';

interface TokenRecord {
  id: TokenId;
  name: string;
  hash: string;
  created_at: string;
  last_used_at: string | null;
}

export function createTokenTable(session: Session): TokenTable {
  return {
    async insert(row) {
      checkLength(row.name, MAX_NAME_LENGTH, 'name');
      await session.run('recording a token', (db) => db<TokenRecord>('tokens').insert(toRecord(row)), {
        unique: { message: 'the token exists already', details: { field: 'hash' } },
      });
    },
    async findByHash(hash) {
      const record = await session.run('reading a token', (db) =>
        db<TokenRecord>('tokens').where({ hash }).first(),
      );
      return record === undefined ? null : toRow(record);
    },
    async list() {
      const records = await session.run('listing tokens', (db) =>
        db<TokenRecord>('tokens').select('*').orderBy('created_at').orderBy('id'),
      );
      return records.map(toRow);
    },
    async remove(id) {
      const count = await session.run('removing a token', (db) =>
        db<TokenRecord>('tokens').where({ id }).delete(),
      );
      return count === 1;
    },
    async touch(id, at) {
      await session.run('marking a token as used', (db) =>
        db<TokenRecord>('tokens').where({ id }).update({ last_used_at: at }),
      );
    },
  };
}

function toRecord(row: TokenRow): TokenRecord {
  return {
    id: row.id,
    name: row.name,
    hash: row.hash,
    created_at: row.createdAt,
    last_used_at: row.lastUsedAt,
  };
}

function toRow(record: TokenRecord): TokenRow {
  return {
    id: record.id,
    name: record.name,
    hash: record.hash,
    createdAt: record.created_at,
    lastUsedAt: record.last_used_at,
  };
}
