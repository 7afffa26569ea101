import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { newUlid } from '../../src/lib/id.js';
import type { BackupView, RepositoryView, RunView, VmView } from '../../src/engine/types.js';
import { SAMPLE_VM, startFixture, type ApiFixture } from './fixture.js';

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

async function addRepository(): Promise<RepositoryView> {
  const answer = await api.call('POST', '/api/v1/repositories', { body: { name: 'main', root: '/repo' } });
  expect(answer.status).toBe(201);
  return answer.json as RepositoryView;
}
async function addVm(): Promise<VmView> {
  const answer = await api.call('POST', '/api/v1/vms', { body: SAMPLE_VM });
  expect(answer.status).toBe(201);
  return answer.json as VmView;
}

describe('repositories', () => {
  test('create fills in the defaults, names the resource and can be read back', async () => {
    const answer = await api.call('POST', '/api/v1/repositories', { body: { name: 'main', root: '/repo' } });
    const created = answer.json as RepositoryView;
    expect(api.engine.requests).toEqual([
      { name: 'main', root: '/repo', hash: 'xxh3-128', mode: 'create', takeover: false },
    ]);
    expect(answer.headers.get('location')).toBe(`/api/v1/repositories/${created.id}`);
    const read = await api.call('GET', `/api/v1/repositories/${created.id}`);
    expect(read.json).toEqual(created);
    const list = await api.call('GET', '/api/v1/repositories');
    expect(list.json).toEqual({ items: [created], nextCursor: null });
  });

  test('check takes an empty body, rescan none; both answer a run', async () => {
    const { id } = await addRepository();
    const check = await api.call('POST', `/api/v1/repositories/${id}/check`);
    expect(check.status).toBe(202);
    expect((check.json as RunView).request).toEqual({
      kind: 'check',
      content: true,
      vmId: null,
      pointId: null,
    });
    const structure = await api.call('POST', `/api/v1/repositories/${id}/check`, {
      body: { content: false },
    });
    expect((structure.json as RunView).request).toMatchObject({ content: false });
    const rescan = await api.call('POST', `/api/v1/repositories/${id}/rescan`);
    expect(rescan.status).toBe(202);
    expect(rescan.headers.get('location')).toBe(`/api/v1/runs/${(rescan.json as RunView).id}`);
  });
});

describe('machines', () => {
  test('are recorded with both kinds of source, paged, and removed', async () => {
    const vm = await addVm();
    expect(vm.disks.map((disk) => disk.source)).toEqual(SAMPLE_VM.disks.map((disk) => disk.source));
    await addVm();
    const first = await api.call('GET', '/api/v1/vms?limit=1');
    const { nextCursor } = first.json as { nextCursor: string };
    expect(nextCursor).toBe('1');
    const second = await api.call('GET', `/api/v1/vms?limit=1&cursor=${nextCursor}`);
    expect((second.json as { items: VmView[]; nextCursor: null }).items).toHaveLength(1);
    const gone = await api.call('DELETE', `/api/v1/vms/${vm.id}`);
    expect(gone.status).toBe(204);
    expect(gone.text).toBe('');
    const missing = await api.call('GET', `/api/v1/vms/${vm.id}`);
    expect(missing.status).toBe(404);
    expect(missing.json).toMatchObject({ code: 'NOT_FOUND', status: 404 });
  });

  test('a disk known only from a repository has no source', async () => {
    const vm = await addVm();
    Object.assign(api.engine.vms[0]!.disks[0]!, { source: null });
    const answer = await api.call('GET', `/api/v1/vms/${vm.id}`);
    expect((answer.json as VmView).disks[0]?.source).toBeNull();
  });
});

describe('backups', () => {
  test('a request answers a queued run; a second one of the same machine names it', async () => {
    const vm = await addVm();
    const repository = await addRepository();
    const body = { vmId: vm.id, repositoryId: repository.id };
    const first = await api.call('POST', '/api/v1/backups', { body });
    expect(first.status).toBe(202);
    const run = first.json as RunView;
    expect(first.headers.get('location')).toBe(`/api/v1/runs/${run.id}`);
    expect(run.request).toEqual({
      ...{ kind: 'backup', type: 'auto', bitmaps: [], bytesPerSecond: 0, consistency: 'prefer' },
      disks: { include: [], exclude: [] },
    });
    const second = await api.call('POST', '/api/v1/backups', { body });
    expect(second.status).toBe(409);
    expect(second.json).toMatchObject({ code: 'RUN_ACTIVE', runId: run.id, details: { runId: run.id } });
    const queued = await api.call('POST', '/api/v1/backups', { body: { ...body, whenBusy: 'queue' } });
    expect(queued.status).toBe(202);
  });

  test('list with filters, stats, one, chain, delete', async () => {
    await addRepository();
    const vm = await addVm();
    const full = api.engine.addPoint(vm);
    const top = api.engine.addPoint(vm, 'incremental');
    const list = await api.call('GET', `/api/v1/backups?vmId=${vm.id}&repositoryId=${full.repositoryId}`);
    expect((list.json as { items: BackupView[] }).items.map(({ id }) => id)).toEqual([top.id, full.id]);
    const none = await api.call('GET', `/api/v1/backups?vmId=${newUlid()}`);
    expect((none.json as { items: BackupView[] }).items).toEqual([]);
    const stats = await api.call('GET', '/api/v1/backups/stats');
    expect(stats.json).toMatchObject({ points: 2, fullPoints: 1, incrementalPoints: 1 });
    const one = await api.call('GET', `/api/v1/backups/${full.id}`);
    expect(one.json).toEqual(full);
    const chain = await api.call('GET', `/api/v1/backups/${full.id}/chain`);
    expect((chain.json as { items: unknown[] }).items).toHaveLength(2);
    const refused = await api.call('DELETE', `/api/v1/backups/${full.id}`);
    expect(refused.status).toBe(409);
    expect(refused.json).toMatchObject({
      code: 'POINT_HAS_DEPENDENTS',
      details: { dependents: [top.id] },
    });
    const accepted = await api.call('DELETE', `/api/v1/backups/${top.id}`);
    expect(accepted.status).toBe(202);
    expect(accepted.json).toMatchObject({ kind: 'delete', pointId: top.id });
  });
});

