import { readdir } from 'node:fs/promises';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { RunView } from '../../src/engine/types.js';
import { MIB } from '../../src/lib/units.js';
import { makeRaw } from '../lab/disk-image.js';
import { startNbdkit, startQemuNbd, type LabNbdServer } from '../lab/nbd-server.js';
import { backUp, setUp, startBackup, type Setup } from './daemon.js';
import {
  expectGoodBackup,
  expectNothingLeft,
  listPoints,
  nbdDisk,
  startRig,
  stopRig,
  waitUntilCopying,
  waitUntilRunning,
  type Rig,
} from './rig.js';

const DISK_BYTES = 16 * MIB;
const SLOW = 2 * MIB;

describe('cancelling', () => {
  let rig: Rig;
  let truth: string;

  beforeAll(async () => {
    // Longer than any wait here, so that only the cancel can end the run.
    const patient = { connectTimeoutMs: 30_000, requestTimeoutMs: 30_000, stallTimeoutMs: 30_000 };
    rig = await startRig({ nbd: patient, runs: { workers: 1 } });
    truth = rig.lab.file('disk.raw');
    await makeRaw({ path: truth, sizeBytes: DISK_BYTES, regions: [{ offset: 0, length: DISK_BYTES }] });
  });

  afterAll(() => stopRig(rig));

  const serve = (name: string): Promise<LabNbdServer> =>
    startQemuNbd({ image: truth, format: 'raw', socketPath: rig.lab.file(`${name}.sock`), isReadOnly: true });

  const setUpWith = (name: string, uri: string): Promise<Setup> =>
    setUp(rig.daemon, {
      root: rig.lab.file(`repository-${name}`),
      vmName: name,
      disks: [{ name: 'vda', source: nbdDisk(uri) }],
    });

  /** Cancels; the run must have ended as cancelled within the time, and left nothing. */
  const cancel = async (setup: Setup, run: RunView, withinMs: number): Promise<RunView> => {
    const startedMs = performance.now();
    await rig.daemon.expect<RunView>(202, 'POST', `/runs/${run.id}/cancel`);
    const ended = await rig.daemon.waitForRun(run.id);
    expect(performance.now() - startedMs).toBeLessThan(withinMs);
    expect([ended.state, ended.error?.code]).toEqual(['cancelled', 'CANCELLED']);
    expect(ended.result).toBeNull();
    await expectNothingLeft(rig, setup.repository.root);
    const again = await rig.daemon.request('POST', `/runs/${run.id}/cancel`);
    expect([again.status, again.body]).toMatchObject([409, { code: 'RUN_NOT_ACTIVE' }]);
    return ended;
  };

  it('ends a running copy within two seconds, and a queued run at once', async () => {
    await using server = await serve('running');
    const setup = await setUpWith('running', server.uri);
    const running = await startBackup(rig.daemon, setup, { bytesPerSecond: SLOW });
    await waitUntilCopying(rig.daemon, running.id);
    const wanted = { vmId: setup.vm.id, repositoryId: setup.repository.id, whenBusy: 'queue' };
    const queued = await rig.daemon.expect<RunView>(202, 'POST', '/backups', wanted);
    const answer = await rig.daemon.expect<RunView>(202, 'POST', `/runs/${queued.id}/cancel`);
    expect(answer.state).toBe('cancelled');
    expect(answer.startedAt).toBeNull();
    await cancel(setup, running, 2000);
    expect(await listPoints(rig.daemon, setup)).toEqual([]);
    await expectGoodBackup(rig, setup, { truths: { vda: truth } });
  });

  it('ends a copy within two seconds while its source is stopped', async () => {
    await using server = await serve('stopped');
    const setup = await setUpWith('stopped', server.uri);
    const run = await startBackup(rig.daemon, setup, { bytesPerSecond: SLOW });
    await waitUntilCopying(rig.daemon, run.id);
    server.freeze();
    await cancel(setup, run, 2000);
    server.thaw();
    await expectGoodBackup(rig, setup, { truths: { vda: truth } });
  });

  it('ends a run within two seconds while it connects to a source that is stopped', async () => {
    await using server = await serve('connecting');
    const setup = await setUpWith('connecting', server.uri);
    server.freeze();
    const run = await startBackup(rig.daemon, setup);
    await waitUntilRunning(rig.daemon, run.id);
    await cancel(setup, run, 2000);
    server.thaw();
    await expectGoodBackup(rig, setup, { truths: { vda: truth } });
  });

  it('ends a run within two seconds while every read takes long', async () => {
    await using server = await startNbdkit({
      socketPath: rig.lab.file('delayed.sock'),
      plugin: ['file', truth],
      filters: ['delay'],
      parameters: ['delay-read=20'],
      isReadOnly: true,
    });
    const setup = await setUpWith('delayed', server.uri);
    const run = await startBackup(rig.daemon, setup);
    await waitUntilCopying(rig.daemon, run.id, () => true);
    await cancel(setup, run, 2000);
  });

  it('of a restore leaves no file', async () => {
    await using server = await serve('restore');
    const setup = await setUpWith('restore', server.uri);
    const { pointId } = await backUp(rig.daemon, setup);
    // A slow NBD target holds the restore; the file of the other disk would be there, if it were left.
    const target = rig.lab.file('target.raw');
    await makeRaw({ path: target, sizeBytes: DISK_BYTES });
    await using slow = await startNbdkit({
      socketPath: rig.lab.file('slow.sock'),
      plugin: ['file', target],
      filters: ['delay'],
      parameters: ['delay-write=20'],
    });
    const run = await rig.daemon.expect<RunView>(202, 'POST', '/restore/images', {
      pointId,
      disks: [{ diskId: setup.vm.disks[0]?.id, target: { kind: 'nbd', uri: slow.uri } }],
    });
    await waitUntilRunning(rig.daemon, run.id);
    await cancel(setup, run, 2000);

    // Into files: cancelled at whatever moment, either complete or not there.
    for (const format of ['raw', 'qcow2']) {
      const path = rig.lab.file(`cancelled.${format}`);
      const toFile = await rig.daemon.expect<RunView>(202, 'POST', '/restore/images', {
        pointId,
        disks: [{ diskId: setup.vm.disks[0]?.id, target: { kind: 'file', path, format } }],
      });
      await rig.daemon.request('POST', `/runs/${toFile.id}/cancel`);
      const { state } = await rig.daemon.waitForRun(toFile.id);
      const names = (await readdir(rig.lab.path)).filter((name) => name.includes(`cancelled.${format}`));
      expect([state, names]).toEqual(
        state === 'completed' ? ['completed', [`cancelled.${format}`]] : ['cancelled', []],
      );
    }
    await expectGoodBackup(rig, setup, { truths: { vda: truth } });
  });
});
