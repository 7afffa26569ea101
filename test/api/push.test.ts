import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import type { PushDiskView, RunView, VmView } from '../../src/engine/types.js';
import { pollUntil } from '../../src/lib/deadline.js';
import { newUlid } from '../../src/lib/id.js';
import { SAMPLE_VM, startFixture, type Answer, type ApiFixture } from './fixture.js';

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

const post = (path: string, body: unknown, headers: Record<string, string> = {}): Promise<Answer> =>
  api.call('POST', `/api/v1${path}`, { body, headers });
const repositoryId = newUlid();

async function addVm(): Promise<VmView> {
  const vm = (await post('/vms', SAMPLE_VM)).json as VmView;
  api.engine.requests.length = 0;
  return vm;
}

async function startPush(vm: VmView, push: unknown = {}): Promise<RunView> {
  const answer = await post('/backups', { vmId: vm.id, repositoryId, source: 'push', push });
  expect(answer.status).toBe(202);
  return answer.json as RunView;
}

function expectRefused(answer: Answer): void {
  expect(answer.status).toBe(422);
  expect(answer.json).toMatchObject({ code: 'INVALID_INPUT' });
  expect(api.engine.requests).toEqual([]);
}

const REPORT = { totalBytes: 100, bytesRead: 60, bytesWritten: 50, bytesZeroed: 10, bytesSkipped: 0 };
const TOTALS = { bytesRead: 60, bytesWritten: 50, bytesZeroed: 10, bytesSkipped: 40 };
const DIGEST = 'ab'.repeat(32);

describe('a pushed backup', () => {
  test('answers what the agent writes to, and is a run of kind backup', async () => {
    const vm = await addVm();
    const run = await startPush(vm);
    expect(run).toMatchObject({ kind: 'backup', state: 'running', request: { kind: 'push', disks: [] } });
    expect(run.progress.push?.disks.map(({ diskId, method }) => [diskId, method])).toEqual([
      [vm.disks[0]!.id, 'full'],
      [vm.disks[1]!.id, 'bitmap'],
    ]);
    expect(run.progress.push?.exports).toMatch(/^vda=nbd:\/\/\S+ vdb=nbd:\/\/\S+$/);
    expect(api.engine.requests).toEqual([
      {
        ...{ vmId: vm.id, repositoryId, type: 'auto', consistency: 'crash', identity: null, disks: [] },
        whenBusy: 'refuse',
      },
    ]);
    expect((await api.call('GET', `/api/v1/runs/${run.id}`)).json).toEqual(run);
  });

  test('takes what the agent knows of each disk; what it does not say is null', async () => {
    const vm = await addVm();
    const identity = { kind: 'psk', user: 'agent7' };
    const known = { disk: 'vda', sizeBytes: 1_000_001, lineage: 'serial 7', changeIds: ['a', 'b'] };
    const push = { identity, consistency: 'application', disks: [known, { disk: vm.disks[1]!.id }] };
    const run = await startPush(vm, push);
    const unknown = { sizeBytes: null, lineage: null, changeIds: null };
    expect(api.engine.requests).toMatchObject([
      { identity, consistency: 'application', disks: [known, { disk: vm.disks[1]!.id, ...unknown }] },
    ]);
    expect(run.request).toMatchObject({ disks: [{ diskId: vm.disks[0]!.id }, unknown] });
    const x509 = { kind: 'x509', distinguishedName: 'O=Example,CN=alice' };
    await startPush(vm, { identity: x509 });
    expect(api.engine.requests.at(-1)).toMatchObject({ identity: x509 });
  });

  test('may name no more than the machine and the repository', async () => {
    const vm = await addVm();
    const answer = await post('/backups', { vmId: vm.id, repositoryId, source: 'push' });
    expect(answer.status).toBe(202);
    expect(api.engine.requests).toMatchObject([{ consistency: 'crash', identity: null, disks: [] }]);
  });

  const pair = { vmId: newUlid(), repositoryId };
  const push = { ...pair, source: 'push' };
  const disk = (facts: object): object => ({ ...push, push: { disks: [{ disk: 'vda', ...facts }] } });
  const wrong: [string, unknown][] = [
    ['bitmaps', { ...push, bitmaps: [] }],
    ['a rate', { ...push, bytesPerSecond: 0 }],
    ['a wish of consistency', { ...push, consistency: 'prefer' }],
    ['a choice of disks', { ...push, disks: { include: ['vda'] } }],
    ['another source', { ...pair, source: 'pull' }],
    ['push, but a configured source', { ...pair, push: {} }],
    ['push, and source configured', { ...pair, source: 'configured', push: {} }],
    ['an unknown key', { ...push, push: { rate: 1 } }],
    ['another consistency', { ...push, push: { consistency: 'prefer' } }],
    ['a disk without name', { ...push, push: { disks: [{}] } }],
    ['65 disks', { ...push, push: { disks: Array(65).fill({ disk: 'vda' }) } }],
    ['a size of nothing', disk({ sizeBytes: 0 })],
    ['half a byte', disk({ sizeBytes: 0.5 })],
    ['a size that no number holds', disk({ sizeBytes: 2 ** 53 })],
    ['an empty lineage', disk({ lineage: '' })],
    ['an empty change id', disk({ changeIds: [''] })],
    ['a line break in a change id', disk({ changeIds: ['a\nb'] })],
    ['a change id without end', disk({ changeIds: ['x'.repeat(256)] })],
    ['1001 change ids', disk({ changeIds: Array(1001).fill('x') })],
    ['an identity without kind', { ...push, push: { identity: { user: 'a' } } }],
    ['a user that is a path', { ...push, push: { identity: { kind: 'psk', user: '../a' } } }],
    [
      'two identities',
      { ...push, push: { identity: { kind: 'psk', user: 'a', distinguishedName: 'CN=a' } } },
    ],
  ];
  test.each(wrong)('with %s is refused and reaches no engine', async (_what, body) => {
    expectRefused(await post('/backups', body));
  });

  test('which the client does not wait for goes on; the same key finds it again', async () => {
    const vm = await addVm();
    api.engine.isPushSlow = true;
    const body = { vmId: vm.id, repositoryId, source: 'push' };
    const headers = { 'Idempotency-Key': 'push-1' };
    const left = new AbortController();
    const url = `${api.server.url}/api/v1/backups`;
    const waiting = fetch(url, {
      method: 'POST',
      signal: left.signal,
      headers: { authorization: `Bearer ${api.token}`, 'content-type': 'application/json', ...headers },
      body: JSON.stringify(body),
    });
    const find = (): true | undefined => (api.engine.runs.length > 0 ? true : undefined);
    await pollUntil(find, { timeoutMs: 5000, what: 'the run' });
    left.abort();
    await expect(waiting).rejects.toThrow();
    const again = await pollUntil(
      async () => {
        const answer = await post('/backups', body, headers);
        return answer.status === 202 ? answer : undefined;
      },
      { timeoutMs: 5000, what: 'the answer that was kept' },
    );
    expect(api.engine.runs).toHaveLength(1);
    expect(again.json).toMatchObject({ id: api.engine.runs[0]!.id, state: 'running' });
  });
});

