import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { RunView, VmView } from '../../src/engine/types.js';
import { MIB } from '../../src/lib/units.js';
import { SeededRandom } from '../lab/disk-image.js';
import { backUp, startBackup } from './daemon.js';
import {
  checkpointsOf,
  discoverOne,
  expectCleanSource,
  makeDomain,
  recordOf,
  setUpDomain,
  startLiveRig,
  stopLiveRig,
  waitPastInstant,
  type LiveRig,
} from './live-rig.js';
import { expectReadsBack, methodsOf } from './rig.js';

const BITMAP = 'bitmap BITMAP';

describe('a domain under libvirt', () => {
  let rig: LiveRig;

  beforeAll(async () => {
    rig = await startLiveRig();
  });

  afterAll(() => stopLiveRig(rig));

  it('is backed up while it runs, full and by what changed, both disks at one instant', async () => {
    const domain = await makeDomain(rig, { name: 'web' });
    const setup = await setUpDomain(rig, domain);
    const first = await backUp(rig.daemon, setup);
    expect(methodsOf(first)).toEqual(['full FIRST_POINT', 'full FIRST_POINT']);
    await expectCleanSource(rig, 'web', [recordOf(first)]);
    await expectReadsBack(rig, first.pointId, domain.truths);
    const before = await domain.remember();

    await domain.write('vda', 'write -P 0xaa 1M 128k');
    await domain.write('vdb', 'write -P 0xbb 3M 64k');
    const second = await backUp(rig.daemon, setup);
    expect(methodsOf(second)).toEqual([BITMAP, BITMAP]);
    expect(second.progress.disks.map(({ bytesRead }) => bytesRead)).toEqual([128 * 1024, 64 * 1024]);
    await expectCleanSource(rig, 'web', [recordOf(second)]);
    await expectReadsBack(rig, second.pointId, domain.truths);
    await expectReadsBack(rig, first.pointId, before);
    await domain.stop();
  });

  it('gives every point what the disks held at its instant, whatever is written during the copy', async () => {
    const domain = await makeDomain(rig, { name: 'busy' });
    const setup = await setUpDomain(rig, domain);
    const points: { run: RunView; truths: Record<string, string> }[] = [];
    const random = new SeededRandom(20261121);
    for (let round = 0; round < 4; round += 1) {
      const truths = await domain.remember();
      // Slow enough that the writes come while the copy is under way.
      const run = await startBackup(rig.daemon, setup, { bytesPerSecond: MIB });
      await waitPastInstant(rig.daemon, run.id);
      await domain.work(random, 12);
      points.push({ run: await rig.daemon.waitForRun(run.id), truths });
      await domain.work(random, 4);
    }
    for (const { run, truths } of points) await expectReadsBack(rig, run.pointId, truths);
    await domain.stop();
  });

  it('brings zeroed and discarded blocks back as zeroes', async () => {
    const domain = await makeDomain(rig, { name: 'zeroes', formats: { vda: 'qcow2' } });
    const setup = await setUpDomain(rig, domain);
    await domain.write('vda', 'write -P 0xaa 0 4M');
    await backUp(rig.daemon, setup);
    await domain.write('vda', 'write -z 0 64k');
    await domain.write('vda', 'write -zu 128k 64k');
    await domain.write('vda', 'discard 256k 64k');
    await domain.write('vda', 'write -zu 1M 1M');
    const run = await backUp(rig.daemon, setup);
    expect(methodsOf(run)).toEqual([BITMAP]);
    await expectReadsBack(rig, run.pointId, domain.truths);
    await domain.stop();
  });

  it('compares a raw disk, and counts on the record of the others', async () => {
    const domain = await makeDomain(rig, { name: 'mixed', formats: { vda: 'qcow2', vdb: 'raw' } });
    const setup = await setUpDomain(rig, domain);
    await backUp(rig.daemon, setup);
    await domain.write('vda', 'write -P 1 0 64k');
    await domain.write('vdb', 'write -P 2 0 64k');
    const run = await backUp(rig.daemon, setup);
    expect(methodsOf(run)).toEqual([BITMAP, 'compare NO_CHANGE_RECORD']);
    expect(run.progress.disks[1]?.bytesWritten).toBe(64 * 1024);
    await expectReadsBack(rig, run.pointId, domain.truths);
    await domain.stop();
  });

  it('is read while it is off, and counts on from the record it had', async () => {
    const domain = await makeDomain(rig, { name: 'asleep' });
    const setup = await setUpDomain(rig, domain);
    const first = await backUp(rig.daemon, setup);
    await domain.write('vda', 'write -P 7 0 64k');
    await domain.stop();
    const off = await backUp(rig.daemon, setup);
    expect(methodsOf(off)).toEqual([BITMAP, BITMAP]);
    await expectReadsBack(rig, off.pointId, domain.truths);
    expect(await rig.libvirt.virsh('domstate', 'asleep')).toContain('shut off');

    await domain.start();
    await domain.write('vdb', 'write -P 8 1M 64k');
    const on = await backUp(rig.daemon, setup);
    expect(methodsOf(on)).toEqual([BITMAP, BITMAP]);
    await expectReadsBack(rig, on.pointId, domain.truths);
    await expectCleanSource(rig, 'asleep', [recordOf(on)]);
    expect(recordOf(first)).not.toBe(recordOf(on));
    await domain.stop();
  });

  it('is protected by two repositories that do not disturb each other', async () => {
    const domain = await makeDomain(rig, { name: 'twice' });
    const here = await setUpDomain(rig, domain, 'here');
    const there = await setUpDomain(rig, domain, 'there');
    await backUp(rig.daemon, here);
    await domain.write('vda', 'write -P 1 0 64k');
    await backUp(rig.daemon, there);
    await domain.write('vda', 'write -P 2 1M 64k');
    const second = await backUp(rig.daemon, here);
    expect(second.progress.disks[0]).toMatchObject({ method: 'bitmap', bytesRead: 128 * 1024 });
    await domain.write('vdb', 'write -P 3 0 64k');
    const other = await backUp(rig.daemon, there);
    expect(other.progress.disks[0]).toMatchObject({ method: 'bitmap', bytesRead: 64 * 1024 });
    await expectReadsBack(rig, other.pointId, domain.truths);
    await expectCleanSource(rig, 'twice', [recordOf(second), recordOf(other)]);
    await domain.stop();
  });

  it('loses its checkpoints when it is released, and keeps its ids when it is renamed', async () => {
    const domain = await makeDomain(rig, { name: 'old-name' });
    const setup = await setUpDomain(rig, domain);
    await backUp(rig.daemon, setup);
    await rig.libvirt.virsh('checkpoint-create-as', 'old-name', 'somebody-else');
    const shown = await discoverOne(rig.daemon, rig.libvirt.uri, 'old-name');
    expect(shown.id).toBe(setup.vm.id);
    expect(shown.machine?.changeRecords).toHaveLength(1);
    const released = await rig.daemon.expect<{ removed: string[]; kept: string[] }>(
      200,
      'POST',
      `/vms/${setup.vm.id}/release`,
    );
    expect(released.removed).toHaveLength(1);
    expect(await checkpointsOf(rig, 'old-name')).toEqual(['somebody-else']);
    const vm = await rig.daemon.expect<VmView>(200, 'GET', `/vms/${setup.vm.id}`);
    expect(vm.machine?.changeRecords).toEqual([]);

    await rig.libvirt.virsh('checkpoint-delete', 'old-name', 'somebody-else');
    await domain.stop();
    await rig.libvirt.virsh('domrename', 'old-name', 'new-name');
    const renamed = await discoverOne(rig.daemon, rig.libvirt.uri, 'new-name');
    expect([renamed.id, renamed.name]).toEqual([setup.vm.id, 'new-name']);
    const run = await backUp(rig.daemon, setup);
    expect(methodsOf(run)).toEqual(['compare BITMAP_MISSING', 'compare BITMAP_MISSING']);
    await expectReadsBack(rig, run.pointId, domain.truths);
    await rig.libvirt.virsh('undefine', 'new-name');
    const gone = await startBackup(rig.daemon, setup);
    expect((await rig.daemon.waitForRun(gone.id)).error?.code).toBe('NOT_FOUND');
    expect((await rig.daemon.expect<VmView>(200, 'GET', `/vms/${setup.vm.id}`)).machine?.isPresent).toBe(
      false,
    );
  });
});
