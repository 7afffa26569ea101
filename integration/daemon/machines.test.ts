import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { BackupView, RunView, VmView } from '../../src/engine/types.js';
import { MIB } from '../../src/lib/units.js';
import { makeRaw, writeRegions } from '../lab/disk-image.js';
import { startQemuNbd, type LabNbdServer } from '../lab/nbd-server.js';
import { backUp, setUp, startBackup, type Setup } from './daemon.js';
import {
  expectFailed,
  expectFailure,
  expectGoodBackup,
  expectReadsBack,
  imageDisk,
  listPoints,
  nbdDisk,
  startRig,
  stopRig,
  waitUntilCopying,
  type Rig,
} from './rig.js';

const DISK_BYTES = 6 * MIB;

describe('machines and their disks', () => {
  let rig: Rig;

  beforeAll(async () => {
    rig = await startRig();
  });

  afterAll(() => stopRig(rig));

  const makeDisk = async (name: string): Promise<string> => {
    const file = rig.lab.file(`${name}.raw`);
    await makeRaw({
      path: file,
      sizeBytes: DISK_BYTES,
      regions: [{ offset: 0, length: 4 * MIB, seed: name.length }],
    });
    return file;
  };

  const serve = (name: string, image: string): Promise<LabNbdServer> =>
    startQemuNbd({ image, format: 'raw', socketPath: rig.lab.file(`${name}.sock`), isReadOnly: true });

  const setUpImage = async (name: string): Promise<{ setup: Setup; truth: string }> => {
    const truth = await makeDisk(name);
    const setup = await setUp(rig.daemon, {
      root: rig.lab.file(`repository-${name}`),
      vmName: name,
      disks: [{ name: 'vda', source: imageDisk(truth) }],
    });
    return { setup, truth };
  };

  it('keeps all disks of a machine in one point, and none of them when one fails', async () => {
    const truths = { vda: await makeDisk('a'), vdb: await makeDisk('bb'), vdc: await makeDisk('ccc') };
    await using first = await serve('a', truths.vda);
    const second = await serve('bb', truths.vdb);
    const setup = await setUp(rig.daemon, {
      root: rig.lab.file('repository-disks'),
      vmName: 'three disks',
      disks: [
        { name: 'vda', source: nbdDisk(first.uri) },
        { name: 'vdb', source: nbdDisk(second.uri) },
        { name: 'vdc', source: imageDisk(truths.vdc) },
      ],
    });
    expect(setup.vm.disks.map(({ number }) => number)).toEqual([1, 2, 3]);
    const good = await expectGoodBackup(rig, setup, { truths });
    const point = await rig.daemon.expect<BackupView>(200, 'GET', `/backups/${good.pointId ?? ''}`);
    expect(point.layers).toHaveLength(3);

    await second.stop();
    await expectFailure(rig, setup, { code: 'NBD_CONNECT' });
    expect(await listPoints(rig.daemon, setup)).toEqual([good.pointId]);
    await expectReadsBack(rig, good.pointId, truths);

    // In the middle of the copy, with the first disk done.
    const again = await serve('bb', truths.vdb);
    const run = await startBackup(rig.daemon, setup, { type: 'full', bytesPerSecond: 4 * MIB });
    const firstDisk = setup.vm.disks[0]?.id;
    await waitUntilCopying(rig.daemon, run.id, (disk) => disk.diskId !== firstDisk && disk.bytesRead > 0);
    await again.kill();
    await expectFailed(rig, setup, { run, code: 'NBD_PROTOCOL' });
    await using _last = await serve('bb', truths.vdb);
    await writeRegions(truths.vdb, [{ offset: MIB, length: 512, seed: 77 }]);
    await expectGoodBackup(rig, setup, { truths });
  });

  it('refuses a second backup of a machine while one is under way, or lets it wait its turn', async () => {
    const { setup, truth } = await setUpImage('twice');
    const one = await startBackup(rig.daemon, setup, { bytesPerSecond: 2 * MIB });
    const wanted = { vmId: setup.vm.id, repositoryId: setup.repository.id, type: 'auto' };
    expect(await rig.daemon.request('POST', '/backups', wanted)).toMatchObject({
      status: 409,
      body: { code: 'RUN_ACTIVE' },
    });
    await waitUntilCopying(rig.daemon, one.id);
    expect(await rig.daemon.request('POST', '/backups', wanted)).toMatchObject({ status: 409 });
    const waiting = await rig.daemon.expect<RunView>(202, 'POST', '/backups', {
      ...wanted,
      whenBusy: 'queue',
    });
    const now = await rig.daemon.expect<RunView>(200, 'GET', `/runs/${waiting.id}`);
    expect(now.state).toBe('queued');

    // Another machine in the same repository does not wait.
    const otherTruth = await makeDisk('meanwhile');
    const vm = await rig.daemon.expect<VmView>(201, 'POST', '/vms', {
      name: 'meanwhile',
      disks: [{ name: 'vda', source: imageDisk(otherTruth) }],
    });
    const other = await backUp(rig.daemon, { vm, repository: setup.repository });
    expect((await rig.daemon.expect<RunView>(200, 'GET', `/runs/${one.id}`)).state).toBe('running');

    const ends = [await rig.daemon.waitForRun(one.id), await rig.daemon.waitForRun(waiting.id)];
    expect(ends.map(({ state }) => state)).toEqual(['completed', 'completed']);
    expect(Date.parse(ends[1]?.startedAt ?? '')).toBeGreaterThanOrEqual(Date.parse(ends[0]?.endedAt ?? ''));
    expect(await listPoints(rig.daemon, setup)).toEqual([waiting.pointId, one.pointId]);
    await expectReadsBack(rig, waiting.pointId, { vda: truth });
    await expectReadsBack(rig, other.pointId, { vda: otherTruth });
  });

  it('makes one run of two requests at the same moment', async () => {
    const { setup } = await setUpImage('race');
    const wanted = { vmId: setup.vm.id, repositoryId: setup.repository.id, type: 'auto' };
    const answers = await Promise.all([1, 2, 3, 4].map(() => rig.daemon.request('POST', '/backups', wanted)));
    expect(answers.map(({ status }) => status).sort()).toEqual([202, 409, 409, 409]);
    const accepted = answers.find(({ status }) => status === 202)?.body as RunView;
    expect((await rig.daemon.waitForRun(accepted.id)).state).toBe('completed');
  });

  it.each([
    '../../../../tmp/escape',
    '..',
    '-rf',
    '$(reboot)',
    'a\'b"c`d;e|f&g',
    '<script>alert(1)</script>',
    '%2e%2e%2f',
    'ümläut 漢字 🦔',
    'db-disk1-full-20260101T000000Z',
    'x'.repeat(255),
  ])('takes a machine whose name is hostile as the text it is: %s', async (name) => {
    const truth = rig.lab.file('hostile.raw');
    await makeRaw({ path: truth, sizeBytes: MIB, regions: [{ offset: 0, length: 4096 }] }).catch(
      (error: unknown) => {
        if (!(error instanceof Error && 'code' in error && error.code === 'EEXIST')) throw error;
      },
    );
    const root = rig.lab.file(`repository-${Buffer.from(name).toString('hex').slice(0, 60)}`);
    const setup = await setUp(rig.daemon, {
      root,
      vmName: name,
      disks: [{ name, source: imageDisk(truth) }],
    });
    expect(setup.vm.name).toBe(name);
    const run = await backUp(rig.daemon, setup);
    const point = await rig.daemon.expect<BackupView>(200, 'GET', `/backups/${run.pointId ?? ''}`);
    expect([point.vmName, point.layers[0]?.diskName]).toEqual([name, name]);
    const to = rig.lab.file(`restored-${run.id}.raw`);
    const restore = await rig.daemon.expect<RunView>(202, 'POST', '/restore/images', {
      pointId: run.pointId,
      disks: [{ diskId: point.layers[0]?.diskId, target: { kind: 'file', path: to, format: 'raw' } }],
    });
    expect((await rig.daemon.waitForRun(restore.id)).state).toBe('completed');
  });

  it('refuses names with control characters, and two disks of one name', async () => {
    const truth = await makeDisk('names');
    for (const name of ['', ' ', 'a\u0000b', 'a\nb', '\u001b[31m', 'x'.repeat(1_000_000)]) {
      const answer = await rig.daemon.request('POST', '/vms', {
        name,
        disks: [{ name: 'vda', source: imageDisk(truth) }],
      });
      expect([413, 422]).toContain(answer.status);
    }
    const disks = [1, 2].map(() => ({ name: 'vda', source: imageDisk(truth) }));
    expect(await rig.daemon.request('POST', '/vms', { name: 'same', disks })).toMatchObject({
      status: 422,
      body: { code: 'INVALID_INPUT' },
    });
  });
});
