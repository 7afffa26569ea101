import { rm } from 'node:fs/promises';
import { afterAll, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import type { RunView } from '../../src/engine/types.js';
import { newUlid } from '../../src/lib/id.js';
import { MIB } from '../../src/lib/units.js';
import { makeLabDirectory, type LabDirectory } from '../lab/directory.js';
import { makeRaw } from '../lab/disk-image.js';
import { startRedis, type LabRedis } from '../lab/redis.js';
import { setUp, startBackup, type Settings, type Setup } from './daemon.js';
import { logOf, restart } from './crash.js';
import {
  expectGoodBackup,
  expectNothingLeft,
  expectReadsBack,
  imageDisk,
  listPoints,
  startRig,
  stopRig,
  waitUntilCopying,
  type Rig,
} from './rig.js';

const DISK_BYTES = 24 * MIB;
const FEW_SECONDS = 6 * MIB;

describe('a given Redis', { timeout: 60_000 }, () => {
  let lab: LabDirectory;
  let redis: LabRedis;
  let rig: Rig;
  let settings: Settings;
  let setup: Setup;
  let disk: string;
  let truths: Record<string, string>;

  beforeAll(async () => {
    lab = await makeLabDirectory();
    redis = await startRedis({ dir: lab.file('redis') });
    settings = { redis: { kind: 'given', socketPath: redis.socketPath, commandTimeoutMs: 1000 } };
    rig = await startRig(settings);
    disk = rig.lab.file('disk.raw');
    truths = { vda: disk };
    await makeRaw({ path: disk, sizeBytes: DISK_BYTES, regions: [{ offset: 0, length: DISK_BYTES }] });
  });
  afterAll(async () => {
    await stopRig(rig);
    await redis[Symbol.asyncDispose]();
    await lab[Symbol.asyncDispose]();
  });
  beforeEach(async () => {
    const name = `vm-${newUlid()}`;
    setup = await setUp(rig.daemon, {
      root: rig.lab.file(name),
      vmName: name,
      disks: [{ name: 'vda', source: imageDisk(disk) }],
    });
  });

  async function expectEachOnce(runs: RunView[]): Promise<void> {
    for (const run of runs) {
      const ended = await rig.daemon.waitForRun(run.id);
      expect([ended.state, ended.attempt], JSON.stringify(ended.error)).toEqual(['completed', 1]);
      const log = await logOf(rig, run);
      expect(log.filter(({ code }) => code === 'RUN_STARTED')).toHaveLength(1);
      await expectReadsBack(rig, run.pointId, truths);
    }
    expect((await listPoints(rig.daemon, setup)).sort()).toEqual(runs.map(({ pointId }) => pointId).sort());
    await expectNothingLeft(rig, setup.repository.root);
  }

  it('stopped and started again: the running run completes, one asked for meanwhile waits in the database', async () => {
    const run = await startBackup(rig.daemon, setup, { bytesPerSecond: FEW_SECONDS });
    await waitUntilCopying(rig.daemon, run.id);
    await redis.stop();
    const waiting = await startBackup(rig.daemon, setup, { whenBusy: 'queue' });
    expect(waiting.state).toBe('queued');
    expect((await rig.daemon.waitForRun(run.id)).state).toBe('completed');
    expect((await rig.daemon.expect<RunView>(200, 'GET', `/runs/${waiting.id}`)).state).toBe('queued');
    await redis.start();
    await expectEachOnce([run, waiting]);
    await expectGoodBackup(rig, setup, { truths });
  });

  it('killed with its data lost: no run is lost, none runs twice', async () => {
    const run = await startBackup(rig.daemon, setup, { bytesPerSecond: FEW_SECONDS });
    const waiting = await startBackup(rig.daemon, setup, { whenBusy: 'queue' });
    await waitUntilCopying(rig.daemon, run.id);
    await redis.kill();
    await rm(lab.file('redis', 'appendonlydir'), { recursive: true });
    await redis.start();
    await expectEachOnce([run, waiting]);
    await expectGoodBackup(rig, setup, { truths });
  });

  it('away does not keep the daemon from ending', async () => {
    const run = await startBackup(rig.daemon, setup, { bytesPerSecond: FEW_SECONDS });
    await waitUntilCopying(rig.daemon, run.id);
    await redis.stop();
    const startMs = performance.now();
    await rig.daemon.stop();
    expect(performance.now() - startMs).toBeLessThan(15_000);
    await redis.start();
    await restart(rig, settings);
    expect((await rig.daemon.waitForRun(run.id)).state).toBe('interrupted');
    await expectNothingLeft(rig, setup.repository.root);
    await expectGoodBackup(rig, setup, { truths });
  });
});
