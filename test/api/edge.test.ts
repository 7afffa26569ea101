import { connect } from 'node:net';
import { Writable } from 'node:stream';
import { pino } from 'pino';
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest';
import { systemClock } from '../../src/lib/clock.js';
import { newUlid } from '../../src/lib/id.js';
import { loadSpec } from '../../src/api/spec.js';
import { rawCall, SAMPLE_VM, startFixture, type ApiFixture } from './fixture.js';

let api: ApiFixture;
beforeAll(async () => {
  api = await startFixture();
});
afterEach(() => {
  api.engine.requests.length = 0;
});
afterAll(async () => {
  await api[Symbol.asyncDispose]();
});

const NO_TOKEN_NEEDED = ['getHealth'];

describe('tokens at the edge', () => {
  const guarded = loadSpec().operations.filter(({ operationId }) => !NO_TOKEN_NEEDED.includes(operationId));
  let unhurried: ApiFixture;
  beforeAll(async () => {
    // A minute at each look, so that the wrong tokens do not add up to a limit.
    let minutes = 0;
    const clock = { ...systemClock, monotonicMs: () => (minutes += 1) * 60_000 };
    unhurried = await startFixture({ clock });
  });
  afterAll(async () => {
    await unhurried[Symbol.asyncDispose]();
  });
  test.each(guarded)('$operationId answers 401 without a token and with a wrong one', async (operation) => {
    const path = operation.path.replace('{id}', newUlid());
    for (const token of [null, 'wrong']) {
      const answer = await unhurried.call(operation.method.toUpperCase(), path, { token });
      expect(answer.status).toBe(401);
      expect(answer.headers.get('www-authenticate')).toBe('Bearer');
      expect(answer.json).toMatchObject({ code: 'UNAUTHENTICATED' });
    }
  });

  test.each([
    '/api',
    '/api/',
    '/api/v1',
    '/api/v1/nothing',
    '/api/v2/runs',
    '/api/v1/health/',
    '/api/v1/health?x=1',
  ])('unknown path %s answers 401 without a token, not 404', async (path) => {
    expect((await api.call('GET', path, { token: null })).status).toBe(401);
  });

  test('no spelling of the path leads around the token', async () => {
    const paths = [
      '//api/v1/runs',
      '/API/v1/runs',
      '/api/../api/v1/runs',
      '/%61pi/v1/runs',
      '/api/v1/./runs',
    ];
    for (const path of paths) {
      const answer = await rawCall(api.server, { path, headers: {} });
      expect([401, 404], path).toContain(answer.status);
    }
  });

  test('a token in the query or as basic authentication does not count', async () => {
    const query = await api.call('GET', `/api/v1/runs?access_token=${api.token}`, { token: null });
    expect(query.status).toBe(401);
    const headers = { authorization: `Basic ${Buffer.from(`x:${api.token}`).toString('base64')}` };
    expect((await api.call('GET', '/api/v1/runs', { token: null, headers })).status).toBe(401);
  });

  test('an unauthenticated body is not read: a million bytes answer 401', async () => {
    const answer = await api.call('POST', '/api/v1/vms', { token: null, body: { name: 'x'.repeat(1e6) } });
    expect(answer.status).toBe(401);
  });

  test('wrong tokens are slowed down; a token that works is not', async () => {
    await using limiting = await startFixture();
    const { call } = limiting;
    expect((await call('GET', '/api/v1/runs')).status).toBe(200);
    for (let i = 0; i < 30; i += 1) await call('GET', '/api/v1/runs', { token: `wrong${i}` });
    const refused = await call('GET', '/api/v1/runs', { token: 'wrong again' });
    expect(refused.status).toBe(401);
    const limited = await call('GET', '/api/v1/runs', { token: 'wrong-again' });
    expect(limited.status).toBe(429);
    expect(Number(limited.headers.get('retry-after'))).toBeGreaterThan(0);
    expect((await call('GET', '/api/v1/runs')).status).toBe(200);
  });
});

describe('the address', () => {
  test('a foreign Host header is refused on loopback, for every path', async () => {
    for (const path of ['/api/v1/health', '/docs/', '/openapi.yaml', '/api/v1/runs']) {
      for (const host of ['evil.example', `evil.example:${api.server.port}`, '127.0.0.1', 'localhost:1']) {
        const answer = await rawCall(api.server, { path, headers: { host } });
        expect(answer.status, `${path} ${host}`).toBe(421);
      }
    }
  });

  test('the names of this host are let through', async () => {
    for (const name of ['127.0.0.1', 'localhost', 'LOCALHOST', '[::1]']) {
      const headers = { host: `${name}:${api.server.port}` };
      expect((await rawCall(api.server, { path: '/api/v1/health', headers })).status).toBe(200);
    }
  });

  test('a port that is taken is a clear error', async () => {
    const listen = { host: '127.0.0.1', port: api.server.port };
    await expect(startFixture({ config: { listen } })).rejects.toMatchObject({ code: 'CONFIG_INVALID' });
  });
});

