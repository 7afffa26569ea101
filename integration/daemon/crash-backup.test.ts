import { afterAll, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import type { RunStage } from '../../src/engine/types.js';
import { pause, pollUntil } from '../../src/lib/deadline.js';
import { newUlid } from '../../src/lib/id.js';
import { MIB } from '../../src/lib/units.js';
import type { DiskSource } from '../../src/source/source.js';
import { makeRaw, writeRegions } from '../lab/disk-image.js';
import { findLeftovers } from '../lab/leftovers.js';
import { startNbdkit, type LabNbdServer } from '../lab/nbd-server.js';
import { backUp, setUp, startBackup, type Setup } from './daemon.js';
import { attemptStart, expectSettled, killDaemon, restart, waitForStage } from './crash.js';
import {
  expectGoodBackup,
  imageDisk,
  listPoints,
  nbdDisk,
  startRig,
  stopRig,
  waitUntilCopying,
  type Rig,
} from './rig.js';

const DISK_BYTES = 24 * MIB;
/** Holds a transfer of the disk for seconds. */
const SLOW = 2 * MIB;

describe('kill -9 of the daemon during a backup', { timeout: 60_000 }, () => {
  let rig: Rig;
  let disk: string;
  let truths: Record<string, string>;

  beforeAll(async () => {
    rig = await startRig();
  });
  afterAll(() => stopRig(rig));

  let name = '';
  beforeEach(async () => {
    name = `vm-${newUlid()}`;
    disk = rig.lab.file(`${name}.raw`);
    truths = { vda: disk };
    await makeRaw({
      path: disk,
      sizeBytes: DISK_BYTES,
      regions: [{ offset: MIB, length: DISK_BYTES - 2 * MIB }],
    });
  });

  const setUpOn = (source: DiskSource): Promise<Setup> =>
    setUp(rig.daemon, {
      root: rig.lab.file(`repository-${name}`),
      vmName: name,
      disks: [{ name: 'vda', source }],
    });

  /** Each connection takes a while, so that discover and snapshot can be met. */
  const startSlowToOpen = (): Promise<LabNbdServer> =>
    startNbdkit({
      socketPath: rig.lab.file(`${name}.sock`),
      plugin: ['file', disk],
      filters: ['delay'],
      parameters: ['delay-open=500ms'],
      isReadOnly: true,
    });

  it.each<RunStage>(['discover', 'snapshot'])('in %s', async (stage) => {
    await using source = await startSlowToOpen();
    const setup = await setUpOn(nbdDisk(source.uri));
    const run = await startBackup(rig.daemon, setup);
    await waitForStage(rig, run.id, stage);
    await killDaemon(rig);
    await restart(rig);
    expect((await expectSettled(rig, setup, { run, truths })).state).toBe('interrupted');
    await expectGoodBackup(rig, setup, { truths });
  });

  it('in transfer, of a first point and of one on another', async () => {
    const setup = await setUpOn(imageDisk(disk));
    for (const method of ['full', 'compare']) {
      await writeRegions(disk, [{ offset: MIB, length: 8 * MIB, seed: method.length }]);
      const run = await startBackup(rig.daemon, setup, { bytesPerSecond: SLOW });
      await waitUntilCopying(rig.daemon, run.id);
      await killDaemon(rig);
      await restart(rig);
      expect((await expectSettled(rig, setup, { run, truths })).state).toBe('interrupted');
      const good = await expectGoodBackup(rig, setup, { truths });
      expect(good.progress.disks[0]?.method).toBe(method);
    }
  });

  it('while another waits for its turn: that one runs after the restart', async () => {
    const setup = await setUpOn(imageDisk(disk));
    const run = await startBackup(rig.daemon, setup, { bytesPerSecond: SLOW });
    const waiting = await startBackup(rig.daemon, setup, { whenBusy: 'queue' });
    await waitUntilCopying(rig.daemon, run.id);
    await killDaemon(rig);
    await restart(rig);
    expect((await expectSettled(rig, setup, { run, truths })).state).toBe('interrupted');
    const ended = await expectSettled(rig, setup, { run: waiting, truths });
    expect([ended.state, ended.attempt]).toEqual(['completed', 1]);
  });

  it('at any moment of finalize: interrupted without a trace, or completed with the point', async () => {
    const setup = await setUpOn(imageDisk(disk));
    await backUp(rig.daemon, setup);
    for (const [round, delayMs] of [0, 20, 60].entries()) {
      await writeRegions(disk, [{ offset: MIB, length: 4 * MIB, seed: 100 + round }]);
      const run = await startBackup(rig.daemon, setup);
      await pollUntil(
        async () => {
          const { stage, state } = await rig.daemon.expect<typeof run>(200, 'GET', `/runs/${run.id}`);
          return stage === 'finalize' || state === 'completed' ? true : undefined;
        },
        { timeoutMs: 15_000, intervalMs: 1, what: 'finalize' },
      );
      await pause(delayMs);
      await killDaemon(rig);
      await restart(rig);
      await expectSettled(rig, setup, { run, truths });
    }
    await expectGoodBackup(rig, setup, { truths });
  }, 90_000);

  it('and of the start that follows, at any moment of it', async () => {
    const setup = await setUpOn(imageDisk(disk));
    const run = await startBackup(rig.daemon, setup, { bytesPerSecond: SLOW });
    await waitUntilCopying(rig.daemon, run.id);
    await killDaemon(rig);
    for (const delayMs of [300, 600, 900]) {
      const attempt = attemptStart(rig);
      await pause(delayMs);
      attempt.child.kill('SIGKILL');
      await attempt.ended();
    }
    await restart(rig);
    await expectSettled(rig, setup, { run, truths });
    await expectGoodBackup(rig, setup, { truths });
    expect(await listPoints(rig.daemon, setup)).toHaveLength(1);
  });
});

describe('the daemon stopped by SIGTERM', { timeout: 60_000 }, () => {
  it('during a backup ends it as interrupted at once, and cleans up before it goes', async () => {
    const rig = await startRig();
    const disk = rig.lab.file('disk.raw');
    await makeRaw({ path: disk, sizeBytes: DISK_BYTES, regions: [{ offset: 0, length: DISK_BYTES }] });
    const setup = await setUp(rig.daemon, {
      root: rig.lab.file('repository'),
      disks: [{ name: 'vda', source: imageDisk(disk) }],
    });
    const run = await startBackup(rig.daemon, setup, { bytesPerSecond: SLOW });
    await waitUntilCopying(rig.daemon, run.id);
    const startMs = performance.now();
    await stopDaemonCleanly(rig);
    expect(performance.now() - startMs).toBeLessThan(8000);
    await restart(rig);
    await stopDaemonCleanly(rig);
    await restart(rig);
    const ended = await expectSettled(rig, setup, { run, truths: { vda: disk } });
    expect([ended.state, ended.error?.message]).toEqual(['interrupted', 'the daemon is stopping']);
    await expectGoodBackup(rig, setup, { truths: { vda: disk } });
    await stopRig(rig);
  });

  async function stopDaemonCleanly(rig: Rig): Promise<void> {
    await rig.daemon.stop();
    expect(await findLeftovers(rig.lab.file('daemon'))).toEqual([]);
    expect(await findLeftovers(rig.lab.file('repository'))).toEqual([]);
  }
});
