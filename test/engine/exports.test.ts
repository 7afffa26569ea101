import { readFile, readdir, stat } from 'node:fs/promises';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, it, test } from 'vitest';
import type { EngineContext } from '../../src/engine/context.js';
import { choosePort, createIdentityUseCases } from '../../src/engine/export-identities.js';
import { isPinning, type ExportFacts } from '../../src/engine/export-record.js';
import { urisOf } from '../../src/engine/export-serving.js';
import { toExportView } from '../../src/engine/export-view.js';
import { requireUnused } from '../../src/engine/maintenance.js';
import { requireMaterializable } from '../../src/engine/materialize.js';
import { toOperationView } from '../../src/engine/operation-use-cases.js';
import { toRunView } from '../../src/engine/views.js';
import type { ExportFileStatus, ExportIdentity, ExportStatus } from '../../src/exports/index.js';
import { AppError } from '../../src/lib/errors.js';
import { newId, type ExportId, type PointId, type RunId, type TokenId } from '../../src/lib/id.js';
import { runRow } from '../contract/database-fixture.js';
import { SETTINGS } from './engine-context.js';
import { FACTS, openExportLab, publishedRow, type ExportLab } from './export-fixture.js';

const ACTOR = { tokenId: newId<TokenId>(), tokenName: 'admin' };

let lab: ExportLab;
let context: EngineContext;

beforeEach(async () => {
  lab = await openExportLab();
  ({ context } = lab);
});
afterEach(async () => {
  await lab[Symbol.asyncDispose]();
});

describe('ports for exports of one identity', () => {
  const psk = (user: string): ExportIdentity => ({ kind: 'psk', user });

  test('are shared by the exports of the identity, and by no other', async () => {
    const first = await choosePort(context, psk('alice'));
    await lab.insert({}, { identity: psk('alice'), at: first });
    expect(await choosePort(context, psk('alice'))).toEqual(first);
    const second = await choosePort(context, psk('bob'));
    expect(second).not.toEqual(first);
    const sameWord = await choosePort(context, { kind: 'x509', distinguishedName: 'alice' });
    expect(sameWord).not.toEqual(first);
  });

  test('come to an end, at the last port there is', async () => {
    for (const user of ['alice', 'bob']) {
      await lab.insert({}, { identity: psk(user), at: await choosePort(context, psk(user)) });
    }
    const ports = (await context.db.exports.listAll({})).map(({ facts }) => (facts as ExportFacts).at?.port);
    expect(ports.sort()).toEqual([65_534, 65_535]);
    await expect(choosePort(context, psk('carol'))).rejects.toMatchObject({ code: 'CONFLICT' });
  });
});

describe('identities', () => {
  test('are files that the export daemon reads, made once', async () => {
    const { createExportIdentity, listExportIdentities } = createIdentityUseCases(context);
    const { key } = await createExportIdentity('agent.7', ACTOR);
    const file = path.join(lab.directory, 'identities', 'agent.7.psk');
    expect(key).toMatch(/^[0-9a-f]{64}$/);
    expect(await readFile(file, 'utf8')).toBe(`agent.7:${key}\n`);
    expect((await stat(file)).mode & 0o777).toBe(0o640);
    await expect(createExportIdentity('agent.7', ACTOR)).rejects.toMatchObject({ code: 'CONFLICT' });
    expect(await readFile(file, 'utf8')).toBe(`agent.7:${key}\n`);
    expect((await createExportIdentity('other', ACTOR)).key).not.toBe(key);
    expect(await listExportIdentities()).toEqual([{ user: 'agent.7' }, { user: 'other' }]);
    expect(await readdir(path.join(lab.directory, 'identities'))).toHaveLength(2);
    const audit = await context.db.auditLog.list({ limit: 10, cursor: null });
    expect(JSON.stringify(audit.rows)).not.toContain(key);
  });

  test.each(['', '../etc', 'a/b', '.hidden', 'a b', 'a'.repeat(129)])('are never called %j', async (user) => {
    const { createExportIdentity, removeExportIdentity } = createIdentityUseCases(context);
    await expect(createExportIdentity(user, ACTOR)).rejects.toMatchObject({ code: 'INVALID_INPUT' });
    await expect(removeExportIdentity(user, ACTOR)).rejects.toMatchObject({ code: 'INVALID_INPUT' });
  });

  test('stay as long as an export is for them', async () => {
    const { createExportIdentity, removeExportIdentity } = createIdentityUseCases(context);
    await createExportIdentity('agent', ACTOR);
    const { id } = await lab.insert({}, { identity: { kind: 'psk', user: 'agent' } });
    await expect(removeExportIdentity('agent', ACTOR)).rejects.toMatchObject({
      ...{ code: 'CONFLICT', details: { exportIds: [id] } },
    });
    await context.db.exports.remove(id);
    await removeExportIdentity('agent', ACTOR);
    await expect(removeExportIdentity('agent', ACTOR)).rejects.toMatchObject({ code: 'NOT_FOUND' });
  });

  test('need a directory', async () => {
    const { exports } = context.settings;
    const without = {
      ...context,
      settings: { ...SETTINGS, exports: { ...exports, identitiesDirectory: null } },
    };
    await expect(createIdentityUseCases(without).listExportIdentities()).rejects.toMatchObject({
      code: 'CONFIG_INVALID',
    });
  });
});