describe('methods, types and sizes', () => {
  test('a wrong method answers 405 with those allowed', async () => {
    const answer = await api.call('PUT', '/api/v1/vms', { body: {} });
    expect(answer.status).toBe(405);
    expect(answer.headers.get('allow')?.split(', ').sort()).toEqual(['GET', 'POST']);
    expect(answer.json).toMatchObject({ code: 'METHOD_NOT_ALLOWED' });
  });

  test('an unknown path answers 404 as problem', async () => {
    for (const path of ['/api/v1/nothing', '/nothing', '/docs/../package.json', '/docs/package.json']) {
      const answer = await rawCall(api.server, { path, headers: { authorization: `Bearer ${api.token}` } });
      expect(answer.status).toBe(404);
      expect(JSON.parse(answer.text)).toMatchObject({ code: 'NOT_FOUND' });
    }
  });

  test.each([
    'text/plain',
    'application/xml',
    'multipart/form-data; boundary=x',
    'application/json; charset=utf-16',
  ])('a body of type %s answers 415', async (type) => {
    const answer = await api.call('POST', '/api/v1/vms', { text: '{}', headers: { 'content-type': type } });
    expect(answer.status).toBe(415);
    expect(answer.json).toMatchObject({ code: 'MEDIA_TYPE_UNSUPPORTED' });
  });

  test('a compressed body answers 415: nothing is inflated', async () => {
    const headers = { 'content-encoding': 'gzip' };
    const answer = await api.call('POST', '/api/v1/vms', { text: 'xxxx', headers });
    expect(answer.status).toBe(415);
  });

  test('a name of a million bytes answers 413 or 422, never 500', async () => {
    const large = await api.call('POST', '/api/v1/vms', { body: { ...SAMPLE_VM, name: 'x'.repeat(2e6) } });
    expect(large.status).toBe(413);
    expect(large.json).toMatchObject({ code: 'BODY_TOO_LARGE' });
    const long = await api.call('POST', '/api/v1/vms', { body: { ...SAMPLE_VM, name: 'x'.repeat(1e6) } });
    expect(long.status).toBe(422);
    expect(long.text.length).toBeLessThan(4000);
    expect(api.engine.requests).toEqual([]);
  });
});

describe('bodies that do not fit', () => {
  const source = SAMPLE_VM.disks[0]!.source;
  const bodies: [string, unknown][] = [
    ['an array', []],
    ['no disks', { name: 'x', disks: [] }],
    ['65 disks', { name: 'x', disks: Array.from({ length: 65 }, (_, i) => ({ name: `d${i}`, source })) }],
    ['an unknown key', { ...SAMPLE_VM, extra: 1 }],
    ['an empty name', { ...SAMPLE_VM, name: '' }],
    ['a name of spaces', { ...SAMPLE_VM, name: '  ' }],
    ['a name with a line break', { ...SAMPLE_VM, name: 'a\r\nSet-Cookie: x=y' }],
    ['a name with NUL', { ...SAMPLE_VM, name: 'a\0b' }],
    ['a name with an escape', { ...SAMPLE_VM, name: '\u001b[2Jx' }],
    ['a name that is a number', { ...SAMPLE_VM, name: 5 }],
    ['an unknown kind of source', { name: 'x', disks: [{ name: 'd', source: { kind: 'iscsi' } }] }],
    ['a source without a kind', { name: 'x', disks: [{ name: 'd', source: { uri: 'nbd://x' } }] }],
    ['keys of another kind', { name: 'x', disks: [{ name: 'd', source: { ...source, kind: 'image' } }] }],
    [
      'a relative path',
      {
        name: 'x',
        disks: [{ name: 'd', source: { kind: 'image', path: 'a', format: 'raw', changeTracking: 'auto' } }],
      },
    ],
    [
      'NUL in a path',
      {
        name: 'x',
        disks: [
          { name: 'd', source: { kind: 'image', path: '/a\0b', format: 'raw', changeTracking: 'auto' } },
        ],
      },
    ],
    ['a line break in a URI', { name: 'x', disks: [{ name: 'd', source: { ...source, uri: 'nbd://x\n' } }] }],
  ];
  test.each(bodies)('%s answers 422 and reaches no engine', async (_name, body) => {
    const answer = await api.call('POST', '/api/v1/vms', { body });
    expect(answer.status).toBe(422);
    expect(answer.headers.get('content-type')).toBe('application/problem+json');
    const problem = answer.json as { code: string; errors: unknown[] };
    expect(problem.code).toBe('INVALID_INPUT');
    expect(problem.errors.length).toBeGreaterThan(0);
    expect(api.engine.requests).toEqual([]);
  });

  test.each(['{', 'null', '"x"', '5', '{"a":1}}', '\u0000'])('%j is no JSON object', async (text) => {
    const answer = await api.call('POST', '/api/v1/vms', { text });
    expect(answer.status).toBe(400);
    expect(answer.json).toMatchObject({ code: 'INVALID_INPUT' });
  });

  test('no body where one is needed', async () => {
    expect((await api.call('POST', '/api/v1/vms')).status).toBe(422);
  });

  test('nesting a hundred thousand deep is refused, not fatal', async () => {
    const text = `{"name":${'['.repeat(100_000)}${']'.repeat(100_000)},"disks":[]}`;
    expect((await api.call('POST', '/api/v1/vms', { text })).status).toBe(422);
    expect((await api.call('GET', '/api/v1/runs')).status).toBe(200);
  });

  test.each(['__proto__', 'constructor', 'prototype', 'toString'])('the key %s is refused', async (key) => {
    const text = `{"name":"x","disks":${JSON.stringify(SAMPLE_VM.disks)},"${key}":{"polluted":true}}`;
    expect((await api.call('POST', '/api/v1/vms', { text })).status).toBe(422);
    expect(({} as Record<string, unknown>)['polluted']).toBeUndefined();
  });
});

