import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import type { ExportView, OperationView } from '../../src/engine/types.js';
import { newUlid } from '../../src/lib/id.js';
import { startFixture, type Answer, type ApiFixture } from './fixture.js';

let api: ApiFixture;
beforeAll(async () => {
  api = await startFixture();
});
beforeEach(() => {
  api.engine.reset();
});
afterAll(async () => {
  await api[Symbol.asyncDispose]();
});

const get = (path: string): Promise<Answer> => api.call('GET', `/api/v1${path}`);
const post = (path: string, body?: unknown, headers: Record<string, string> = {}): Promise<Answer> =>
  api.call('POST', `/api/v1${path}`, { body, headers });

async function publish(body: object = { pointId: newUlid() }): Promise<ExportView> {
  const answer = await post('/exports', body);
  expect(answer.status).toBe(201);
  return answer.json as ExportView;
}

function expectRefused(answer: Answer): void {
  expect(answer.status).toBe(422);
  expect(answer.json).toMatchObject({ code: 'INVALID_INPUT' });
  expect(api.engine.requests).toEqual([]);
}

const NOTHING = {
  ...{ pointId: null, disk: null, volumeId: null, isReadOnly: true },
  ...{ overlayPath: null, ttlSeconds: null, identity: null },
};

describe('publishing', () => {
  test('fills in the defaults, names the resource and can be read back', async () => {
    const pointId = newUlid();
    const answer = await post('/exports', { pointId });
    expect(answer.status).toBe(201);
    const made = answer.json as ExportView;
    expect(answer.headers.get('location')).toBe(`/api/v1/exports/${made.id}`);
    expect(api.engine.requests).toEqual([{ ...NOTHING, pointId }]);
    expect((await get(`/exports/${made.id}`)).json).toEqual(made);
    const again = await post('/exports', { pointId });
    expect(again.json).toMatchObject({ status: 409, code: 'CONFLICT', details: { exportId: made.id } });
  });

  test('takes every choice', async () => {
    const pointId = newUlid();
    const psk = { kind: 'psk', user: 'agent7' };
    const x509 = { kind: 'x509', distinguishedName: 'O=Example,CN=Ä b' };
    const writable = { pointId, disk: 'vda', isReadOnly: false, overlayPath: '/srv/o.qcow2', ttlSeconds: 0 };
    const first = await publish({ ...writable, identity: psk });
    expect(first).toMatchObject({ isReadOnly: false, identity: psk, expiresAt: null });
    const volumeId = newUlid();
    await publish({ volumeId, identity: x509, ttlSeconds: 3600 });
    expect(api.engine.requests).toEqual([
      { ...NOTHING, ...writable, identity: psk },
      { ...NOTHING, volumeId, identity: x509, ttlSeconds: 3600 },
    ]);
  });

  const pointId = newUlid();
  const volumeId = newUlid();
  const psk = (user: unknown): object => ({ pointId, identity: { kind: 'psk', user } });
  const wrong: [string, unknown][] = [
    ['neither point nor volume', {}],
    ['both', { pointId, volumeId }],
    ['null for both', { pointId: null, volumeId: null }],
    ['an id that is none', { pointId: 'latest' }],
    ['a disk of a volume', { volumeId, disk: 'vda' }],
    ['an overlay of a read-only export', { pointId, overlayPath: '/srv/o.qcow2' }],
    ['an overlay of a volume', { volumeId, isReadOnly: false, overlayPath: '/srv/o.qcow2' }],
    ['a relative overlay', { pointId, isReadOnly: false, overlayPath: 'o.qcow2' }],
    ['a NUL in the overlay', { pointId, isReadOnly: false, overlayPath: '/srv/o\u0000' }],
    ['an empty disk', { pointId, disk: '' }],
    ['a time before now', { pointId, ttlSeconds: -1 }],
    ['half a second', { pointId, ttlSeconds: 0.5 }],
    ['more than a year', { pointId, ttlSeconds: 31_536_001 }],
    ['text for a time', { pointId, ttlSeconds: '1h' }],
    ['text for a choice', { pointId, isReadOnly: 'no' }],
    ['an unknown key', { pointId, name: 'mine' }],
    ['an unknown kind of identity', { pointId, identity: { kind: 'token', user: 'a' } }],
    ['no user', { pointId, identity: { kind: 'psk' } }],
    ['an empty user', psk('')],
    ['a user that begins with a dot', psk('.a')],
    ['a user with a slash', psk('a/b')],
    ['a user with a line break', psk('a\n')],
    ['a user of 129 characters', psk('a'.repeat(129))],
    ['a user of a certificate', { pointId, identity: { kind: 'x509', user: 'a' } }],
    [
      'a line break in a certificate name',
      { pointId, identity: { kind: 'x509', distinguishedName: 'CN=a\nx' } },
    ],
    ['256 characters of one', { pointId, identity: { kind: 'x509', distinguishedName: 'x'.repeat(256) } }],
  ];
  test.each(wrong)('with %s is refused and reaches no engine', async (_what, body) => {
    expectRefused(await post('/exports', body));
  });

  test('the same request with the same key is done once', async () => {
    const headers = { 'Idempotency-Key': 'e-1' };
    const body = { pointId, isReadOnly: false };
    const first = await post('/exports', body, headers);
    const second = await post('/exports', body, headers);
    expect(second.status).toBe(201);
    expect(second.json).toEqual(first.json);
    expect(api.engine.exports).toHaveLength(1);
  });
});