test('a published point is in use until its export stands alone', async () => {
  const pointId = newId<PointId>();
  const { id } = await lab.insert({ pointId });
  await lab.insert({ pointId: newId<PointId>() });
  await expect(requireUnused(context, null, pointId)).rejects.toMatchObject({
    ...{ code: 'POINT_IN_USE', details: { exportIds: [id] } },
  });
  const materialization = { state: 'completed' as const, runId: newId<RunId>() };
  await context.db.exports.update(id, { facts: { ...FACTS, materialization } });
  await requireUnused(context, null, pointId);
  expect(isPinning(publishedRow({}, { materialization: { ...materialization, state: 'failed' } }))).toBe(
    true,
  );
});

describe('where an export is offered', () => {
  const listener = (id: string, more: Partial<ExportStatus['listeners'][number]>) => ({
    ...{ id, tls: 'none' as const, state: 'up' as const, pid: 1, restarts: 0, error: null },
    address: { kind: 'unix' as const, path: '/run/nbd.sock' },
    ...more,
  });
  const entry: ExportFileStatus = {
    ...{ file: 'disk.conf', digest: '', name: 'disk', state: 'served', listeners: ['unix', 'tcp'] },
    ...{
      sizeBytes: 1024,
      format: 'qcow2',
      isReadOnly: true,
      description: null,
      materialize: null,
      error: null,
    },
  };
  const status: ExportStatus = {
    ...{ version: 1, pid: 1, processStartTime: '1', startedAt: '', exportsDirectory: '', generation: 1 },
    ...{ appliedAt: '', readAtMs: 0, files: [entry], events: [] },
    listeners: [
      listener('unix', {}),
      listener('tcp', { address: { kind: 'tcp', host: '::', port: 10_809 }, tls: 'psk' }),
      listener('own:1', { address: { kind: 'tcp', host: '::', port: 1 } }),
    ],
  };
  const published = () => publishedRow({ name: 'disk' });
  const look = (change: Partial<ExportFileStatus> | null, made = published()) =>
    toExportView(context, made, {
      status: { ...status, files: change === null ? [] : [{ ...entry, ...change }] },
      problem: null,
    });

  it('comes with TCP first, at the address that clients use', () => {
    const unix = 'nbd+unix:///disk?socket=%2Frun%2Fnbd.sock';
    expect(urisOf(context, status, entry)).toEqual(['nbds://[::]:10809/disk', unix]);
    const exports = { ...context.settings.exports, advertisedHost: 'backup.example.org' };
    const advertised = { ...context, settings: { ...context.settings, exports } };
    expect(urisOf(advertised, status, entry)).toEqual(['nbds://backup.example.org:10809/disk', unix]);
  });

  it('or with the reason why it is nowhere', () => {
    expect(look({})).toMatchObject({ sizeBytes: 1024, problem: null, uris: { length: 2 } });
    expect(look(null)).toMatchObject({ uris: [], problem: { code: 'EXPORT_REFUSED' } });
    const error = { code: 'NOT_FOUND', message: 'cannot be opened: ENOENT' };
    expect(look({ state: 'failed', listeners: [], error })).toMatchObject({
      ...{ uris: [], problem: { code: 'EXPORT_REFUSED', details: { reason: error } } },
    });
    expect(look({ listeners: [] })).toMatchObject({
      uris: [],
      problem: { code: 'EXPORT_DAEMON_UNAVAILABLE' },
    });
    const away = new AppError('EXPORT_DAEMON_UNAVAILABLE', 'away');
    expect(toExportView(context, published(), { status, problem: away })).toMatchObject({
      ...{ uris: [], problem: { code: 'EXPORT_DAEMON_UNAVAILABLE' } },
    });
    expect(look({}, publishedRow({ name: 'disk', state: 'publishing' }))).toMatchObject({
      ...{ sizeBytes: null, uris: [], problem: null },
    });
  });
});

test('a run that is tried again goes on with the export that it began to materialize', async () => {
  const [run, other] = [runRow({ state: 'running' }), runRow({ state: 'running' })];
  for (const made of [run, other]) await context.db.runs.insert(made, { turn: 'none' });
  const overlay = { backingPath: '/srv/layer.qcow2', inode: '7' };
  const materialization = { state: 'running' as const, runId: run.id };
  const begun = publishedRow({}, { overlay, isReadOnly: false, materialization });
  await requireMaterializable(context, begun, run.id);
  for (const self of [other.id, null]) {
    await expect(requireMaterializable(context, begun, self)).rejects.toMatchObject({
      ...{ code: 'CONFLICT', details: { runId: run.id } },
    });
  }
  for (const refused of [publishedRow(), publishedRow({ state: 'removing' }, { overlay })]) {
    await expect(requireMaterializable(context, refused, null)).rejects.toMatchObject({ code: 'CONFLICT' });
  }
});

test('an operation is a run seen from its subject; other runs are none', () => {
  const view = (request: unknown, change = {}) =>
    toRunView(runRow({ request, ...change }), { nowMs: 0, stalledAfterMs: 1000 });
  const exportId = newId<ExportId>();
  const run = view({ kind: 'materialize', exportId }, { state: 'completed', kind: 'materialize' });
  expect(toOperationView(run)).toMatchObject({
    ...{ id: run.id, kind: 'materialize', subjectId: exportId, state: 'completed', share: 1 },
  });
  expect(() => toOperationView(view({ kind: 'rescan' }))).toThrow('there is no operation');
});
