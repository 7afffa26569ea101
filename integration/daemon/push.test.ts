import { copyFile, open, truncate } from 'node:fs/promises';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { BackupView, ChainView, RepositoryView, RunView, VmView } from '../../src/engine/types.js';
import { parseBackupExportName } from '../../src/exports/index.js';
import { pollUntil } from '../../src/lib/deadline.js';
import { runTool } from '../../src/lib/process.js';
import { CLUSTER_BYTES, KIB, MIB } from '../../src/lib/units.js';
import { connectNbd } from '../../src/nbd/index.js';
import { sizeAt } from '../exportd/rig.js';
import { exportRaw, firstDifference, makeRaw, qemuIo, writeRegions } from '../lab/disk-image.js';
import { backUp, setUp, startDaemon, type Setup } from './daemon.js';
import { listed, startExportRig, stopExportRig, type ExportRig } from './export-rig.js';
import {
  complete,
  digestOf,
  diskOf,
  expectPushFailed,
  expectPushGone,
  expectSoundRepository,
  finish,
  getVm,
  nbdcopy,
  newMachine,
  pushDisk,
  report,
  requestPush,
  startPush,
  tryComplete,
  uriOf,
  writeAt,
} from './push-rig.js';
import { expectReadsBack, imageDisk, listPoints, methodsOf } from './rig.js';

const TIMEOUT = { timeoutMs: 60_000 };
const POLL = { timeout: 20_000 };
/** Not whole sectors, and not whole clusters. */
const ROOT_BYTES = 8 * MIB + 1000;
const DATA_BYTES = 4 * MIB;
const ALL = Array.from({ length: Math.ceil(ROOT_BYTES / CLUSTER_BYTES) }, (_value, cluster) => cluster);

let rig: ExportRig;
beforeAll(async () => {
  rig = await startExportRig();
});
afterAll(async () => {
  await stopExportRig(rig);
});

/** Pushes all of a disk. */
async function pushFull(setup: Setup, file: string, word: string): Promise<RunView> {
  const pushed = await startPush(rig.daemon, setup, { type: 'full' });
  await nbdcopy(file, uriOf(pushed, 'root'));
  return finish(rig.daemon, pushed, word);
}

