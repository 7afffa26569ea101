import { createHash } from 'node:crypto';
import type { Request } from 'express';
import { z } from 'zod';
import type { Actor, Engine, IdempotencyKey } from '../engine/engine.js';
import { AppError } from '../lib/errors.js';
import type { Logger } from '../lib/log.js';
import type { UntypedAnswer } from './operation.js';

/** What is kept of an answer: its body, and the header that goes with it. */
const storedSchema = z.object({ location: z.string().optional(), body: z.unknown() });

/** The key of this request, or null when it has none. */
export function idempotencyKeyOf(
  req: Request,
  actor: Actor | null,
  takesIdempotencyKey: boolean,
): IdempotencyKey | null {
  const key = req.get('idempotency-key');
  if (key === undefined || actor === null || req.method !== 'POST') return null;
  if (!takesIdempotencyKey) {
    throw new AppError(
      'INVALID_INPUT',
      'this route takes no Idempotency-Key: its answer holds a secret that is not kept',
    );
  }
  const content = [req.method, req.originalUrl, JSON.stringify(req.body ?? null)].join('\n');
  return {
    tokenId: actor.tokenId,
    key,
    requestHash: createHash('sha256').update(content).digest('hex'),
  };
}

/** Does the work once for each key: a repeated request gets the first answer. Failures free the key. */
export async function answerOnce(
  context: { engine: Engine; logger: Logger; key: IdempotencyKey },
  work: () => Promise<UntypedAnswer>,
): Promise<UntypedAnswer> {
  const { engine, logger, key } = context;
  const earlier = await engine.findIdempotent(key);
  if (earlier !== null) {
    const { location, body } = storedSchema.parse(earlier.body);
    return { status: earlier.status, body, ...(location === undefined ? {} : { location }) };
  }
  let answer: UntypedAnswer;
  try {
    answer = await work();
  } catch (error) {
    await engine.dropIdempotent(key).catch((dropError: unknown) => {
      // The request's own error is what the client must see; the key frees itself when it expires.
      logger.error({ err: dropError }, 'idempotency key not freed');
    });
    throw error;
  }
  const stored = {
    body: answer.body,
    ...(answer.location === undefined ? {} : { location: answer.location }),
  };
  await engine.saveIdempotent(key, { status: answer.status, body: stored }).catch((error: unknown) => {
    // The work is done and must be answered; a repetition meets CONFLICT and is not done twice.
    logger.error({ err: error }, 'idempotent answer not kept');
  });
  return answer;
}