describe('progress of a push', () => {
  test('is handed on, and answers the run', async () => {
    const vm = await addVm();
    const run = await startPush(vm);
    const disks = vm.disks.map(({ id }) => ({ diskId: id, ...REPORT }));
    const answer = await post(`/backups/${run.pointId}/progress`, { disks });
    expect(answer.status).toBe(200);
    expect(answer.json).toEqual(run);
    expect(api.engine.requests.at(-1)).toEqual(disks);
    api.engine.moveRun(run.id, { state: 'failed' });
    const late = await post(`/backups/${run.pointId}/progress`, { disks });
    expect(late.json).toMatchObject({ status: 409, code: 'RUN_NOT_ACTIVE' });
  });

  const diskId = newUlid();
  const wrong: [string, unknown][] = [
    ['no disks', {}],
    ['no disk', { disks: [] }],
    ['65 disks', { disks: Array(65).fill({ diskId, ...REPORT }) }],
    ['no disk id', { disks: [REPORT] }],
    ['less than nothing', { disks: [{ diskId, ...REPORT, bytesRead: -1 }] }],
    ['half a byte', { disks: [{ diskId, ...REPORT, bytesZeroed: 1.5 }] }],
    ['more than a number holds', { disks: [{ diskId, ...REPORT, totalBytes: 2 ** 53 }] }],
    ['text', { disks: [{ diskId, ...REPORT, bytesWritten: '1' }] }],
    ['an unknown key', { disks: [{ diskId, ...REPORT, bytes: 1 }] }],
  ];
  test.each(wrong)('with %s is refused and reaches no engine', async (_what, body) => {
    expectRefused(await post(`/backups/${newUlid()}/progress`, body));
  });
});

describe('completion of a pushed disk', () => {
  test('answers the disk; a digest that was not made is null', async () => {
    const vm = await addVm();
    const run = await startPush(vm);
    const [first, second] = vm.disks.map(({ id }) => `/backups/${run.pointId}/disks/${id}/complete`);
    const answer = await post(first!, { changeId: 'holdfast-2', sumsDigest: DIGEST, ...TOTALS });
    expect(answer.status).toBe(200);
    expect(answer.json as PushDiskView).toMatchObject({
      ...{ diskId: vm.disks[0]!.id, isCompleted: true, changeIdTo: 'holdfast-2' },
    });
    await post(second!, { changeId: 'holdfast-2', ...TOTALS });
    expect(api.engine.requests.slice(-2)).toEqual([
      { changeId: 'holdfast-2', sumsDigest: DIGEST, ...TOTALS },
      { changeId: 'holdfast-2', sumsDigest: null, ...TOTALS },
    ]);
    const other = await post(`/backups/${run.pointId}/disks/${newUlid()}/complete`, {
      changeId: 'x',
      ...TOTALS,
    });
    expect(other.json).toMatchObject({ status: 404, code: 'NOT_FOUND' });
  });

  const wrong: [string, unknown][] = [
    ['no change id', TOTALS],
    ['an empty change id', { changeId: '', ...TOTALS }],
    ['null for a change id', { changeId: null, ...TOTALS }],
    ['a space at the end of it', { changeId: 'a ', ...TOTALS }],
    ['an escape in it', { changeId: '\u001b[2J', ...TOTALS }],
    ['256 characters of it', { changeId: 'x'.repeat(256), ...TOTALS }],
    ['half a digest', { changeId: 'x', sumsDigest: 'ab', ...TOTALS }],
    ['a digest in upper case', { changeId: 'x', sumsDigest: DIGEST.toUpperCase(), ...TOTALS }],
    ['no totals', { changeId: 'x' }],
    ['less than nothing', { changeId: 'x', ...TOTALS, bytesSkipped: -1 }],
    ['the disk again', { changeId: 'x', ...TOTALS, diskId: newUlid() }],
  ];
  test.each(wrong)('with %s is refused and reaches no engine', async (_what, body) => {
    expectRefused(await post(`/backups/${newUlid()}/disks/${newUlid()}/complete`, body));
  });

  test('of ids that are none is refused', async () => {
    expectRefused(await post(`/backups/${newUlid()}/disks/vda/complete`, { changeId: 'x', ...TOTALS }));
  });
});
