import { AppError } from '../lib/errors.js';
import type { TokenId } from '../lib/id.js';
import { checkLength, fromJson, MAX_NAME_LENGTH, toJson, uniqueKey } from './columns.js';
import type { IdempotencyRow, IdempotencyTable } from './database.js';
import type { Session } from './session.js';

interface IdempotencyRecord {
  token_id: TokenId;
  request_key: string;
  unique_key: string;
  request_hash: string;
  created_at: string;
  status: number | null;
  body: string;
}

export function createIdempotencyTable(session: Session): IdempotencyTable {
  return {
    begin: (row, expireBefore) => begin(session, row, expireBefore),
    async finish(tokenId, key, answer) {
      const count = await session.run('recording an answer', (db) =>
        db<IdempotencyRecord>('idempotency_keys')
          .where({ token_id: tokenId, unique_key: uniqueKey(key) })
          .update({ status: answer.status, body: toJson(answer.body) }),
      );
      if (count === 0) throw new AppError('NOT_FOUND', 'the idempotency key is not there');
    },
    async remove(tokenId, key) {
      await session.run('dropping an idempotency key', (db) =>
        db<IdempotencyRecord>('idempotency_keys')
          .where({ token_id: tokenId, unique_key: uniqueKey(key) })
          .delete(),
      );
    },
  };
}

/** The token's row is locked, so that of two equal requests at once exactly one inserts the key. */
async function begin(
  session: Session,
  row: IdempotencyRow,
  expireBefore: string,
): Promise<IdempotencyRow | null> {
  checkLength(row.key, MAX_NAME_LENGTH, 'Idempotency-Key');
  const record = toRecord(row);
  return session.transaction('recording an idempotency key', async (trx) => {
    await trx<IdempotencyRecord>('idempotency_keys').where('created_at', '<', expireBefore).delete();
    await trx('tokens').where({ id: row.tokenId }).forUpdate().first('id');
    const earlier = await trx<IdempotencyRecord>('idempotency_keys')
      .where({ token_id: row.tokenId, unique_key: record.unique_key })
      .first();
    if (earlier !== undefined) return toRow(earlier);
    await trx<IdempotencyRecord>('idempotency_keys').insert(record);
    return null;
  });
}

function toRecord(row: IdempotencyRow): IdempotencyRecord {
  return {
    token_id: row.tokenId,
    request_key: row.key,
    unique_key: uniqueKey(row.key),
    request_hash: row.requestHash,
    created_at: row.createdAt,
    status: row.status,
    body: toJson(row.body),
  };
}

function toRow(record: IdempotencyRecord): IdempotencyRow {
  return {
    tokenId: record.token_id,
    key: record.request_key,
    requestHash: record.request_hash,
    createdAt: record.created_at,
    status: record.status,
    body: fromJson(record.body),
  };
}
