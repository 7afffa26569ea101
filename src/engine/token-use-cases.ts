import { createHash, randomBytes } from 'node:crypto';
import type { TokenRow } from '../db/database.js';
import { toTimestamp } from '../lib/clock.js';
import { AppError } from '../lib/errors.js';
import { newId, type TokenId } from '../lib/id.js';
import { audit } from './audit.js';
import type { EngineContext } from './context.js';
import type { Engine } from './engine.js';

type TokenUseCases = Pick<
  Engine,
  | 'createToken'
  | 'listTokens'
  | 'revokeToken'
  | 'authenticate'
  | 'findIdempotent'
  | 'saveIdempotent'
  | 'dropIdempotent'
>;

const SECRET_PREFIX = 'holdfast_';
const SECRET_BYTES = 32;
const KEEP_IDEMPOTENCY_MS = 24 * 3600_000;
/** `lastUsedAt` is for people: a write for each request would be waste. */
const TOUCH_INTERVAL_MS = 60_000;

/** The secret has 256 random bits, so a plain SHA-256 keeps it; nothing can be guessed from the hash. */
function hashOf(secret: string): string {
  return createHash('sha256').update(secret).digest('hex');
}

export function createTokenUseCases(context: EngineContext): TokenUseCases {
  const { db, clock } = context;
  const now = (): string => toTimestamp(clock.nowMs());
  return {
    async createToken(name, actor) {
      const secret = `${SECRET_PREFIX}${randomBytes(SECRET_BYTES).toString('base64url')}`;
      const row: TokenRow = {
        id: newId<TokenId>(clock.nowMs()),
        name,
        hash: hashOf(secret),
        createdAt: now(),
        lastUsedAt: null,
      };
      await db.tokens.insert(row);
      await audit(context, actor, { action: 'token.create', subject: row.id, details: { name } });
      return { token: { id: row.id, name, createdAt: row.createdAt, lastUsedAt: null }, secret };
    },
    async listTokens() {
      return (await db.tokens.list()).map(({ id, name, createdAt, lastUsedAt }) => ({
        id,
        name,
        createdAt,
        lastUsedAt,
      }));
    },
    async revokeToken(id, actor) {
      if (!(await db.tokens.remove(id))) throw new AppError('NOT_FOUND', `there is no token ${id}`);
      await audit(context, actor, { action: 'token.revoke', subject: id, details: {} });
    },
    async authenticate(secret) {
      const row = await db.tokens.findByHash(hashOf(secret));
      if (row === null) return null;
      const usedMs = row.lastUsedAt === null ? 0 : Date.parse(row.lastUsedAt);
      if (clock.nowMs() - usedMs > TOUCH_INTERVAL_MS) await db.tokens.touch(row.id, now());
      return { tokenId: row.id, tokenName: row.name };
    },
    async findIdempotent(key) {
      const expireBefore = toTimestamp(clock.nowMs() - KEEP_IDEMPOTENCY_MS);
      const earlier = await db.idempotencyKeys.begin(
        { ...key, createdAt: now(), status: null, body: null },
        expireBefore,
      );
      if (earlier === null) return null;
      if (earlier.requestHash !== key.requestHash) {
        throw new AppError('IDEMPOTENCY_MISMATCH', 'this Idempotency-Key was used for another request');
      }
      if (earlier.status === null) {
        throw new AppError('CONFLICT', 'the first request with this Idempotency-Key is still under way');
      }
      return { status: earlier.status, body: earlier.body };
    },
    saveIdempotent: (key, answer) => db.idempotencyKeys.finish(key.tokenId, key.key, answer),
    dropIdempotent: (key) => db.idempotencyKeys.remove(key.tokenId, key.key),
  };
}
