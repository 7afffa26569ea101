import { createHash } from 'node:crypto';
import type { Request, RequestHandler, Response } from 'express';
import type { Actor, Engine } from '../engine/engine.js';
import type { Clock } from '../lib/clock.js';
import { AppError } from '../lib/errors.js';

const WINDOW_MS = 60_000;
const MAX_FAILURES = 30;
const MAX_ADDRESSES = 1024;
const MAX_KNOWN_TOKENS = 1024;
const BEARER = /^bearer ([\x21-\x7e]{1,512})$/i;
/** The only route that answers without a token. */
const OPEN_ROUTE = { method: 'GET', url: '/api/v1/health' };

/** Drops the oldest entry when the map is full: memory stays bounded whatever the clients send. */
function setBounded<T>(map: Map<string, T>, entry: { key: string; value: T; max: number }): void {
  map.delete(entry.key);
  map.set(entry.key, entry.value);
  if (map.size > entry.max) {
    const oldest = map.keys().next();
    if (oldest.done !== true) map.delete(oldest.value);
  }
}

/**
 * Counts failed tokens by client address. Past the limit, tokens that never worked are refused
 * without asking the engine; tokens that worked before still are asked, so a client with a wrong
 * token cannot lock its neighbours out.
 */
class FailureLimiter {
  readonly #failures = new Map<string, { count: number; windowEndMs: number }>();
  readonly #knownTokens = new Map<string, true>();

  constructor(private readonly clock: Clock) {}

  refuseWhenExhausted(address: string, tokenHash: string): void {
    const entry = this.#failures.get(address);
    if (entry === undefined || entry.count < MAX_FAILURES || this.#knownTokens.has(tokenHash)) return;
    const leftMs = entry.windowEndMs - this.clock.monotonicMs();
    if (leftMs <= 0) {
      this.#failures.delete(address);
      return;
    }
    throw new AppError('TOO_MANY_REQUESTS', 'too many wrong tokens came from this address', {
      details: { retryAfterSeconds: Math.ceil(leftMs / 1000) },
    });
  }

  succeeded(tokenHash: string): void {
    setBounded(this.#knownTokens, { key: tokenHash, value: true, max: MAX_KNOWN_TOKENS });
  }

  failed(address: string, tokenHash: string): void {
    this.#knownTokens.delete(tokenHash);
    const now = this.clock.monotonicMs();
    const entry = this.#failures.get(address);
    const isOpen = entry !== undefined && entry.windowEndMs > now;
    const value = isOpen ? { ...entry, count: entry.count + 1 } : { count: 1, windowEndMs: now + WINDOW_MS };
    setBounded(this.#failures, { key: address, value, max: MAX_ADDRESSES });
  }
}

/**
 * Lets a request on only with a token the engine knows. Runs before the body is read and before
 * routing, so that also an unknown route answers 401 without a token.
 */
export function authenticate(engine: Engine, clock: Clock): RequestHandler {
  const limiter = new FailureLimiter(clock);
  return async (req, res, next) => {
    const isOpen = req.method === OPEN_ROUTE.method && req.originalUrl === OPEN_ROUTE.url;
    if (!isOpen) res.locals['actor'] = await findActor(engine, limiter, req);
    next();
  };
}

async function findActor(engine: Engine, limiter: FailureLimiter, req: Request): Promise<Actor> {
  const secret = BEARER.exec(req.headers.authorization ?? '')?.[1];
  if (secret === undefined) throw new AppError('UNAUTHENTICATED', 'no bearer token was sent');
  const address = req.socket.remoteAddress ?? '';
  const tokenHash = createHash('sha256').update(secret).digest('hex');
  limiter.refuseWhenExhausted(address, tokenHash);
  const actor = await engine.authenticate(secret);
  if (actor === null) {
    limiter.failed(address, tokenHash);
    throw new AppError('UNAUTHENTICATED', 'the token is unknown or revoked');
  }
  limiter.succeeded(tokenHash);
  return actor;
}

/** Who sent the request; null only on the open route. */
export function actorOf(res: Response): Actor | null {
  return (res.locals['actor'] as Actor | undefined) ?? null;
}