describe('a pushed backup', () => {
  it('is a full by nbdcopy, then an incremental from its change id, and both read back', async () => {
    const { setup, files } = await newMachine(rig, 'one', { root: ROOT_BYTES });
    const file = files['root'] ?? '';
    const { daemon, lab } = rig;
    const first = await startPush(daemon, setup);
    const disk = diskOf(first, 'root');
    expect(disk).toMatchObject({
      number: 1,
      sizeBytes: ROOT_BYTES,
      method: 'full',
      reason: { code: 'FIRST_POINT' },
      changeIdFrom: null,
      parentSizeBytes: null,
      isCompleted: false,
      changeIdTo: null,
    });
    expect(parseBackupExportName(disk.exportName)).toMatchObject({ vm: 'one', diskNumber: 1, type: 'full' });
    expect(first.push).toMatchObject({
      exports: `root=${disk.uris[0] ?? ''}`,
      hash: 'sha-256',
      clusterBytes: CLUSTER_BYTES,
    });
    expect(disk.uris.map((uri) => uri.replace(/:.*/, ''))).toEqual(['nbd', 'nbd+unix']);
    expect(await sizeAt(uriOf(first, 'root'))).toBe(8 * MIB + 1024);
    expect(await listed(daemon)).toMatchObject([
      { kind: 'push', name: disk.exportName, isReadOnly: false, runId: first.run.id },
    ]);

    await nbdcopy(file, uriOf(first, 'root'));
    const half = { totalBytes: ROOT_BYTES, bytesRead: 4 * MIB, bytesWritten: 3 * MIB, bytesSkipped: MIB };
    expect((await report(daemon, first, { root: half })).status).toBe(200);
    await expect
      .poll(
        async () => (await daemon.expect<RunView>(200, 'GET', `/runs/${first.run.id}`)).progress.disks,
        POLL,
      )
      .toMatchObject([{ diskId: disk.diskId, ...half }]);
    const sumsDigest = await digestOf(file, ALL, { sizeBytes: ROOT_BYTES, keepZeroes: false });
    const done = { changeId: 'monday', sumsDigest, bytesRead: ROOT_BYTES, bytesWritten: 3 * MIB };
    expect((await tryComplete(daemon, first, 'root', done)).body).toEqual({
      ...disk,
      isCompleted: true,
      changeIdTo: 'monday',
    });
    expect(await daemon.waitForRun(first.run.id)).toMatchObject({
      state: 'completed',
      result: { pointId: first.pointId },
    });
    await expectPushGone(rig, setup);
    await expectReadsBack(rig, first.pointId, { root: file });
    const point = await daemon.expect<BackupView>(200, 'GET', `/backups/${first.pointId}`);
    expect(point).toMatchObject({
      type: 'full',
      consistency: 'crash',
      layers: [{ changeIdTo: 'monday', bytesRead: ROOT_BYTES }],
    });

    const second = await startPush(daemon, setup, {
      push: { consistency: 'application', disks: [{ disk: 'root', changeIds: ['sunday', 'monday'] }] },
    });
    expect(diskOf(second, 'root')).toMatchObject({
      method: 'bitmap',
      changeIdFrom: 'monday',
      parentSizeBytes: ROOT_BYTES,
    });
    const changed = [
      { offset: MIB, length: 128 * KIB },
      { offset: 6 * MIB + 4096, length: 4096 },
    ];
    await writeRegions(file, changed);
    for (const { offset, length } of changed)
      await writeAt(uriOf(second, 'root'), offset, await read(file, offset, length));
    // What became zero must hide what the parent has.
    await qemuIo({ path: uriOf(second, 'root'), format: 'raw', commands: [`write -z ${2 * MIB} 64k`] });
    await qemuIo({ path: file, format: 'raw', commands: [`write -z ${2 * MIB} 64k`] });
    const clusters = [16, 17, 32, 96];
    const incremental = await digestOf(file, clusters, { sizeBytes: ROOT_BYTES, keepZeroes: true });
    await complete(daemon, second, 'root', { changeId: 'tuesday', sumsDigest: incremental });
    const run = await daemon.waitForRun(second.run.id);
    expect([run.state, run.error, methodsOf(run)]).toEqual(['completed', null, ['bitmap BITMAP']]);
    await expectReadsBack(rig, second.pointId, { root: file });
    expect(await daemon.expect<BackupView>(200, 'GET', `/backups/${second.pointId}`)).toMatchObject({
      type: 'incremental',
      consistency: 'application',
    });
    const { items } = await daemon.expect<{ items: ChainView[] }>(
      200,
      'GET',
      `/backups/${second.pointId}/chain`,
    );
    expect(items[0]?.layers.map(({ pointId }) => pointId)).toEqual([second.pointId, first.pointId]);
    await exportRaw(items[0]?.layers[0]?.path ?? '', 'qcow2', lab.file('stock.raw'));
    await truncate(lab.file('stock.raw'), ROOT_BYTES);
    expect(await firstDifference(lab.file('stock.raw'), file)).toBeNull();
    await expectSoundRepository(daemon, setup);
  });

  it('of two disks commits when both are complete, and not before', async () => {
    const { setup, files } = await newMachine(rig, 'two', { root: ROOT_BYTES, 'data disk': DATA_BYTES });
    const { daemon } = rig;
    const pushed = await startPush(daemon, setup);
    expect(pushed.push.exports.split(' ').map((part) => part.split('=')[0])).toEqual(['root', 'data%20disk']);
    for (const [name, file] of Object.entries(files)) {
      await runTool(
        'qemu-img',
        ['convert', '-n', '-f', 'raw', '-O', 'raw', file, uriOf(pushed, name)],
        TIMEOUT,
      );
    }
    await complete(daemon, pushed, 'data disk', { changeId: 'd1' });
    await expect
      .poll(
        async () => (await daemon.expect<RunView>(200, 'GET', `/runs/${pushed.run.id}`)).progress.push?.disks,
        POLL,
      )
      .toMatchObject([{ isCompleted: false }, { isCompleted: true, changeIdTo: 'd1' }]);
    expect(await listPoints(daemon, setup)).toEqual([]);
    expect((await listed(daemon)).length).toBe(2);
    await complete(daemon, pushed, 'root', { changeId: 'r1' });
    expect(await daemon.waitForRun(pushed.run.id)).toMatchObject({ state: 'completed' });
    await expectReadsBack(rig, pushed.pointId, files);

    // A part of the machine.
    const next = await startPush(daemon, setup, {
      push: { disks: [{ disk: 'data disk', changeIds: ['d1'] }] },
    });
    expect(next.push.disks).toMatchObject([{ diskName: 'data disk', number: 2, method: 'bitmap' }]);
    await finish(daemon, next, 'again');
    await expectReadsBack(rig, next.pointId, { 'data disk': files['data disk'] ?? '' });
    await expectSoundRepository(daemon, setup);
  });

  it('follows a disk that grew, and takes a full of one that shrank', async () => {
    const { setup, files } = await newMachine(rig, 'grown', { root: ROOT_BYTES });
    const file = files['root'] ?? '';
    const { daemon } = rig;
    await pushFull(setup, file, 'small');
    const sizeBytes = 12 * MIB;
    await truncate(file, sizeBytes);
    await writeRegions(file, [{ offset: 11 * MIB, length: MIB }]);
    const grown = await startPush(daemon, setup, { push: { disks: [{ disk: 'root', sizeBytes }] } });
    expect(diskOf(grown, 'root')).toMatchObject({ method: 'bitmap', sizeBytes, parentSizeBytes: ROOT_BYTES });
    expect(await sizeAt(uriOf(grown, 'root'))).toBe(sizeBytes);
    // From the cluster on that the parent ends in.
    const from = ROOT_BYTES - (ROOT_BYTES % CLUSTER_BYTES);
    await writeAt(uriOf(grown, 'root'), from, await read(file, from, sizeBytes - from));
    await finish(daemon, grown, 'grown');
    await expectReadsBack(rig, grown.pointId, { root: file });
    expect((await getVm(daemon, setup)).disks).toMatchObject([
      { sizeBytes, source: { kind: 'push', sizeBytes } },
    ]);

    await truncate(file, DATA_BYTES);
    const shrunk = await startPush(daemon, setup, {
      push: { disks: [{ disk: 'root', sizeBytes: DATA_BYTES }] },
    });
    expect(diskOf(shrunk, 'root')).toMatchObject({
      method: 'full',
      reason: { code: 'DISK_SHRANK' },
      parentSizeBytes: null,
    });
    await nbdcopy(file, uriOf(shrunk, 'root'));
    await finish(daemon, shrunk, 'shrunk');
    await expectReadsBack(rig, shrunk.pointId, { root: file });
    await expectSoundRepository(daemon, setup);
  });

  it('is a full when the agent has not the last change id, or says the disk is another one', async () => {
    const { setup, files } = await newMachine(rig, 'fulls', { root: ROOT_BYTES });
    const file = files['root'] ?? '';
    const { daemon } = rig;
    const insisted = await requestPush(daemon, setup, { type: 'incremental' });
    expect(insisted).toMatchObject({
      state: 'failed',
      error: { code: 'INCREMENTAL_IMPOSSIBLE' },
      progress: { push: null },
    });
    await pushFull(setup, file, '1');
    for (const [disk, code] of [
      [{ disk: 'root', changeIds: ['root-0'] }, 'BITMAP_MISSING'],
      [{ disk: 'root', lineage: 'another' }, 'DISK_REPLACED'],
    ] as const) {
      const pushed = await startPush(daemon, setup, { push: { disks: [{ ...disk }] } });
      expect(diskOf(pushed, 'root')).toMatchObject({ method: 'full', reason: { code } });
      await nbdcopy(file, uriOf(pushed, 'root'));
      await finish(daemon, pushed, code);
      await expectReadsBack(rig, pushed.pointId, { root: file });
    }
    const refused = await requestPush(daemon, setup, {
      type: 'incremental',
      push: { disks: [{ disk: 'root', lineage: 'another', changeIds: [] }] },
    });
    await expectPushFailed(rig, setup, { run: refused, code: 'BITMAP_MISSING' });
    // The lineage that was stated is the recorded one now.
    const next = await startPush(daemon, setup, {
      push: { disks: [{ disk: 'root', changeIds: ['root-DISK_REPLACED'] }] },
    });
    expect(diskOf(next, 'root').method).toBe('bitmap');
    await finish(daemon, next, 'next');
    await expectReadsBack(rig, next.pointId, { root: file });
  });

  it('cannot be mixed with what Holdfast reads: a disk read here is pushed under a lineage of its own', async () => {
    const { daemon, lab } = rig;
    const file = lab.file('pulled.raw');
    await makeRaw({ path: file, sizeBytes: DATA_BYTES, regions: [{ offset: 0, length: MIB }] });
    const setup = await setUp(daemon, {
      root: lab.file('repository-pulled'),
      vmName: 'pulled',
      disks: [{ name: 'root', source: imageDisk(file) }],
    });
    await backUp(daemon, setup);
    const pushed = await startPush(daemon, setup);
    expect(diskOf(pushed, 'root')).toMatchObject({ method: 'full', reason: { code: 'DISK_REPLACED' } });
    await copyFile(file, lab.file('pushed.raw'));
    await writeRegions(lab.file('pushed.raw'), [{ offset: 2 * MIB, length: MIB }]);
    await nbdcopy(lab.file('pushed.raw'), uriOf(pushed, 'root'));
    await finish(daemon, pushed, 'pushed');
    await expectReadsBack(rig, pushed.pointId, { root: lab.file('pushed.raw') });
    const again = await backUp(daemon, setup);
    expect(methodsOf(again)).toEqual(['full DISK_REPLACED']);
    await expectReadsBack(rig, again.pointId, { root: file });
  });

  it('cannot be pulled: nothing is known of where the disk is', async () => {
    const { setup } = await newMachine(rig, 'unpullable', { root: ROOT_BYTES });
    const run = await backUp(rig.daemon, setup, { expectState: 'failed' });
    expect(run.error).toMatchObject({
      code: 'CONFLICT',
      message: expect.stringContaining('only pushed') as string,
    });
  });

  it('has the turn of its machine while it is under way', async () => {
    const { setup, files } = await newMachine(rig, 'turn', { root: ROOT_BYTES });
    const { daemon } = rig;
    const pushed = await startPush(daemon, setup);
    const ids = { vmId: setup.vm.id, repositoryId: setup.repository.id };
    expect(
      (await daemon.request('POST', '/backups', { ...ids, source: 'push', push: {} })).body,
    ).toMatchObject({ code: 'RUN_ACTIVE' });
    expect((await daemon.request('POST', '/backups', ids)).body).toMatchObject({ code: 'RUN_ACTIVE' });
    const waiting = requestPush(daemon, setup, { whenBusy: 'queue' });
    await nbdcopy(files['root'] ?? '', uriOf(pushed, 'root'));
    await finish(daemon, pushed, 'first');
    const next = await waiting;
    expect(next.progress.push?.disks).toMatchObject([{ method: 'bitmap', changeIdFrom: 'root-first' }]);
    await daemon.expect(202, 'POST', `/runs/${next.id}/cancel`);
    await daemon.waitForRun(next.id);
  });
});

