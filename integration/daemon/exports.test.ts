import { access, readFile, rm, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';
import type { ExportDaemonView, ExportView, RunView, VmView } from '../../src/engine/types.js';
import { parseBackupExportName } from '../../src/exports/index.js';
import { pollUntil } from '../../src/lib/deadline.js';
import { KIB, MIB } from '../../src/lib/units.js';
import { connect, sizeAt } from '../exportd/rig.js';
import { exportRaw, firstDifference, makeRaw, qemuIo, seededBytes, writeRegions } from '../lab/disk-image.js';
import { backUp, setUp, type Setup } from './daemon.js';
import {
  expectNoExports,
  exportFiles,
  filesBelow,
  hashLayers,
  isServed,
  listed,
  publish,
  show,
  startExportRig,
  stopExportRig,
  topLayer,
  waitForNoExports,
  type ExportRig,
} from './export-rig.js';
import { imageDisk } from './rig.js';

/** Not whole sectors. */
const ROOT_BYTES = 8 * MIB + 1000;
const SERVED_BYTES = 8 * MIB + 1024;
const DATA_BYTES = 4 * MIB;

describe('exports of recovery points', () => {
  let rig: ExportRig;
  let setup: Setup;
  let full: string;
  let incremental: string;
  /** The root disk as it was at each point. */
  const truths: Record<string, string> = {};

  beforeAll(async () => {
    rig = await startExportRig();
    const { lab, daemon } = rig;
    const region = { offset: 64 * KIB, length: 3 * MIB };
    await makeRaw({ path: lab.file('root.raw'), sizeBytes: ROOT_BYTES, regions: [region] });
    await makeRaw({ path: lab.file('data.raw'), sizeBytes: DATA_BYTES, regions: [region] });
    setup = await setUp(daemon, {
      root: lab.file('repository'),
      disks: ['root', 'data'].map((name) => ({ name, source: imageDisk(lab.file(`${name}.raw`)) })),
    });
    const take = async (): Promise<string> => {
      const { pointId } = await backUp(daemon, setup);
      truths[pointId ?? ''] = lab.file(`root-${pointId ?? ''}.raw`);
      await exportRaw(lab.file('root.raw'), 'raw', truths[pointId ?? '']!);
      return pointId ?? '';
    };
    full = await take();
    await writeRegions(lab.file('root.raw'), [{ offset: 2 * MIB + 4096, length: 512 * KIB, seed: 7 }]);
    incremental = await take();
  });
  afterEach(async () => {
    for (const { id } of await listed(rig.daemon)) await rig.daemon.request('DELETE', `/exports/${id}`);
  });
  afterAll(async () => {
    await stopExportRig(rig);
  });

  const remove = (id: string) => rig.daemon.expect(204, 'DELETE', `/exports/${id}`);
  const root = (more: Record<string, unknown> = {}) => ({ pointId: incremental, disk: 'root', ...more });

  async function expectContent(uri: string, truth: string): Promise<void> {
    const copy = rig.lab.file('copy.raw');
    await exportRaw(uri, 'raw', copy);
    const expected = rig.lab.file('expected.raw');
    await exportRaw(truth, 'raw', expected);
    expect(await firstDifference(copy, expected)).toBeNull();
    await rm(copy);
    await rm(expected);
  }

  it('serves a point read-only, with its whole chain and exact size, under its designed name', async () => {
    const before = await hashLayers(rig.daemon, incremental);
    const made = await publish(rig.daemon, root());
    expect(made).toMatchObject({
      ...{ kind: 'point', isReadOnly: true, pointId: incremental, sizeBytes: SERVED_BYTES },
      ...{ identity: null, materialization: null, runId: null, volumeId: null },
      imagePath: await topLayer(rig.daemon, incremental, 'root'),
    });
    expect(parseBackupExportName(made.name)).toMatchObject({ vm: 'web01', diskNumber: 1, type: 'incr' });
    expect(made.uris).toEqual([rig.exportd.tcp(made.name), rig.exportd.unix(made.name)]);
    for (const uri of made.uris) {
      expect(await sizeAt(uri)).toBe(SERVED_BYTES);
      await expectContent(uri, truths[incremental]!);
    }
    await using client = await connect(made.uris[0]!);
    expect(client.info.isReadOnly).toBe(true);
    await expect(client.pwrite(0, Buffer.alloc(512))).rejects.toThrow();
    const older = await publish(rig.daemon, root({ pointId: full }));
    await expectContent(older.uris[0]!, truths[full]!);
    expect(parseBackupExportName(older.name)?.type).toBe('full');
    expect((await listed(rig.daemon)).map(({ id }) => id)).toEqual([older.id, made.id]);
    expect(await show(rig.daemon, made.id)).toEqual(made);
    await remove(made.id);
    await remove(older.id);
    await expectNoExports(rig);
    expect(await hashLayers(rig.daemon, incremental)).toBe(before);
  });

  it('names the disk by its fixed number, and asks which where there are several', async () => {
    const made = await publish(rig.daemon, root({ disk: setup.vm.disks[1]!.id }));
    expect(parseBackupExportName(made.name)?.diskNumber).toBe(2);
    expect(made.sizeBytes).toBe(DATA_BYTES);
    await remove(made.id);
    const { body } = await rig.daemon.request('POST', '/exports', root({ disk: null }));
    expect(body).toMatchObject({
      code: 'INVALID_INPUT',
      detail: expect.stringContaining('root, data') as string,
    });
    await rig.daemon.expect(422, 'POST', '/exports', root({ disk: 'other' }));
    await expectNoExports(rig);
  });

  it('refuses to publish the same twice, and names the one that is there', async () => {
    const made = await publish(rig.daemon, root());
    const again = await rig.daemon.request('POST', '/exports', root());
    expect([again.status, again.body]).toMatchObject([
      409,
      { code: 'CONFLICT', details: { exportId: made.id } },
    ]);
    expect(await isServed(made.uris[0]!)).toBe(true);
    await remove(made.id);
    const both = await Promise.all([1, 2].map(() => rig.daemon.request('POST', '/exports', root())));
    expect(both.map(({ status }) => status).sort()).toEqual([201, 409]);
    await remove((await listed(rig.daemon))[0]!.id);
    await expectNoExports(rig);
  });

  it('keeps a published point from being deleted', async () => {
    const extra = (await backUp(rig.daemon, setup)).pointId ?? '';
    const made = await publish(rig.daemon, root({ pointId: extra }));
    const refused = await rig.daemon.request('DELETE', `/backups/${extra}`);
    expect([refused.status, refused.body]).toMatchObject([
      409,
      { code: 'POINT_IN_USE', details: { exportIds: [made.id] } },
    ]);
    expect(await isServed(made.uris[0]!)).toBe(true);
    await remove(made.id);
    const { id } = await rig.daemon.expect<RunView>(202, 'DELETE', `/backups/${extra}`);
    expect((await rig.daemon.waitForRun(id)).state).toBe('completed');
    await rig.daemon.expect(404, 'POST', '/exports', root({ pointId: extra }));
  });

  it('a delete and an export that begin together do not both succeed', async () => {
    for (let round = 0; round < 3; round += 1) {
      const point = (await backUp(rig.daemon, setup)).pointId ?? '';
      const [made, deleted] = await Promise.all([
        rig.daemon.request('POST', '/exports', root({ pointId: point })),
        rig.daemon.request('DELETE', `/backups/${point}`),
      ]);
      const run =
        deleted.status === 202 ? await rig.daemon.waitForRun((deleted.body as RunView).id) : undefined;
      expect(made.status === 201 && run?.state === 'completed').toBe(false);
      if (made.status !== 201) continue;
      await expectContent((made.body as ExportView).uris[0]!, rig.lab.file('root.raw'));
      await remove((made.body as ExportView).id);
    }
    await expectNoExports(rig);
  });

  it('a writable export keeps what is written in an overlay of its own; the point stays as it is', async () => {
    const before = await hashLayers(rig.daemon, incremental);
    const one = await publish(rig.daemon, root({ isReadOnly: false }));
    const overlayPath = rig.lab.file('two.qcow2');
    const two = await publish(rig.daemon, root({ isReadOnly: false, overlayPath }));
    expect(one.name).not.toBe(two.name);
    expect(one).toMatchObject({ isReadOnly: false, sizeBytes: SERVED_BYTES });
    expect([path.dirname(one.imagePath), two.imagePath]).toEqual([rig.overlayDirectory, overlayPath]);
    await qemuIo({
      path: one.uris[0]!,
      format: 'raw',
      commands: ['write -P 0x77 0 1M', 'write -z 2M 1M', 'discard 3M 64k'],
    });
    await qemuIo({ path: two.uris[1]!, format: 'raw', commands: ['write -P 0x55 8M 1k'] });
    await qemuIo({ path: one.uris[1]!, format: 'raw', commands: ['read -P 0x77 0 1M', 'read -P 0 2M 1M'] });
    const truth = await readFile(truths[incremental]!);
    await using second = await connect(two.uris[0]!);
    expect((await second.pread(0, 2 * MIB)).equals(truth.subarray(0, 2 * MIB))).toBe(true);
    expect((await second.pread(8 * MIB, 1024)).equals(Buffer.alloc(1024, 0x55))).toBe(true);
    const reader = await publish(rig.daemon, root());
    await expectContent(reader.uris[0]!, truths[incremental]!);
    for (const { id } of [one, two, reader]) await remove(id);
    await expectNoExports(rig);
    await expect(access(overlayPath)).rejects.toThrow('ENOENT');
    expect(await hashLayers(rig.daemon, incremental)).toBe(before);
  });

  it('makes no overlay where one does not belong', async () => {
    await writeFile(rig.lab.file('mine.qcow2'), 'mine');
    const cases: [string, number, string][] = [
      [rig.lab.file('repository', 'x.qcow2'), 422, 'TARGET_FORBIDDEN'],
      [rig.lab.file('daemon', 'state', 'x.qcow2'), 422, 'TARGET_FORBIDDEN'],
      [path.join(rig.exportd.exportsDirectory, 'x.conf'), 422, 'TARGET_FORBIDDEN'],
      [rig.lab.file('mine.qcow2'), 409, 'TARGET_EXISTS'],
      [rig.lab.file('nowhere', 'x.qcow2'), 500, 'TARGET_IO'],
    ];
    for (const [overlayPath, status, code] of cases) {
      const answer = await rig.daemon.request('POST', '/exports', root({ isReadOnly: false, overlayPath }));
      expect([answer.status, answer.body], overlayPath).toMatchObject([status, { code }]);
    }
    expect(await readFile(rig.lab.file('mine.qcow2'), 'utf8')).toBe('mine');
    await expectNoExports(rig);
  });

  it('a client of an export that is removed is cut off, clients of others are not', async () => {
    const one = await publish(rig.daemon, root());
    const two = await publish(rig.daemon, root({ disk: 'data' }));
    await using cut = await connect(one.uris[0]!);
    await using other = await connect(two.uris[0]!);
    await remove(one.id);
    await expect(cut.pread(0, 512)).rejects.toThrow();
    expect(await isServed(one.uris[0]!)).toBe(false);
    expect((await other.pread(64 * KIB, 4096)).equals(seededBytes(64 * KIB * 4099, 4096))).toBe(true);
    await rig.daemon.expect(404, 'GET', `/exports/${one.id}`);
    await rig.daemon.expect(404, 'DELETE', `/exports/${one.id}`);
    await remove(two.id);
    await expectNoExports(rig);
  });

  it('removes an export when its time is up, and gives one a day when nothing is asked', async () => {
    const kept = await publish(rig.daemon, root());
    const lasting = await publish(rig.daemon, root({ disk: 'data', ttlSeconds: 0 }));
    const short = await publish(rig.daemon, root({ isReadOnly: false, ttlSeconds: 1 }));
    expect(lasting.expiresAt).toBeNull();
    const lifeMs = (made: ExportView) => Date.parse(made.expiresAt ?? '') - Date.parse(made.createdAt);
    expect(Math.abs(lifeMs(kept) - 86_400_000)).toBeLessThan(2000);
    await using client = await connect(short.uris[0]!);
    await pollUntil(
      async () =>
        (await rig.daemon.request('GET', `/exports/${short.id}`)).status === 404 ? true : undefined,
      { timeoutMs: 15_000, intervalMs: 100, what: 'the export expiring' },
    );
    expect(await isServed(short.uris[0]!)).toBe(false);
    await expect(client.pread(0, 512)).rejects.toThrow();
    expect(await filesBelow(rig.overlayDirectory)).toEqual([]);
    expect((await listed(rig.daemon)).map(({ id }) => id)).toEqual([lasting.id, kept.id]);
    await remove(kept.id);
    await remove(lasting.id);
    await expectNoExports(rig);
  });

  it('machines whose names differ only after 60 characters have exports of different names', async () => {
    const stem = 'a-machine-with-a-long-name-of-which-sixty-characters-are-the-same';
    const made: ExportView[] = [];
    for (const suffix of ['one', 'two']) {
      const vm = await rig.daemon.expect<VmView>(201, 'POST', '/vms', {
        name: `${stem}-${suffix}`,
        disks: [{ name: 'root', source: imageDisk(rig.lab.file('data.raw')) }],
      });
      const { pointId } = await backUp(rig.daemon, { ...setup, vm });
      made.push(await publish(rig.daemon, { pointId }));
    }
    const [one, two] = made.map(({ name }) => name);
    expect(one).not.toBe(two);
    for (const { name, id } of made) {
      expect(name.length).toBeLessThanOrEqual(63);
      expect(parseBackupExportName(name)).not.toBeNull();
      expect(await isServed(rig.exportd.tcp(name))).toBe(true);
      await remove(id);
    }
    await expectNoExports(rig);
  });

  it('serves an export for one identity at a port of its own, to that identity alone', async () => {
    const { user, key } = await rig.daemon.expect<{ user: string; key: string }>(
      201,
      'POST',
      '/exports/identities',
      { user: 'agent' },
    );
    await rig.daemon.expect(201, 'POST', '/exports/identities', { user: 'other' });
    await rig.daemon.expect(409, 'POST', '/exports/identities', { user: 'agent' });
    expect(await rig.daemon.expect(200, 'GET', '/exports/identities')).toMatchObject({
      items: [{ user: 'agent' }, { user: 'other' }],
    });
    const identity = { kind: 'psk', user };
    const made = await publish(rig.daemon, root({ identity }));
    const same = await publish(rig.daemon, root({ disk: 'data', identity, isReadOnly: false }));
    const another = await publish(
      rig.daemon,
      root({ pointId: full, identity: { kind: 'psk', user: 'other' } }),
    );
    const portOf = ({ uris }: ExportView) => new URL(uris[0]!.replace(/^nbds:/, 'http:')).port;
    expect(made.uris).toEqual([`nbds://127.0.0.1:${portOf(made)}/${made.name}`]);
    expect(portOf(same)).toBe(portOf(made));
    expect(portOf(another)).not.toBe(portOf(made));
    const keyFile = rig.lab.file('agent-key');
    const at = (who: string) =>
      `nbds://${who}@127.0.0.1:${portOf(made)}/${made.name}?tls-psk-file=${keyFile}`;
    await writeFile(keyFile, `${user}:${key}\n`, { mode: 0o600 });
    expect(await sizeAt(at('agent'))).toBe(SERVED_BYTES);
    await writeFile(keyFile, `${user}:${key.split('').reverse().join('')}\n`);
    await expect(sizeAt(at('agent'))).rejects.toThrow();
    expect(await isServed(rig.exportd.tcp(made.name))).toBe(false);
    expect(await isServed(rig.exportd.unix(made.name))).toBe(false);
    const refused = await rig.daemon.request('DELETE', '/exports/identities/agent');
    expect([refused.status, refused.body]).toMatchObject([409, { code: 'CONFLICT' }]);
    for (const { id } of [made, same, another]) await remove(id);
    for (const name of ['agent', 'other'])
      await rig.daemon.expect(204, 'DELETE', `/exports/identities/${name}`);
    await rig.daemon.expect(404, 'DELETE', '/exports/identities/agent');
    expect(await filesBelow(rig.identitiesDirectory)).toEqual([]);
    await expectNoExports(rig);
  });

  it('refuses an export for an identity that nobody has, and leaves nothing of it', async () => {
    const { status, body } = await rig.daemon.request(
      'POST',
      '/exports',
      root({ identity: { kind: 'psk', user: 'nobody' } }),
    );
    expect([status, body]).toMatchObject([
      409,
      { code: 'EXPORT_REFUSED', details: { reason: { code: 'CONFIG_INVALID' } } },
    ]);
    await expectNoExports(rig);
  });

  it('shows the export daemon as it shows itself', async () => {
    const made = await publish(rig.daemon, root());
    const daemon = await rig.daemon.expect<ExportDaemonView>(200, 'GET', '/exports/daemon');
    expect(daemon).toMatchObject({ isRunning: true, problem: null, status: { pid: rig.exportd.pid } });
    expect(daemon.status?.files.map(({ name }) => name)).toEqual([made.name]);
    expect(await exportFiles(rig)).toEqual([`${made.name}.conf`]);
    await remove(made.id);
    await waitForNoExports(rig);
  });
});
