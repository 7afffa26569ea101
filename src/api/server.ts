import { once } from 'node:events';
import { readFile } from 'node:fs/promises';
import { createServer, type Server } from 'node:http';
import { createServer as createTlsServer } from 'node:https';
import type { Express } from 'express';
import { withDeadline } from '../lib/deadline.js';
import { AppError, errnoOf } from '../lib/errors.js';
import { createApi, isTls, type ApiConfig, type ApiOptions } from './app.js';

/** A request must have arrived whole within this time. */
const REQUEST_TIMEOUT_MS = 30_000;
/** How long answers under way may take to end when the server closes. */
const CLOSE_GRACE_MS = 3000;

export interface ApiServer extends AsyncDisposable {
  readonly host: string;
  /** The port really taken. */
  readonly port: number;
  readonly url: string;
  /** Stops listening, ends event streams, gives answers under way a few seconds, then cuts them. Idempotent. */
  [Symbol.asyncDispose](): Promise<void>;
}

/** Starts the API server. CONFIG_INVALID when the address cannot be listened on. The caller disposes it. */
export async function startApi(options: Omit<ApiOptions, 'closing'>): Promise<ApiServer> {
  const closing = new AbortController();
  const app = createApi({ ...options, closing: closing.signal });
  const server = await createHttpServer(options.config.listen, app);
  server.on('request', (_req, res) => {
    res.once('close', () => {
      // A connection that falls idle while the server closes is not noticed by close() itself.
      if (closing.signal.aborted)
        setImmediate(() => {
          server.closeIdleConnections();
        });
    });
  });
  const { host, port: wantedPort } = options.config.listen;
  await listen(server, host, wantedPort);
  const address = server.address();
  const port = typeof address === 'object' && address !== null ? address.port : wantedPort;
  let closed: Promise<void> | undefined;
  return {
    host,
    port,
    url: `${isTls(options.config.listen) ? 'https' : 'http'}://${host.includes(':') ? `[${host}]` : host}:${port}`,
    [Symbol.asyncDispose]: () => (closed ??= close(server, closing)),
  };
}

async function createHttpServer({ tls }: ApiConfig['listen'], app: Express): Promise<Server> {
  const limits = { requestTimeout: REQUEST_TIMEOUT_MS };
  const { certificate, key } = tls ?? { certificate: null, key: null };
  if (certificate === null || key === null) return createServer(limits, app);
  try {
    const secure = { cert: await readFile(certificate), key: await readFile(key) };
    return createTlsServer({ ...limits, ...secure, minVersion: 'TLSv1.2' }, app);
  } catch (error) {
    throw new AppError('CONFIG_INVALID', 'the certificate or key of the API cannot be used', {
      cause: error,
      details: { certificate, key },
    });
  }
}

async function listen(server: Server, host: string, port: number): Promise<void> {
  server.listen(port, host);
  try {
    await once(server, 'listening');
  } catch (error) {
    throw new AppError('CONFIG_INVALID', `cannot listen on ${host}:${port} (${errnoOf(error) ?? 'error'})`, {
      cause: error,
    });
  }
}

async function close(server: Server, closing: AbortController): Promise<void> {
  const closed = once(server, 'close');
  server.close();
  closing.abort();
  server.closeIdleConnections();
  try {
    await withDeadline(closed, { timeoutMs: CLOSE_GRACE_MS, what: 'closing the API server' });
  } catch (error) {
    if (!(error instanceof AppError)) throw error;
    server.closeAllConnections();
    await closed;
  }
}
