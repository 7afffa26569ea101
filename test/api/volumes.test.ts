import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import type { OperationView, RunView, VmView, VolumeView } from '../../src/engine/types.js';
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
const post = (path: string, body?: unknown): Promise<Answer> => api.call('POST', `/api/v1${path}`, { body });

const WWN = 'wwn:0x5000c500a1b2c3d4';

async function register(body: object = { identity: WWN }): Promise<VolumeView> {
  const answer = await post('/volumes', body);
  expect(answer.status).toBe(201);
  return answer.json as VolumeView;
}

function expectRefused(answer: Answer): void {
  expect(answer.status).toBe(422);
  expect(answer.json).toMatchObject({ code: 'INVALID_INPUT' });
  expect(api.engine.requests).toEqual([]);
}

describe('volumes', () => {
  test('devices are listed as they are', async () => {
    const answer = await get('/volumes/devices');
    expect(answer.status).toBe(200);
    expect(answer.json).toEqual({ items: api.engine.devices });
  });

  test('are registered by identity or by path, listed, read, and forgotten', async () => {
    const answer = await post('/volumes', { name: 'archive', identity: WWN });
    expect(answer.status).toBe(201);
    const volume = answer.json as VolumeView;
    expect(answer.headers.get('location')).toBe(`/api/v1/volumes/${volume.id}`);
    await register({ devicePath: '/dev/sdb' });
    expect(api.engine.requests).toEqual([
      { name: 'archive', identity: WWN, devicePath: null },
      { name: null, identity: null, devicePath: '/dev/sdb' },
    ]);
    expect((await get(`/volumes/${volume.id}`)).json).toEqual(volume);
    expect((await get('/volumes?limit=1')).json).toEqual({ items: [volume], nextCursor: '1' });
    expect((await api.call('DELETE', `/api/v1/volumes/${volume.id}`)).status).toBe(204);
    expect((await get(`/volumes/${volume.id}`)).status).toBe(404);
  });

  test('are attached and detached as operations', async () => {
    const { id } = await register();
    expect((await get(`/volumes/${id}/device`)).json).toMatchObject({ status: 409, code: 'CONFLICT' });
    const answer = await post(`/volumes/${id}/attach`);
    expect(answer.status).toBe(202);
    const attach = answer.json as OperationView;
    expect(answer.headers.get('location')).toBe(`/api/v1/operations/${attach.id}`);
    expect(attach).toMatchObject({ kind: 'attach-volume', subjectId: id, state: 'queued' });
    const result = { kind: 'attach-volume' as const, volumeId: id, devicePath: '/dev/sdb' };
    api.engine.moveRun(attach.id, { state: 'completed', result });
    expect((await get(`/operations/${attach.id}`)).json).toMatchObject({ state: 'completed', result });
    expect((await get(`/volumes/${id}/device`)).json).toEqual({
      ...{ devicePath: '/dev/sdb', deviceNumber: '8:16', sizeBytes: 8 * 1024 ** 3 },
    });
    expect((await get(`/volumes/${id}`)).json).toMatchObject({ mapping: { devicePath: '/dev/sdb' } });
    const detach = (await post(`/volumes/${id}/detach`)).json as OperationView;
    expect(detach).toMatchObject({ kind: 'detach-volume', subjectId: id });
    const done = { kind: 'detach-volume' as const, volumeId: id };
    api.engine.moveRun(detach.id, { state: 'completed', result: done });
    expect(((await get(`/runs/${detach.id}`)).json as RunView).result).toEqual(done);
    expect((await post(`/volumes/${newUlid()}/attach`)).status).toBe(404);
  });

  test('one whose device is gone says so', async () => {
    const { id } = await register();
    const problem = { code: 'VOLUME_GONE' as const, message: 'not here', remedy: 'Connect it.', details: {} };
    Object.assign(api.engine.volumes[0]!, { devicePath: null, problem });
    expect((await get(`/volumes/${id}`)).json).toMatchObject({ devicePath: null, problem });
  });

  const wrong: [string, unknown][] = [
    ['neither identity nor path', {}],
    ['both', { identity: WWN, devicePath: '/dev/sdb' }],
    ['null for both', { identity: null, devicePath: null }],
    ['an identity without kind', { identity: '0x5000' }],
    ['an identity without value', { identity: 'wwn:' }],
    ['a line break in it', { identity: 'wwn:a\nb' }],
    ['an identity without end', { identity: `serial:${'x'.repeat(512)}` }],
    ['a relative path', { devicePath: 'sdb' }],
    ['an empty name', { identity: WWN, name: '' }],
    ['an escape in the name', { identity: WWN, name: '\u001b[2J' }],
    ['a provider', { identity: WWN, provider: 'host' }],
  ];
  test.each(wrong)('with %s is refused and reaches no engine', async (_what, body) => {
    expectRefused(await post('/volumes', body));
  });
});

describe('what volumes and pushes are good for', () => {
  test('a volume and a pushed disk are sources', async () => {
    const sources = [
      { kind: 'volume', volumeId: newUlid(), changeTracking: 'compare' },
      { kind: 'push', sizeBytes: 1_000_001 },
    ];
    const disks = sources.map((source, index) => ({ name: `vd${index}`, source }));
    const answer = await post('/vms', { name: 'x', disks });
    expect(answer.status).toBe(201);
    expect((answer.json as VmView).disks.map(({ source }) => source)).toEqual(sources);
  });

  const wrong: [string, unknown][] = [
    ['a volume without id', { kind: 'volume', changeTracking: 'auto' }],
    ['a volume by name', { kind: 'volume', volumeId: 'archive', changeTracking: 'auto' }],
    ['a push without size', { kind: 'push' }],
    ['a push of nothing', { kind: 'push', sizeBytes: 0 }],
    ['a push with tracking', { kind: 'push', sizeBytes: 1, changeTracking: 'auto' }],
  ];
  test.each(wrong)('%s is refused as a source', async (_what, source) => {
    expectRefused(await post('/vms', { name: 'x', disks: [{ name: 'vda', source }] }));
  });

  test('a volume is a target', async () => {
    const vm = (
      await post('/vms', { name: 'x', disks: [{ name: 'a', source: { kind: 'push', sizeBytes: 9 } }] })
    ).json as VmView;
    const { id: pointId } = api.engine.addPoint(vm);
    const target = { kind: 'volume', volumeId: newUlid() };
    const disks = [{ diskId: vm.disks[0]!.id, target }];
    const answer = await post('/restore/images', { pointId, disks });
    expect(answer.status).toBe(202);
    expect((answer.json as RunView).request).toMatchObject({ disks });
    const wrong = { diskId: vm.disks[0]!.id, target: { ...target, path: '/dev/sdb' } };
    expect((await post('/restore/images', { pointId, disks: [wrong] })).status).toBe(422);
  });
});
