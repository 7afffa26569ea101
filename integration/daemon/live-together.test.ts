import { mkdir, writeFile } from 'node:fs/promises';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { RunView } from '../../src/engine/types.js';
import { MIB } from '../../src/lib/units.js';
import { qemuImg, SeededRandom } from '../lab/disk-image.js';
import { startLibvirt } from '../lab/libvirt.js';
import { backUp, startBackup } from './daemon.js';
import {
  DISK_BYTES,
  domainOn,
  expectNoTrace,
  makeDomain,
  makeQemu,
  recordOf,
  setUpDomain,
  startLiveRig,
  stopLiveRig,
  traces,
  waitPastInstant,
  type LiveRig,
} from './live-rig.js';
import { expectFailure, expectGoodBackup, expectReadsBack, methodsOf, waitUntilCopying } from './rig.js';

const BITMAP = ['bitmap BITMAP', 'bitmap BITMAP'];
const SLOW = { bytesPerSecond: MIB };

describe('several at once', { timeout: 60_000 }, () => {
  let rig: LiveRig;

  beforeAll(async () => {
    rig = await startLiveRig({ runs: { workers: 3 } });
  });
  afterAll(() => stopLiveRig(rig));

  it('backs up three domains of two disks at the same time, each right', async () => {
    const random = new SeededRandom(3);
    const domains = [];
    for (const name of ['one', 'two', 'three']) {
      const domain = await makeDomain(rig, { name });
      domains.push({ domain, setup: await setUpDomain(rig, domain) });
    }
    for (const methods of [['full FIRST_POINT', 'full FIRST_POINT'], BITMAP]) {
      const started = [];
      for (const { domain, setup } of domains) {
        const truths = await domain.remember();
        started.push({ truths, domain, run: await startBackup(rig.daemon, setup, SLOW) });
      }
      for (const { domain, run } of started) {
        await waitPastInstant(rig.daemon, run.id);
        await domain.work(random, 4);
      }
      const runs = await Promise.all(started.map(({ run }) => rig.daemon.waitForRun(run.id)));
      const lastStart = Math.max(...runs.map(({ startedAt }) => Date.parse(startedAt ?? '')));
      const firstEnd = Math.min(...runs.map(({ endedAt }) => Date.parse(endedAt ?? '')));
      expect(lastStart).toBeLessThan(firstEnd);
      for (const [index, { truths, domain }] of started.entries()) {
        const run = runs[index];
        if (run === undefined) throw new Error('a run is missing');
        expect(methodsOf(run)).toEqual(methods);
        await expectReadsBack(rig, run.pointId, truths);
        await expectNoTrace(rig, domain, [recordOf(run)]);
      }
    }
    for (const { domain } of domains) await domain.stop();
  });

  it('lets the second repository wait for its turn, and both points are right', async () => {
    const domain = await makeDomain(rig, { name: 'wanted' });
    const here = await setUpDomain(rig, domain, 'here');
    const there = await setUpDomain(rig, domain, 'there');
    const first = await startBackup(rig.daemon, here, SLOW);
    const second = await startBackup(rig.daemon, there, SLOW);
    await waitUntilCopying(rig.daemon, first.id);
    const waiting = await rig.daemon.expect<RunView>(200, 'GET', `/runs/${second.id}`);
    expect(waiting.state).toBe('queued');
    const before = await domain.remember();
    await domain.write('vda', 'write -P 5 1M 64k');
    const ended = [await rig.daemon.waitForRun(first.id), await rig.daemon.waitForRun(second.id)];
    expect(ended.map(({ state, attempt }) => [state, attempt])).toEqual([
      ['completed', 1],
      ['completed', 1],
    ]);
    expect(Date.parse(ended[1]?.startedAt ?? '')).toBeGreaterThanOrEqual(Date.parse(ended[0]?.endedAt ?? ''));
    await expectReadsBack(rig, first.pointId, before);
    await expectReadsBack(rig, second.pointId, domain.truths);
    await expectNoTrace(rig, domain, [recordOf(first), recordOf(second)]);
    await domain.stop();
  });

  it("leaves somebody else's backup job alone, and says that the machine is busy", async () => {
    const domain = await makeDomain(rig, { name: 'taken' });
    const setup = await setUpDomain(rig, domain);
    const first = await backUp(rig.daemon, setup);
    const theirs = rig.lab.file('theirs');
    await mkdir(theirs);
    const job = `${theirs}/job.xml`;
    const disks = ['vda', 'vdb'].map(
      (name) => `<disk name='${name}'><scratch file='${theirs}/${name}'/></disk>`,
    );
    const server = `<server transport='unix' socket='${theirs}/nbd.sock'/>`;
    await writeFile(
      job,
      `<domainbackup mode='pull'>${server}<disks>${disks.join('')}</disks></domainbackup>`,
    );
    await rig.libvirt.virsh('backup-begin', 'taken', job);
    const before = await domain.remember();
    await domain.write('vda', 'write -P 6 0 128k');
    await expectFailure(rig, setup, { code: 'SOURCE_BUSY' });
    await rig.libvirt.virsh('backup-dumpxml', 'taken');
    await qemuImg([
      'compare',
      '-f',
      'raw',
      '-F',
      'raw',
      `nbd+unix:///vda?socket=${theirs}/nbd.sock`,
      before['vda'] ?? '',
    ]);
    await rig.libvirt.virsh('domjobabort', 'taken');
    await expectNoTrace(rig, domain, [recordOf(first)]);
    const good = await expectGoodBackup(rig, setup, { truths: domain.truths });
    expect(methodsOf(good)).toEqual(BITMAP);
    await domain.stop();
  });

  it("leaves somebody else's NBD server and block job in QEMU alone", async () => {
    const machine = await makeQemu(rig, { name: 'shared' });
    const setup = await setUpDomain(rig, machine);
    const first = await backUp(rig.daemon, setup);
    const addr = { type: 'unix', data: { path: rig.lab.file('theirs.sock') } };
    await machine.qmp('nbd-server-start', { addr });
    await machine.qmp('block-export-add', {
      type: 'nbd',
      id: 'theirs',
      'node-name': 'vda-format',
      name: 'x',
    });
    await expectFailure(rig, setup, { code: 'SOURCE_BUSY' });
    expect(await traces(machine)).toEqual(['export theirs']);
    const uri = `nbd+unix:///x?socket=${rig.lab.file('theirs.sock')}`;
    await qemuImg(['compare', '-f', 'raw', '-F', 'raw', uri, machine.truths['vda'] ?? '']);
    await machine.qmp('nbd-server-stop');
    await expectNoTrace(rig, machine, [recordOf(first)]);

    await qemuImg(['create', '-q', '-f', 'qcow2', rig.lab.file('copy.qcow2'), String(DISK_BYTES)]);
    await machine.qmp('drive-mirror', {
      'job-id': 'their-job',
      device: 'vda-format',
      target: rig.lab.file('copy.qcow2'),
      format: 'qcow2',
      mode: 'existing',
      sync: 'full',
    });
    await expectFailure(rig, setup, { code: 'SOURCE_BUSY' });
    expect(await traces(machine)).toEqual(['job their-job']);
    await machine.qmp('block-job-cancel', { device: 'their-job', force: true });
    const good = await expectGoodBackup(rig, setup, { truths: machine.truths });
    expect(methodsOf(good)).toEqual(BITMAP);
    await machine.stop();
  });

  it('follows a machine that migrates to another host, and back', async () => {
    const random = new SeededRandom(4);
    await using other = await startLibvirt(rig.lab, { name: 'l2' });
    const home = await makeDomain(rig, { name: 'nomad' });
    const setup = await setUpDomain(rig, home);
    await backUp(rig.daemon, setup);
    await home.work(random, 4);
    await rig.libvirt.migrate('nomad', other);
    const away = domainOn({ ...rig, libvirt: other }, home);
    const vm = await away.discover(rig.daemon);
    expect(vm.id).toBe(setup.vm.id);
    expect(vm.machine?.source).toMatchObject({ kind: 'libvirt', uri: other.uri });

    // libvirt took the bitmaps along, but not what it knew of them.
    const moved = await expectGoodBackup(rig, setup, { truths: away.truths });
    expect(methodsOf(moved)).toEqual(['compare BITMAP_MISSING', 'compare BITMAP_MISSING']);
    await expectNoTrace(rig, away, [recordOf(moved)]);
    // QEMU takes the disks over when the machine goes on.
    await other.virsh('resume', 'nomad');
    await other.virsh('suspend', 'nomad');
    await away.work(random, 3);
    const next = await expectGoodBackup(rig, setup, { truths: away.truths });
    expect(methodsOf(next)).toEqual(BITMAP);
    await expectNoTrace(rig, away, [recordOf(next)]);

    await other.migrate('nomad', rig.libvirt);
    expect((await home.discover(rig.daemon)).id).toBe(setup.vm.id);
    const back = await expectGoodBackup(rig, setup, { truths: home.truths });
    await expectNoTrace(rig, home, [recordOf(back)]);
    await home.stop();
  });
});
