import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import type { BackupEstimate, RunView, VmView } from '../../src/engine/types.js';
import { newUlid } from '../../src/lib/id.js';
import { NOW } from './fake-views.js';
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

const post = (path: string, body: unknown): Promise<Answer> => api.call('POST', `/api/v1${path}`, { body });

async function discoverOne(): Promise<VmView> {
  const answer = await post('/vms/discover', { kind: 'libvirt', uri: 'qemu:///system', names: ['web-01'] });
  expect(answer.status).toBe(200);
  return (answer.json as { items: VmView[] }).items[0]!;
}

function expectRefused(answer: Answer): void {
  expect(answer.status).toBe(422);
  expect(answer.json).toMatchObject({ code: 'INVALID_INPUT' });
  expect(api.engine.requests).toEqual([]);
}

describe('discovery', () => {
  test('of a libvirt connection answers machines with what was found, and they can be read back', async () => {
    const vm = await discoverOne();
    expect(api.engine.requests).toEqual([{ kind: 'libvirt', uri: 'qemu:///system', names: ['web-01'] }]);
    expect(vm.machine).toMatchObject({ state: 'running', seenAt: NOW, source: { kind: 'libvirt' } });
    expect(vm.disks.map((disk) => disk.facts?.skip?.code ?? null)).toEqual([null, null, 'REMOVABLE']);
    expect((await api.call('GET', `/api/v1/vms/${vm.id}`)).json).toEqual(vm);
    expect((await api.call('GET', `/api/v1/vms/${vm.id}/disks`)).json).toEqual({ items: vm.disks });
    expect((await api.call('GET', '/api/v1/vms')).json).toEqual({ items: [vm], nextCursor: null });
  });

  test('without names asks for all, without an agent for none', async () => {
    const socket = '/run/web-01.qmp';
    await post('/vms/discover', { kind: 'libvirt', uri: 'qemu+ssh://root@kvm-02/system' });
    await post('/vms/discover', { kind: 'qemu', socket });
    await post('/vms/discover', { kind: 'qemu', socket, agentSocket: '/run/web-01.agent' });
    expect(api.engine.requests).toEqual([
      { kind: 'libvirt', uri: 'qemu+ssh://root@kvm-02/system', names: [] },
      { kind: 'qemu', socket, agentSocket: null },
      { kind: 'qemu', socket, agentSocket: '/run/web-01.agent' },
    ]);
    expect(api.engine.vms.map((vm) => vm.machine?.source)).toEqual(api.engine.requests.slice(1));
  });

  const wrong: [string, unknown][] = [
    ['no kind', { uri: 'qemu:///system' }],
    ['an unknown kind', { kind: 'xen', uri: 'qemu:///system' }],
    ['no URI', { kind: 'libvirt' }],
    ['an empty URI', { kind: 'libvirt', uri: '' }],
    ['a line break in the URI', { kind: 'libvirt', uri: 'qemu:///system\n' }],
    ['a URI without end', { kind: 'libvirt', uri: `qemu://${'x'.repeat(2048)}/system` }],
    ['keys of the other kind', { kind: 'libvirt', uri: 'qemu:///system', socket: '/run/x' }],
    ['an empty name', { kind: 'libvirt', uri: 'qemu:///system', names: [''] }],
    ['an escape in a name', { kind: 'libvirt', uri: 'qemu:///system', names: ['\u001b[2J'] }],
    ['1001 names', { kind: 'libvirt', uri: 'qemu:///system', names: Array(1001).fill('x') }],
    ['no socket', { kind: 'qemu' }],
    ['a relative socket', { kind: 'qemu', socket: 'qmp' }],
    ['a relative socket of the agent', { kind: 'qemu', socket: '/run/qmp', agentSocket: 'agent' }],
  ];
  test.each(wrong)('with %s answers 422 and reaches no engine', async (_what, body) => {
    expectRefused(await post('/vms/discover', body));
  });

  test('a source that only discovery makes cannot be recorded by hand', async () => {
    const source = { kind: 'libvirt', target: 'vda', serial: null, changeTracking: 'auto' };
    expectRefused(await post('/vms', { name: 'x', disks: [{ name: 'vda', source }] }));
  });

  test('disks of an unknown machine are not found', async () => {
    expect((await api.call('GET', `/api/v1/vms/${newUlid()}/disks`)).status).toBe(404);
  });
});

describe('release', () => {
  test('answers what was removed and what is not of this appliance', async () => {
    const vm = await discoverOne();
    api.engine.vms[0]!.machine!.changeRecords.push(
      { name: 'holdfast-a', pointId: null, isBroken: false },
      { name: 'holdfast-b', pointId: null, isBroken: true },
    );
    const answer = await api.call('POST', `/api/v1/vms/${vm.id}/release`);
    expect(answer.status).toBe(200);
    expect(answer.json).toEqual({ removed: ['holdfast-a'], kept: ['holdfast-b'] });
    expect((await api.call('POST', `/api/v1/vms/${newUlid()}/release`)).status).toBe(404);
  });
});