describe('a pushed backup for one identity', () => {
  it('is written by its key alone', async () => {
    const { setup, files } = await newMachine(rig, 'identity', { root: ROOT_BYTES });
    const { daemon, identitiesDirectory } = rig;
    for (const user of ['agent', 'other']) await daemon.expect(201, 'POST', '/exports/identities', { user });
    const pushed = await startPush(daemon, setup, { push: { identity: { kind: 'psk', user: 'agent' } } });
    const uri = uriOf(pushed, 'root');
    expect([uri.startsWith('nbds://'), diskOf(pushed, 'root').uris.length]).toEqual([true, 1]);
    const as = (user: string) => ({
      ...{ uri, connectTimeoutMs: 10_000, requestTimeoutMs: 10_000 },
      tls: { pskFile: path.join(identitiesDirectory, `${user}.psk`), username: user },
    });
    await expect(connectNbd(as('other'))).rejects.toMatchObject({ code: 'NBD_CONNECT' });
    {
      await using client = await connectNbd(as('agent'));
      const data = await read(files['root'] ?? '', 0, ROOT_BYTES);
      await client.pwrite(0, data);
      await client.flush();
    }
    await finish(daemon, pushed, 'monday');
    await expectPushGone(rig, setup);
    await expectReadsBack(rig, pushed.pointId, files);
  });
});