describe('restores', () => {
  test('are runs of that kind, with every kind of target', async () => {
    const vm = await addVm();
    const point = api.engine.addPoint(vm);
    const targets = [
      { kind: 'file', path: '/srv/out.raw', format: 'raw' },
      { kind: 'nbd', uri: 'nbd://127.0.0.1/out', tls: { pskFile: '/etc/psk' } },
      { kind: 'device', path: '/dev/sdx' },
    ];
    for (const target of targets) {
      const body = { pointId: point.id, disks: [{ diskId: vm.disks[0]!.id, target }] };
      const answer = await api.call('POST', '/api/v1/restore/images', { body });
      expect(answer.status).toBe(202);
      expect((answer.json as RunView).request).toMatchObject({ disks: [{ target }], overwrite: false });
    }
    await api.call('POST', '/api/v1/backups', {
      body: { vmId: vm.id, repositoryId: newUlid(), whenBusy: 'queue' },
    });
    const list = await api.call('GET', '/api/v1/restore/images');
    const { items } = list.json as { items: RunView[] };
    expect(items.map(({ kind }) => kind)).toEqual(['restore', 'restore', 'restore']);
    const one = await api.call('GET', `/api/v1/restore/images/${items[0]!.id}`);
    expect(one.json).toEqual(items[0]);
    const backup = api.engine.runs.find(({ kind }) => kind === 'backup')!;
    const other = await api.call('GET', `/api/v1/restore/images/${backup.id}`);
    expect(other.status).toBe(404);
  });
});

describe('runs', () => {
  test('list by kind and state, read, log, cancel', async () => {
    const { id } = await addRepository();
    const { json } = await api.call('POST', `/api/v1/repositories/${id}/rescan`);
    const run = json as RunView;
    const list = await api.call('GET', '/api/v1/runs?kind=rescan&state=queued');
    expect((list.json as { items: RunView[] }).items).toEqual([run]);
    api.engine.runLog.push(
      { sequence: 1, at: run.createdAt, level: 'info', code: 'STARTED', message: 'started', details: {} },
      { sequence: 2, at: run.createdAt, level: 'warning', code: 'SLOW', message: 'slow', details: { a: 1 } },
    );
    const log = await api.call('GET', `/api/v1/runs/${run.id}/log?afterSequence=1`);
    expect((log.json as { items: unknown[] }).items).toEqual([api.engine.runLog[1]]);
    const cancelled = await api.call('POST', `/api/v1/runs/${run.id}/cancel`);
    expect(cancelled.status).toBe(202);
    expect(cancelled.json).toMatchObject({ state: 'cancelled', isCancelRequested: true });
    const again = await api.call('POST', `/api/v1/runs/${run.id}/cancel`);
    expect(again.json).toMatchObject({ code: 'RUN_NOT_ACTIVE', status: 409 });
  });
});

describe('tokens', () => {
  test('the text is answered once, works, and stops working when revoked', async () => {
    const answer = await api.call('POST', '/api/v1/tokens', { body: { name: 'monitoring' } });
    expect(answer.status).toBe(201);
    const { token, secret } = answer.json as { token: { id: string }; secret: string };
    const list = await api.call('GET', '/api/v1/tokens', { token: secret });
    expect(list.status).toBe(200);
    expect(list.text).not.toContain(secret);
    const revoked = await api.call('DELETE', `/api/v1/tokens/${token.id}`);
    expect(revoked.status).toBe(204);
    const after = await api.call('GET', '/api/v1/tokens', { token: secret });
    expect(after.status).toBe(401);
  });
});

describe('system', () => {
  test('health names components and no more, with and without trouble', async () => {
    const well = await api.call('GET', '/api/v1/health', { token: null });
    expect(well.status).toBe(200);
    expect(well.json).toEqual({
      isHealthy: true,
      components: [
        { name: 'database', isHealthy: true },
        { name: 'queue', isHealthy: true },
      ],
    });
    api.engine.components[1]!.isHealthy = false;
    const ill = await api.call('GET', '/api/v1/health', { token: null });
    expect(ill.status).toBe(503);
    expect(ill.text).not.toContain('secret');
  });

  test('doctor tells the findings', async () => {
    const answer = await api.call('GET', '/api/v1/doctor');
    expect(answer.json).toEqual({ items: api.engine.findings });
  });
});
