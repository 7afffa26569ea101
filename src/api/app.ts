import express, { type Express } from 'express';
import helmet from 'helmet';
import type { Engine } from '../engine/engine.js';
import { systemClock, type Clock } from '../lib/clock.js';
import { AppError } from '../lib/errors.js';
import type { Logger } from '../lib/log.js';
import { docsRouter } from './docs-page.js';
import { checkHost } from './edge.js';
import { problemHandler } from './problem.js';
import { apiRouter } from './router.js';
import { loadSpec } from './spec.js';

export interface ApiConfig {
  listen: {
    host: string;
    /** 0 takes a free one. */
    port: number;
    /** PEM files; both, or none for plain HTTP. */
    tls?: { certificate: string | null; key: string | null };
  };
  /** Bytes of a request body at the most. */
  maxBodyBytes: number;
}

export interface ApiOptions {
  engine: Engine;
  logger: Logger;
  config: ApiConfig;
  clock?: Clock;
  /** Ends open event streams when it aborts. */
  closing?: AbortSignal;
}

export function isTls({ tls }: ApiConfig['listen']): boolean {
  return typeof tls?.certificate === 'string' && typeof tls.key === 'string';
}

/** The express application: the API under `/api/v1`, its description at `/openapi.yaml` and `/docs/`. */
export function createApi(options: ApiOptions): Express {
  const { engine, config } = options;
  const logger = options.logger.child({ component: 'api' });
  const spec = loadSpec();
  const app = express();
  app.disable('x-powered-by');
  app.disable('etag');
  app.enable('case sensitive routing');
  app.enable('strict routing');
  app.use(checkHost);
  app.use(
    helmet({
      contentSecurityPolicy: {
        useDefaults: false,
        directives: {
          defaultSrc: ["'self'"],
          imgSrc: ["'self'", 'data:'],
          styleSrc: ["'self'", "'unsafe-inline'"],
          objectSrc: ["'none'"],
          baseUri: ["'none'"],
          formAction: ["'self'"],
          frameAncestors: ["'none'"],
        },
      },
      // A promise of TLS over plain HTTP would lock browsers out.
      strictTransportSecurity: isTls(config.listen),
    }),
  );
  app.use(docsRouter(spec));
  app.use(
    '/api',
    apiRouter({
      engine,
      logger,
      spec,
      clock: options.clock ?? systemClock,
      maxBodyBytes: config.maxBodyBytes,
      closing: options.closing ?? new AbortController().signal,
    }),
  );
  app.use(() => {
    throw new AppError('NOT_FOUND', 'there is nothing at this path');
  });
  app.use(problemHandler(logger));
  return app;
}