describe('a pushed backup of a machine whose appliance was lost', () => {
  it('goes on with its chain, before and after the machine is given its sources again', async () => {
    const { setup, files } = await newMachine(rig, 'lost', { root: ROOT_BYTES });
    const { daemon: lost, lab, settings } = rig;
    await pushFull(setup, files['root'] ?? '', '1');
    await using daemon = await startDaemon({ directory: lab.file('second'), settings });
    const { name, root } = setup.repository;
    const repository = await daemon.expect<RepositoryView>(201, 'POST', '/repositories', {
      ...{ name, root, mode: 'open', takeover: true },
    });
    const { items } = await pollUntil(
      async () => {
        const vms = await daemon.expect<{ items: VmView[] }>(200, 'GET', '/vms');
        return vms.items.length > 0 ? vms : undefined;
      },
      { timeoutMs: 20_000, intervalMs: 100, what: 'the machine known from the repository' },
    );
    const vm = items[0];
    expect(vm).toMatchObject({ id: setup.vm.id, disks: [{ source: null, sizeBytes: ROOT_BYTES }] });
    if (vm === undefined) return;
    const disks = [{ name: 'root', source: pushDisk(ROOT_BYTES) }];
    for (const [word, last] of [
      ['2', '1'],
      ['3', '2'],
    ] as const) {
      const pushed = await startPush(
        daemon,
        { repository, vm },
        { push: { disks: [{ disk: 'root', changeIds: [`root-${last}`] }] } },
      );
      expect(diskOf(pushed, 'root')).toMatchObject({ method: 'bitmap', changeIdFrom: `root-${last}` });
      await finish(daemon, pushed, word);
      if (word === '2') await daemon.expect(201, 'POST', '/vms', { name: 'lost', disks });
    }
    await expectSoundRepository(daemon, { repository, vm });
    expect(
      (
        await lost.request('POST', '/backups', {
          vmId: vm.id,
          repositoryId: setup.repository.id,
          source: 'push',
          push: {},
        })
      ).body,
    ).toMatchObject({
      state: 'failed',
      error: { code: 'REPOSITORY_FOREIGN' },
    });
  });
});

async function read(file: string, offset: number, length: number): Promise<Buffer> {
  await using handle = await open(file, 'r');
  const data = Buffer.alloc(length);
  await handle.read(data, 0, length, offset);
  return data;
}
