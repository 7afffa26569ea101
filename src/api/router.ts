import express, { Router, type Request, type RequestHandler, type Response } from 'express';
import * as OpenApiValidator from 'express-openapi-validator';
import type { Engine } from '../engine/engine.js';
import type { Clock } from '../lib/clock.js';
import { AppError } from '../lib/errors.js';
import type { Logger } from '../lib/log.js';
import { actorOf, authenticate } from './authentication.js';
import { normaliseContentType } from './edge.js';
import { sendEvents } from './event-stream.js';
import { createHandlers } from './handlers.js';
import { answerOnce, idempotencyKeyOf } from './idempotency.js';
import type { Handlers, UntypedAnswer, UntypedHandler } from './operation.js';
import type { Spec, SpecOperation } from './spec.js';

export interface RouterContext {
  engine: Engine;
  logger: Logger;
  clock: Clock;
  spec: Spec;
  maxBodyBytes: number;
  /** Aborts when the server closes. */
  closing: AbortSignal;
}

/** Everything under `/api`: token, body, schema, handler, in this order. Mount it at the root. */
export function apiRouter(context: RouterContext): Router {
  const { engine, spec } = context;
  const router = Router({ caseSensitive: true, strict: true });
  router.use((_req, res, next) => {
    res.setHeader('Cache-Control', 'no-store');
    next();
  });
  router.use(authenticate(engine, context.clock));
  router.use(normaliseContentType);
  router.use(express.json({ limit: context.maxBodyBytes, strict: true, inflate: false }));
  router.use(
    OpenApiValidator.middleware({
      apiSpec: spec.file,
      validateRequests: { allowUnknownQueryParameters: false, coerceTypes: false },
      validateResponses: true,
      // Tokens are checked above, before a body is read.
      validateSecurity: false,
      fileUploader: false,
    }),
  );
  const handlers = createHandlers(engine);
  for (const operation of inMatchOrder(spec.operations)) {
    const path = operation.path.replace(/^\/api/, '').replaceAll(/\{(\w+)\}/g, ':$1');
    router[operation.method](path, serve(context, operation, findHandler(handlers, operation)));
  }
  return router;
}

/** Fixed paths before those with parameters: `/backups/stats` is no id. */
function inMatchOrder(operations: SpecOperation[]): SpecOperation[] {
  return [...operations].sort((a, b) => a.path.split('{').length - b.path.split('{').length);
}

function isOperation(handlers: Handlers, id: string): id is keyof Handlers {
  return Object.hasOwn(handlers, id);
}

function findHandler(handlers: Handlers, { operationId }: SpecOperation): UntypedHandler {
  if (!isOperation(handlers, operationId)) {
    throw new AppError('INTERNAL', `operation ${operationId} of openapi.yaml has no handler`);
  }
  // The validator has made the request what the operation's types say before the handler sees it.
  return handlers[operationId] as UntypedHandler;
}

function serve(context: RouterContext, operation: SpecOperation, handler: UntypedHandler): RequestHandler {
  const { engine, logger, closing } = context;
  return async (req, res) => {
    if (!('openapi' in req)) {
      throw new AppError('INTERNAL', `request for ${operation.operationId} was not validated`);
    }
    const actor = actorOf(res);
    const gone = new AbortController();
    res.once('close', () => {
      gone.abort();
    });
    const signal = AbortSignal.any([gone.signal, closing]);
    const key = idempotencyKeyOf(req, actor, operation.takesIdempotencyKey);
    const work = (): Promise<UntypedAnswer> =>
      handler({ params: req.params, query: req.query, body: bodyOf(req), actor, signal });
    const answer = key === null ? await work() : await answerOnce({ engine, logger, key }, work);
    if (answer.stream !== undefined) await sendEvents(res, answer.stream, { signal, logger });
    else sendAnswer(res, answer);
  };
}

function bodyOf(req: Request): unknown {
  return req.body;
}

function sendAnswer(res: Response, answer: UntypedAnswer): void {
  if (answer.location !== undefined) res.location(answer.location);
  res.status(answer.status);
  if (answer.body === undefined) res.end();
  else res.json(answer.body);
}
