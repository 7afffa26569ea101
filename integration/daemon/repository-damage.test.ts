import { chmod, open, readdir, rm, stat } from 'node:fs/promises';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { BackupView, ChainView, Page, RepositoryView, RunView, VmView } from '../../src/engine/types.js';
import { KIB, MIB } from '../../src/lib/units.js';
import { firstDifference, makeRaw, writeRegions } from '../lab/disk-image.js';
import { backUp, setUp, startDaemon, type Daemon, type Setup } from './daemon.js';
import {
  expectFailure,
  expectGoodBackup,
  expectNothingLeft,
  expectReadsBack,
  imageDisk,
  listPoints,
  methodsOf,
  startRig,
  stopRig,
  type Rig,
} from './rig.js';

type CheckResult = Extract<RunView['result'], { kind: 'check' }>;

describe('a repository that is damaged, moved or cleaned up', () => {
  let rig: Rig;

  beforeAll(async () => {
    rig = await startRig();
  });

  afterAll(() => stopRig(rig));

  const setUpImage = async (name: string): Promise<{ setup: Setup; truth: string }> => {
    const truth = rig.lab.file(`${name}.raw`);
    await makeRaw({ path: truth, sizeBytes: 8 * MIB, regions: [{ offset: 2 * MIB, length: 2 * MIB }] });
    const setup = await setUp(rig.daemon, {
      root: rig.lab.file(`repository-${name}`),
      vmName: name,
      disks: [{ name: 'vda', source: imageDisk(truth) }],
    });
    return { setup, truth };
  };

  const runCheck = async (setup: Setup): Promise<CheckResult['report']> => {
    const run = await rig.daemon.expect<RunView>(202, 'POST', `/repositories/${setup.repository.id}/check`, {
      content: true,
    });
    const ended = await rig.daemon.waitForRun(run.id);
    expect(ended.state, JSON.stringify(ended.error)).toBe('completed');
    return (ended.result as CheckResult).report;
  };

  const layerPath = async (pointId: string | null): Promise<string> => {
    const chains = await rig.daemon.expect<Page<ChainView>>(200, 'GET', `/backups/${pointId ?? ''}/chain`);
    return chains.items[0]?.layers[0]?.path ?? '';
  };

  const flipByte = async (file: string, offset: number): Promise<void> => {
    await chmod(file, 0o600);
    const handle = await open(file, 'r+');
    try {
      const byte = Buffer.alloc(1);
      await handle.read(byte, 0, 1, offset);
      byte.writeUInt8(byte.readUInt8() ^ 0x10);
      await handle.write(byte, 0, 1, offset);
    } finally {
      await handle.close();
    }
    await chmod(file, 0o440);
  };

  const restore = async (
    point: BackupView,
    file: string,
    options: { acceptDamage?: boolean } = {},
  ): Promise<RunView> => {
    const run = await rig.daemon.expect<RunView>(202, 'POST', '/restore/images', {
      pointId: point.id,
      disks: [{ diskId: point.layers[0]?.diskId, target: { kind: 'file', path: file, format: 'raw' } }],
      ...options,
    });
    return rig.daemon.waitForRun(run.id);
  };

  const getPoint = (run: RunView): Promise<BackupView> =>
    rig.daemon.expect<BackupView>(200, 'GET', `/backups/${run.pointId ?? ''}`);

  it('with a flipped byte in a layer is told by a check, down to disk and offset, and not restored', async () => {
    const { setup, truth } = await setUpImage('flipped');
    const first = await backUp(rig.daemon, setup);
    await writeRegions(truth, [{ offset: 6 * MIB, length: 4 * KIB, seed: 3 }]);
    const second = await backUp(rig.daemon, setup);
    expect(await runCheck(setup)).toMatchObject({ findings: [], damagedPoints: [], points: 2 });

    const layer = await layerPath(first.pointId);
    // A layer this small ends with its only L2 table; before that lies data.
    await flipByte(layer, (await stat(layer)).size - 64 * KIB - 1000);
    const report = await runCheck(setup);
    expect(report.findings).toHaveLength(1);
    const [finding] = report.findings;
    expect(finding).toMatchObject({
      code: 'LAYER_CORRUPT',
      severity: 'error',
      vmId: setup.vm.id,
      diskId: setup.vm.disks[0]?.id,
      pointId: first.pointId,
    });
    const offset = finding?.offset ?? -1;
    expect(offset).toBeGreaterThanOrEqual(2 * MIB);
    expect(offset).toBeLessThan(4 * MIB);
    expect(report.damagedPoints).toEqual([first.pointId, second.pointId].sort());

    const to = rig.lab.file('flipped-restored.raw');
    const refused = await restore(await getPoint(second), to);
    expect([refused.state, refused.error?.code]).toEqual(['failed', 'LAYER_CORRUPT']);
    expect((await readdir(rig.lab.path)).filter((name) => name.includes('flipped-restored'))).toEqual([]);
    const accepted = await restore(await getPoint(second), to, { acceptDamage: true });
    expect(accepted.state).toBe('completed');
    expect(accepted.result).toMatchObject({ disks: [{ damagedBytes: 64 * KIB }] });
    const difference = await firstDifference(to, truth);
    expect(difference?.kind).toBe('byte');
    if (difference?.kind === 'byte')
      expect(difference.offset - (difference.offset % (64 * KIB))).toBe(offset);

    await expectGoodBackup(rig, setup, { type: 'full', truths: { vda: truth } });
  });

  it('with a flipped byte in the sums refuses to build on it and starts anew, saying why', async () => {
    const { setup, truth } = await setUpImage('sums');
    const first = await backUp(rig.daemon, setup);
    const sums = (await layerPath(first.pointId)).replace(/\.qcow2$/, '.sums');
    await flipByte(sums, (await stat(sums)).size - 10);
    const report = await runCheck(setup);
    expect(report.damagedPoints).toEqual([first.pointId]);
    expect(report.findings[0]).toMatchObject({ code: 'LAYER_CORRUPT', diskId: setup.vm.disks[0]?.id });
    const refused = await restore(await getPoint(first), rig.lab.file('sums-restored.raw'));
    expect([refused.state, refused.error?.code]).toEqual(['failed', 'LAYER_CORRUPT']);

    await expectFailure(rig, setup, { type: 'incremental', code: 'INCREMENTAL_IMPOSSIBLE' });
    const next = await expectGoodBackup(rig, setup, { truths: { vda: truth } });
    expect(methodsOf(next)).toEqual(['full PARENT_DAMAGED']);
  });

  it('with a layer gone starts anew, saying why', async () => {
    const { setup, truth } = await setUpImage('gone');
    const first = await backUp(rig.daemon, setup);
    await rm(await layerPath(first.pointId));
    expect((await runCheck(setup)).findings[0]).toMatchObject({ code: 'LAYER_NOT_FOUND' });
    const refused = await restore(await getPoint(first), rig.lab.file('gone-restored.raw'));
    expect([refused.state, refused.error?.code]).toEqual(['failed', 'LAYER_NOT_FOUND']);
    const next = await expectGoodBackup(rig, setup, { truths: { vda: truth } });
    expect(methodsOf(next)).toEqual(['full PARENT_DAMAGED']);
  });

  it('with a flipped byte in a manifest changes nothing of that machine until it reads again', async () => {
    const { setup, truth } = await setUpImage('manifest');
    const first = await backUp(rig.daemon, setup);
    const manifest = path.join(
      setup.repository.root,
      'vms',
      setup.vm.id,
      'points',
      `${first.pointId ?? ''}.json`,
    );
    const middle = Math.floor((await stat(manifest)).size / 2);
    await flipByte(manifest, middle);
    const report = await runCheck(setup);
    expect(report.findings[0]).toMatchObject({ code: 'MANIFEST_UNREADABLE', pointId: first.pointId });
    await expectFailure(rig, setup, { code: 'MANIFEST_UNREADABLE' });
    const rescan = await rig.daemon.expect<RunView>(
      202,
      'POST',
      `/repositories/${setup.repository.id}/rescan`,
    );
    expect((await rig.daemon.waitForRun(rescan.id)).error?.code).toBe('MANIFEST_UNREADABLE');
    expect(await listPoints(rig.daemon, setup)).toEqual([first.pointId]);
    await flipByte(manifest, middle);
    await expectGoodBackup(rig, setup, { truths: { vda: truth } });
  });

  it('keeps a point others stand on, and removes file and row of one nothing stands on', async () => {
    const { setup, truth } = await setUpImage('delete');
    const first = await backUp(rig.daemon, setup);
    await writeRegions(truth, [{ offset: 6 * MIB, length: 4 * KIB, seed: 3 }]);
    const second = await backUp(rig.daemon, setup);
    const refused = await rig.daemon.request('DELETE', `/backups/${first.pointId ?? ''}`);
    expect([refused.status, refused.body]).toMatchObject([409, { code: 'POINT_HAS_DEPENDENTS' }]);
    expect(JSON.stringify(refused.body)).toContain(second.pointId);

    for (const { pointId } of [second, first]) {
      const layer = await layerPath(pointId);
      const run = await rig.daemon.expect<RunView>(202, 'DELETE', `/backups/${pointId ?? ''}`);
      const ended = await rig.daemon.waitForRun(run.id);
      expect(ended.state, JSON.stringify(ended.error)).toBe('completed');
      await expect(stat(layer)).rejects.toMatchObject({ code: 'ENOENT' });
      expect((await rig.daemon.request('GET', `/backups/${pointId ?? ''}`)).status).toBe(404);
    }
    expect(await runCheck(setup)).toMatchObject({ points: 0, findings: [] });
    const next = await expectGoodBackup(rig, setup, { truths: { vda: truth } });
    expect(methodsOf(next)).toEqual(['full FIRST_POINT']);
  });

  /** Another appliance, with a state of its own, as after the loss of the first. */
  const withOther = async (name: string, work: (other: Daemon) => Promise<void>): Promise<void> => {
    const other = await startDaemon({ directory: rig.lab.file(name) });
    try {
      await work(other);
    } finally {
      await other.stop();
    }
  };

  const waitForRescan = async (daemon: Daemon, repositoryId: string): Promise<void> => {
    const { items } = await daemon.expect<Page<RunView>>(200, 'GET', '/runs?kind=rescan');
    const run = items.find((candidate) => candidate.repositoryId === repositoryId);
    expect((await daemon.waitForRun(run?.id ?? '')).state).toBe('completed');
  };

  it('of another appliance is refused until it is taken over; then it restores, and goes on', async () => {
    const { setup, truth } = await setUpImage('foreign');
    const before = rig.lab.file('foreign-before.raw');
    const first = await backUp(rig.daemon, setup);
    await expectReadsBack(rig, first.pointId, { vda: truth });
    await makeRaw({ path: before, sizeBytes: 8 * MIB, regions: [{ offset: 2 * MIB, length: 2 * MIB }] });
    await writeRegions(truth, [{ offset: 6 * MIB, length: 4 * KIB, seed: 3 }]);

    await withOther('other', async (other) => {
      const there = { name: 'taken', root: setup.repository.root, mode: 'open' };
      const refused = await other.request('POST', '/repositories', there);
      expect([refused.status, refused.body]).toMatchObject([409, { code: 'REPOSITORY_FOREIGN' }]);
      const create = await other.request('POST', '/repositories', { ...there, mode: 'create' });
      expect(create.body).toMatchObject({ code: 'REPOSITORY_EXISTS' });
      expect((await other.expect<Page<RepositoryView>>(200, 'GET', '/repositories')).items).toEqual([]);

      const taken = await other.expect<RepositoryView>(201, 'POST', '/repositories', {
        ...there,
        takeover: true,
      });
      expect(taken.id).toBe(setup.repository.id);
      await waitForRescan(other, taken.id);
      const otherRig: Rig = { lab: rig.lab, daemon: other };
      await expectReadsBack(otherRig, first.pointId, { vda: before });

      // The former owner finds out before it writes.
      await expectFailure(rig, setup, { code: 'REPOSITORY_FOREIGN' });

      // The machine is known from the repository; naming its disks' sources lets its chain go on.
      const known = await other.expect<VmView>(200, 'GET', `/vms/${setup.vm.id}`);
      expect(known).toMatchObject({ name: 'foreign', disks: [{ name: 'vda', source: null }] });
      const { body } = await other.request('POST', '/backups', { vmId: known.id, repositoryId: taken.id });
      const sourceless = await other.waitForRun((body as RunView).id);
      expect([sourceless.state, sourceless.error?.code]).toEqual(['failed', 'CONFLICT']);
      const vm = await other.expect<VmView>(201, 'POST', '/vms', {
        name: 'foreign',
        disks: [{ name: 'vda', source: imageDisk(truth) }],
      });
      expect(vm.id).toBe(setup.vm.id);
      const next = await backUp(other, { vm, repository: taken }, { type: 'incremental' });
      expect(methodsOf(next)).toEqual(['compare NO_CHANGE_RECORD']);
      await expectReadsBack(otherRig, next.pointId, { vda: truth });
      await expectReadsBack(otherRig, first.pointId, { vda: before });
    });
    await expectNothingLeft(rig, setup.repository.root);
  });
});