describe('exports', () => {
  test('are listed by point and volume, paged, and removed', async () => {
    const point = await publish();
    const volume = await publish({ volumeId: newUlid() });
    const ids = async (query: string): Promise<string[]> =>
      ((await get(`/exports${query}`)).json as { items: ExportView[] }).items.map(({ id }) => id);
    expect(await ids('')).toEqual([volume.id, point.id]);
    expect(await ids(`?pointId=${point.pointId}`)).toEqual([point.id]);
    expect(await ids(`?volumeId=${volume.volumeId}`)).toEqual([volume.id]);
    expect(await ids('?limit=1&cursor=1')).toEqual([point.id]);
    const gone = await api.call('DELETE', `/api/v1/exports/${point.id}`);
    expect(gone.status).toBe(204);
    expect((await get(`/exports/${point.id}`)).json).toMatchObject({ status: 404, code: 'NOT_FOUND' });
    expect((await get('/exports?pointId=x')).status).toBe(422);
  });

  test('that is not served says why', async () => {
    const { id } = await publish();
    const problem = {
      code: 'EXPORT_REFUSED' as const,
      message: 'no image',
      remedy: 'Look.',
      details: { a: 1 },
    };
    Object.assign(api.engine.exports[0]!, { uris: [], sizeBytes: null, problem });
    expect((await get(`/exports/${id}`)).json).toMatchObject({ uris: [], sizeBytes: null, problem });
  });

  test('are materialized as an operation, which is a run', async () => {
    const { id } = await publish({ pointId: newUlid(), isReadOnly: false });
    const answer = await post(`/exports/${id}/materialize`);
    expect(answer.status).toBe(202);
    const operation = answer.json as OperationView;
    expect(answer.headers.get('location')).toBe(`/api/v1/operations/${operation.id}`);
    expect(operation).toMatchObject({ kind: 'materialize', subjectId: id, state: 'queued', result: null });
    expect((await get(`/exports/${id}`)).json).toMatchObject({
      materialization: { state: 'running', runId: operation.id },
    });
    const result = { kind: 'materialize' as const, exportId: id, imagePath: '/srv/o.qcow2', fileBytes: 5 };
    api.engine.moveRun(operation.id, { state: 'completed', endedAt: operation.createdAt, result });
    expect((await get(`/operations/${operation.id}`)).json).toMatchObject({ state: 'completed', result });
    expect((await get(`/runs/${operation.id}`)).json).toMatchObject({
      ...{ kind: 'materialize', request: { kind: 'materialize', exportId: id }, result },
    });
    expect((await get('/runs?kind=materialize')).json).toMatchObject({ items: [{ id: operation.id }] });
    expect((await post(`/exports/${newUlid()}/materialize`)).status).toBe(404);
  });

  test('what is no operation is not found as one', async () => {
    expect((await get(`/operations/${newUlid()}`)).status).toBe(404);
    expect((await get('/operations/x')).status).toBe(422);
  });
});

describe('the export daemon', () => {
  test('is shown in its own words', async () => {
    const answer = await get('/exports/daemon');
    expect(answer.status).toBe(200);
    expect(answer.json).toEqual(api.engine.daemon);
  });

  test('that is not there has a problem and no words', async () => {
    const problem = {
      ...{ code: 'EXPORT_DAEMON_UNAVAILABLE' as const, message: 'it does not run', remedy: 'Start it.' },
      details: {},
    };
    api.engine.daemon = { isRunning: false, status: null, problem };
    expect((await get('/exports/daemon')).json).toEqual({ isRunning: false, status: null, problem });
  });
});

describe('identities', () => {
  test('the key is answered once; the list has users alone', async () => {
    const answer = await post('/exports/identities', { user: 'agent7' });
    expect(answer.status).toBe(201);
    const { user, key } = answer.json as { user: string; key: string };
    expect(user).toBe('agent7');
    expect(key).toMatch(/^[0-9a-f]{32}$/);
    const list = await get('/exports/identities');
    expect(list.json).toEqual({ items: [{ user: 'agent7' }] });
    expect(list.text).not.toContain(key);
    const removed = await api.call('DELETE', '/api/v1/exports/identities/agent7');
    expect(removed.status).toBe(204);
    expect(api.engine.users).toEqual([]);
    expect((await api.call('DELETE', '/api/v1/exports/identities/agent7')).status).toBe(404);
  });

  test('take no idempotency key: the answer with the key is not kept', async () => {
    const answer = await post('/exports/identities', { user: 'a' }, { 'Idempotency-Key': 'i-1' });
    expect(answer.json).toMatchObject({ status: 422, code: 'INVALID_INPUT' });
    expect(api.engine.users).toEqual([]);
  });

  test.each([['', '..', '%2e%2e', 'a b', 'ä', 'a%2fb', 'x'.repeat(129)]].flat())(
    'a user %j is refused',
    async (user) => {
      const made = await post('/exports/identities', { user: decodeURIComponent(user) });
      expect(made.status).toBe(422);
      const { status } = await api.call('DELETE', `/api/v1/exports/identities/${user}`);
      expect([404, 405, 422]).toContain(status);
      expect(api.engine.users).toEqual([]);
    },
  );
});