describe('parameters that do not fit', () => {
  test.each(['x', '1', newUlid().toLowerCase(), '..%2f..', '%00', '8'.repeat(26), `${newUlid()}0`])(
    'id %s answers 422',
    async (id) => {
      for (const path of [`/api/v1/runs/${id}`, `/api/v1/backups?vmId=${id}`]) {
        const answer = await api.call('GET', path);
        expect(answer.status, path).toBe(422);
        expect(answer.json).toMatchObject({ code: 'INVALID_INPUT' });
      }
    },
  );

  test('an id of another kind is not found', async () => {
    const { json } = await api.call('POST', '/api/v1/vms', { body: SAMPLE_VM });
    const { id } = json as { id: string };
    for (const path of ['runs', 'repositories', 'backups', 'restore/images']) {
      expect((await api.call('GET', `/api/v1/${path}/${id}`)).status).toBe(404);
    }
  });

  test.each(['limit=0', 'limit=1001', 'limit=x', 'limit=1&limit=2', 'unknown=1', 'cursor=', 'kind=x'])(
    'query %s answers 422',
    async (query) => {
      expect((await api.call('GET', `/api/v1/runs?${query}`)).status).toBe(422);
    },
  );

  test('a malformed escape in the path answers 400', async () => {
    const headers = { authorization: `Bearer ${api.token}` };
    const answer = await rawCall(api.server, { path: '/api/v1/runs/%zz', headers });
    expect([400, 422]).toContain(answer.status);
    expect(JSON.parse(answer.text)).toMatchObject({ code: 'INVALID_INPUT' });
  });

  test('many spellings of a content type leave nothing behind', async () => {
    for (let i = 0; i < 20; i += 1) {
      const answer = await api.call('GET', '/api/v1/runs', {
        headers: { 'content-type': `application/x${i}` },
      });
      expect(answer.status).toBe(200);
    }
  });
});

describe('faults of our own', () => {
  test('an unexpected error hides its message and is logged once under the instance', async () => {
    const lines: string[] = [];
    const stream = new Writable({
      write(chunk: Buffer, _encoding, done) {
        lines.push(chunk.toString());
        done();
      },
    });
    await using logged = await startFixture({ logger: pino({ level: 'info' }, stream) });
    logged.engine.fault = new Error('password is hunter2');
    const answer = await logged.call('GET', '/api/v1/vms');
    expect(answer.status).toBe(500);
    expect(answer.text).not.toContain('hunter2');
    const { instance } = answer.json as { instance: string };
    const entries = lines.filter((line) => line.includes(instance));
    expect(entries).toHaveLength(1);
    expect(entries[0]).toContain('hunter2');
    expect(lines.join('')).not.toContain(logged.token);
  });

  test('an answer that breaks the schema is a fault of ours, and nothing of it gets out', async () => {
    const { json } = await api.call('POST', '/api/v1/vms', { body: SAMPLE_VM });
    Object.assign(api.engine.vms.at(-1)!, { internalSecret: 'hunter2' });
    const answer = await api.call('GET', `/api/v1/vms/${(json as { id: string }).id}`);
    expect(answer.status).toBe(500);
    expect(answer.json).toMatchObject({ code: 'INTERNAL' });
    expect(answer.text).not.toContain('hunter2');
  });

  test('garbage on the socket does not disturb the others', async () => {
    const socket = connect(api.server.port, '127.0.0.1');
    socket.on('error', () => undefined);
    socket.resume();
    socket.write('\0\0\0 garbage\r\n\r\n');
    await new Promise((resolve) => socket.once('close', resolve));
    expect((await api.call('GET', '/api/v1/runs')).status).toBe(200);
  });
});