describe('a backup of a machine', () => {
  test('takes consistency and a choice of disks; half a choice is filled up', async () => {
    const { id: vmId } = await discoverOne();
    const repositoryId = newUlid();
    const whole = { vmId, repositoryId, consistency: 'require', disks: { exclude: ['vdb', 'WD-1'] } };
    const answer = await post('/backups', whole);
    expect(answer.status).toBe(202);
    expect((answer.json as RunView).request).toMatchObject({
      consistency: 'require',
      disks: { include: [], exclude: ['vdb', 'WD-1'] },
    });
  });

  test('is estimated: method, reason and bytes of each disk, also of those left out', async () => {
    const { id: vmId, disks } = await discoverOne();
    const repositoryId = newUlid();
    const answer = await post('/backups/estimate', { vmId, repositoryId });
    expect(answer.status).toBe(200);
    expect(api.engine.requests.at(-1)).toEqual({
      ...{ vmId, repositoryId, type: 'auto', bitmaps: [], disks: { include: [], exclude: [] } },
    });
    const estimate = answer.json as BackupEstimate;
    expect(estimate.totalBytes).toBeNull();
    expect(estimate.disks.map(({ diskId }) => diskId)).toEqual(disks.map(({ id }) => id));
    expect(estimate.disks.map(({ method, bytes, reason }) => [method, bytes, reason.code])).toEqual([
      ['full', 1024 ** 3, 'FIRST_POINT'],
      ['compare', null, 'NO_CHANGE_RECORD'],
      [null, null, 'REMOVABLE'],
    ]);
    expect(api.engine.runs).toEqual([]);
  });

  const pair = { vmId: newUlid(), repositoryId: newUlid() };
  const wrong: [string, string, unknown][] = [
    ['/backups', 'another consistency', { ...pair, consistency: 'always' }],
    ['/backups', 'no consistency at all', { ...pair, consistency: null }],
    ['/backups', 'disks as a list', { ...pair, disks: ['vda'] }],
    ['/backups', 'an unknown key of the choice', { ...pair, disks: { only: ['vda'] } }],
    ['/backups', 'an empty selector', { ...pair, disks: { include: [''] } }],
    ['/backups', '65 selectors', { ...pair, disks: { exclude: Array(65).fill('vda') } }],
    ['/backups/estimate', 'no repository', { vmId: newUlid() }],
    ['/backups/estimate', 'what only a backup has', { ...pair, whenBusy: 'queue' }],
    ['/backups/estimate', 'consistency', { ...pair, consistency: 'never' }],
  ];
  test.each(wrong)('%s with %s answers 422 and reaches no engine', async (path, _what, body) => {
    expectRefused(await post(path, body));
  });
});

describe('the restore of a machine', () => {
  test('is a run of kind restore, with the defaults filled in', async () => {
    const point = api.engine.addPoint(await discoverOne());
    const place = { kind: 'pool', name: 'default' };
    const answer = await post('/restore/vms', { pointId: point.id, place });
    expect(answer.status).toBe(202);
    const run = answer.json as RunView;
    expect(answer.headers.get('location')).toBe(`/api/v1/runs/${run.id}`);
    expect(run.request).toEqual({
      ...{ kind: 'restore', disks: [], overwrite: false, acceptDamage: false },
      machine: {
        ...{ kind: 'libvirt', uri: 'qemu:///system', name: null, identity: 'new', place },
        ...{ format: 'qcow2', start: false },
      },
    });
    const result = {
      ...{ kind: 'restore' as const, disks: [] },
      machine: { name: 'web-01', uuid: '7f0d0a52-6a3f-4c0e-9a58-000000000002', isStarted: false },
    };
    api.engine.moveRun(run.id, { state: 'completed', result });
    const ended = await api.call('GET', `/api/v1/restore/images/${run.id}`);
    expect(ended.status).toBe(200);
    expect((ended.json as RunView).result).toEqual(result);
  });

  test('takes every choice', async () => {
    const { id: pointId } = api.engine.addPoint(await discoverOne());
    const wishes = { uri: 'qemu:///system?socket=/run/x', name: 'web-01b', identity: 'same', format: 'raw' };
    const place = { kind: 'directory', path: '/images' };
    const body = { pointId, ...wishes, place, start: true, acceptDamage: true };
    expect((await post('/restore/vms', body)).status).toBe(202);
    expect(api.engine.requests.at(-1)).toEqual({
      pointId,
      machine: { kind: 'libvirt', ...wishes, place, start: true },
      acceptDamage: true,
    });
    expect((await post('/restore/vms', { pointId, identity: 'replace' })).status).toBe(202);
  });

  const pointId = newUlid();
  const wrong: [string, unknown][] = [
    ['no point', { place: { kind: 'pool', name: 'default' } }],
    ['another identity', { pointId, identity: 'clone' }],
    ['an empty name', { pointId, name: '' }],
    ['a line break in the name', { pointId, name: 'a\nb' }],
    ['a relative directory', { pointId, place: { kind: 'directory', path: 'images' } }],
    ['a pool with a path', { pointId, place: { kind: 'pool', path: '/images' } }],
    ['a place of an unknown kind', { pointId, place: { kind: 'volume', name: 'x' } }],
    ['another format', { pointId, format: 'vmdk' }],
    ['overwrite, which only identity replace is', { pointId, overwrite: true }],
    ['a space in the URI', { pointId, uri: 'qemu:///system -x' }],
  ];
  test.each(wrong)('with %s answers 422 and reaches no engine', async (_what, body) => {
    expectRefused(await post('/restore/vms', body));
  });

  test('of an unknown point is not found', async () => {
    expect((await post('/restore/vms', { pointId })).json).toMatchObject({ code: 'POINT_NOT_FOUND' });
  });
});
