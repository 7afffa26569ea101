import { request as httpRequest } from 'node:http';
import type { Clock } from '../../src/lib/clock.js';
import { silentLogger, type Logger } from '../../src/lib/log.js';
import { startApi, type ApiConfig, type ApiServer } from '../../src/api/index.js';
import { FakeEngine } from './fake-engine.js';

export interface ApiFixture extends AsyncDisposable {
  engine: FakeEngine;
  server: ApiServer;
  token: string;
  /** A request with the token; `token: null` sends none. */
  call(method: string, path: string, options?: CallOptions): Promise<Answer>;
}

export interface CallOptions {
  body?: unknown;
  /** Sent as it is, instead of `body`. */
  text?: string;
  headers?: Record<string, string>;
  token?: string | null;
}

export interface Answer {
  status: number;
  headers: Headers;
  text: string;
  json: unknown;
}

export async function startFixture(
  options: { logger?: Logger; clock?: Clock; config?: Partial<ApiConfig> } = {},
): Promise<ApiFixture> {
  const engine = new FakeEngine();
  const token = engine.addToken('test');
  const server = await startApi({
    engine,
    logger: options.logger ?? silentLogger(),
    ...(options.clock === undefined ? {} : { clock: options.clock }),
    config: { listen: { host: '127.0.0.1', port: 0 }, maxBodyBytes: 1024 * 1024, ...options.config },
  });
  return {
    engine,
    server,
    token,
    call: (method, path, callOptions = {}) => call(server, { method, path, token, ...callOptions }),
    [Symbol.asyncDispose]: () => server[Symbol.asyncDispose](),
  };
}

async function call(
  server: ApiServer,
  options: CallOptions & { method: string; path: string },
): Promise<Answer> {
  const body = options.text ?? (options.body === undefined ? undefined : JSON.stringify(options.body));
  const response = await fetch(server.url + options.path, {
    method: options.method,
    redirect: 'manual',
    signal: AbortSignal.timeout(10_000),
    headers: {
      ...(options.token === null ? {} : { authorization: `Bearer ${options.token}` }),
      ...(body === undefined ? {} : { 'content-type': 'application/json' }),
      ...options.headers,
    },
    ...(body === undefined ? {} : { body }),
  });
  const text = await response.text();
  const isJson = response.headers.get('content-type')?.includes('json') === true;
  return { status: response.status, headers: response.headers, text, json: isJson ? JSON.parse(text) : null };
}

/** A request with headers that fetch does not let through, such as Host. */
export function rawCall(
  server: ApiServer,
  options: { path: string; headers: Record<string, string> },
): Promise<{ status: number; text: string }> {
  return new Promise((resolve, reject) => {
    const { host, port } = server;
    const request = httpRequest({ host, port, path: options.path, headers: options.headers }, (response) => {
      let text = '';
      response.setEncoding('utf8');
      response.on('data', (chunk: string) => (text += chunk));
      response.on('end', () => {
        resolve({ status: response.statusCode ?? 0, text });
      });
    });
    request.setTimeout(10_000, () => request.destroy(new Error('no answer in 10 s')));
    request.on('error', reject);
    request.end();
  });
}

export const SAMPLE_VM = {
  name: 'web-01',
  disks: [
    { name: 'vda', source: { kind: 'nbd', uri: 'nbd://127.0.0.1:10809/vda', changeTracking: 'auto' } },
    {
      name: 'vdb',
      source: { kind: 'image', path: '/srv/vdb.raw', format: 'raw', changeTracking: 'compare' },
    },
  ],
};
