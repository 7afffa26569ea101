import { readdir } from 'node:fs/promises';
import { afterAll, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import type { RunView } from '../../src/engine/types.js';
import { pollUntil } from '../../src/lib/deadline.js';
import { newUlid } from '../../src/lib/id.js';
import { MIB } from '../../src/lib/units.js';
import { makeLabDirectory, type LabDirectory } from '../lab/directory.js';
import { makeRaw, writeRegions } from '../lab/disk-image.js';
import { startMariadb, type LabMariadb } from '../lab/mariadb.js';
import { setUp, startBackup, type Settings, type Setup } from './daemon.js';
import { killDaemon, restart } from './crash.js';
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

const DISK_BYTES = 16 * MIB;
const FEW_SECONDS = 6 * MIB;

describe('MariaDB as the database of the daemon', { timeout: 60_000 }, () => {
  let lab: LabDirectory;
  let mariadb: LabMariadb;
  let rig: Rig;
  let settings: Settings;
  let setup: Setup;
  let disk: string;
  let truths: Record<string, string>;

  beforeAll(async () => {
    lab = await makeLabDirectory();
    mariadb = await startMariadb({ dir: lab.file('mariadb') });
    const { url, socketPath } = await mariadb.createDatabase();
    settings = {
      database: { kind: 'mysql', url, socketPath },
      runs: { heartbeatMs: 300, abandonedAfterMs: 1000 },
    };
    rig = await startRig(settings);
  });
  afterAll(async () => {
    await stopRig(rig);
    await mariadb[Symbol.asyncDispose]();
    await lab[Symbol.asyncDispose]();
  });
  beforeEach(async () => {
    const name = `vm-${newUlid()}`;
    disk = rig.lab.file(`${name}.raw`);
    truths = { vda: disk };
    await makeRaw({ path: disk, sizeBytes: DISK_BYTES, regions: [{ offset: 0, length: DISK_BYTES }] });
    setup = await setUp(rig.daemon, {
      root: rig.lab.file(name),
      vmName: name,
      disks: [{ name: 'vda', source: imageDisk(disk) }],
    });
  });

  async function expectUnavailable(): Promise<void> {
    const answer = await rig.daemon.request('GET', '/vms');
    expect([answer.status, answer.body]).toEqual([
      503,
      expect.objectContaining({ code: 'DATABASE_UNAVAILABLE' }),
    ]);
  }

  it('keeps a full, an incremental, and what is restored from both', async () => {
    await expectGoodBackup(rig, setup, { truths });
    await writeRegions(disk, [{ offset: MIB, length: MIB, seed: 5 }]);
    const second = await expectGoodBackup(rig, setup, { truths });
    expect(second.progress.disks[0]?.method).toBe('compare');
    expect(await listPoints(rig.daemon, setup)).toHaveLength(2);
  });

  it('stopped and started again in transfer: the API says so meanwhile, the run completes', async () => {
    const run = await startBackup(rig.daemon, setup, { bytesPerSecond: FEW_SECONDS });
    await waitUntilCopying(rig.daemon, run.id);
    await mariadb.stop();
    await expectUnavailable();
    await mariadb.start();
    const ended = await rig.daemon.waitForRun(run.id);
    expect([ended.state, ended.attempt], JSON.stringify(ended.error)).toEqual(['completed', 1]);
    expect(await listPoints(rig.daemon, setup)).toEqual([run.pointId]);
    await expectReadsBack(rig, run.pointId, truths);
    await expectGoodBackup(rig, setup, { truths });
  });

  it('away while the point is committed, longer than a run is taken for dead: the run completes', async () => {
    const run = await startBackup(rig.daemon, setup, { bytesPerSecond: FEW_SECONDS });
    await waitUntilCopying(rig.daemon, run.id);
    await mariadb.stop();
    await waitForManifest(run);
    await expectUnavailable();
    await mariadb.start();
    const ended = await rig.daemon.waitForRun(run.id);
    expect([ended.state, ended.attempt], JSON.stringify(ended.error)).toEqual(['completed', 1]);
    expect(await listPoints(rig.daemon, setup)).toEqual([run.pointId]);
    await expectNothingLeft(rig, setup.repository.root);
    await expectReadsBack(rig, run.pointId, truths);
  });

  it('away while the point is committed, and the daemon killed then: recovery completes the run', async () => {
    const run = await startBackup(rig.daemon, setup, { bytesPerSecond: FEW_SECONDS });
    await waitUntilCopying(rig.daemon, run.id);
    await mariadb.kill();
    await waitForManifest(run);
    await killDaemon(rig);
    await mariadb.start();
    await restart(rig, settings);
    const ended = await rig.daemon.waitForRun(run.id);
    expect([ended.state, ended.result]).toEqual(['completed', { kind: 'backup', pointId: run.pointId }]);
    expect(await listPoints(rig.daemon, setup)).toEqual([run.pointId]);
    await expectNothingLeft(rig, setup.repository.root);
    await expectReadsBack(rig, run.pointId, truths);
    await expectGoodBackup(rig, setup, { truths });
  });

  it('away does not keep the daemon from ending; the run is ended by the next start', async () => {
    const run = await startBackup(rig.daemon, setup, { bytesPerSecond: FEW_SECONDS });
    await waitUntilCopying(rig.daemon, run.id);
    await mariadb.stop();
    const startMs = performance.now();
    await rig.daemon.stop();
    expect(performance.now() - startMs).toBeLessThan(15_000);
    await mariadb.start();
    await restart(rig, settings);
    const ended = await rig.daemon.waitForRun(run.id);
    expect([ended.state, ended.error?.code]).toEqual(['interrupted', 'INTERRUPTED']);
    await expectNothingLeft(rig, setup.repository.root);
    await expectGoodBackup(rig, setup, { truths });
  });

  async function waitForManifest(run: RunView): Promise<void> {
    const wanted = `${run.pointId ?? ''}.json`;
    await pollUntil(
      async () => {
        const names = await readdir(setup.repository.root, { recursive: true });
        return names.some((name) => name.endsWith(`/points/${wanted}`)) ? true : undefined;
      },
      { timeoutMs: 20_000, intervalMs: 20, what: 'the manifest' },
    );
  }
});
