import { mkdir, writeFile } from 'node:fs/promises';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { MIB } from '../../src/lib/units.js';
import { makeLabDirectory, type LabDirectory } from '../lab/directory.js';
import { makeRaw } from '../lab/disk-image.js';
import { findLeftovers } from '../lab/leftovers.js';
import { startMariadb, type LabMariadb } from '../lab/mariadb.js';
import { startRedis, type LabRedis } from '../lab/redis.js';
import { attemptStart, killDaemon, waitUntilReady, type Attempt } from './crash.js';
import { setUp, startBackup, startDaemon, type Settings } from './daemon.js';
import {
  expectGoodBackup,
  expectNothingLeft,
  imageDisk,
  listPoints,
  startRig,
  stopRig,
  waitUntilCopying,
  type Rig,
} from './rig.js';

const DISK_BYTES = 16 * MIB;
const SLOW = 4 * MIB;

async function makeDisk(rig: Rig): Promise<string> {
  const disk = rig.lab.file('disk.raw');
  await makeRaw({ path: disk, sizeBytes: DISK_BYTES, regions: [{ offset: 0, length: DISK_BYTES }] });
  return disk;
}

describe('a second daemon on one state directory', { timeout: 60_000 }, () => {
  it('is refused and does no harm to the first one and its run', async () => {
    const rig = await startRig();
    const disk = await makeDisk(rig);
    const setup = await setUp(rig.daemon, {
      root: rig.lab.file('repository'),
      disks: [{ name: 'vda', source: imageDisk(disk) }],
    });
    const run = await startBackup(rig.daemon, setup, { bytesPerSecond: SLOW });
    await waitUntilCopying(rig.daemon, run.id);
    const second = attemptStart(rig);
    expect(await second.ended()).toBe(1);
    expect(second.output()).toContain(`CONFLICT: another holdfastd (pid ${rig.daemon.pid})`);
    expect((await rig.daemon.waitForRun(run.id)).state).toBe('completed');
    await expectGoodBackup(rig, setup, { truths: { vda: disk } });
    await stopRig(rig);
  });

  it('is refused too when both start at once over one that died', async () => {
    const rig = await startRig();
    await killDaemon(rig);
    const attempts = [attemptStart(rig), attemptStart(rig), attemptStart(rig)];
    await Promise.race(attempts.map(waitUntilReady));
    const losers = attempts.filter(({ output }) => !output().includes('holdfastd is ready'));
    expect(losers).toHaveLength(2);
    for (const loser of losers) {
      expect(await loser.ended()).toBe(1);
      expect(loser.output()).toContain('CONFLICT: another holdfastd');
    }
    for (const attempt of attempts) await attempt[Symbol.asyncDispose]();
    expect(await findLeftovers(rig.lab.file('daemon'))).toEqual([]);
    await rig.lab[Symbol.asyncDispose]();
  });
});

describe('daemons that share MariaDB and Redis', { timeout: 60_000 }, () => {
  let lab: LabDirectory;
  let mariadb: LabMariadb;
  let redis: LabRedis;
  let shared: Settings;
  let rig: Rig;

  beforeAll(async () => {
    lab = await makeLabDirectory();
    mariadb = await startMariadb({ dir: lab.file('mariadb') });
    redis = await startRedis({ dir: lab.file('redis') });
    const { url, socketPath } = await mariadb.createDatabase();
    shared = {
      database: { kind: 'mysql', url, socketPath },
      redis: { kind: 'given', socketPath: redis.socketPath },
      runs: { attempts: 1, heartbeatMs: 300, abandonedAfterMs: 2000, progressIntervalMs: 300 },
    };
    rig = { lab, daemon: await startDaemon({ directory: lab.file('daemon'), settings: withoutWorkers() }) };
  });
  afterAll(async () => {
    await rig.daemon.stop();
    expect(await findLeftovers(lab.file('daemon'))).toEqual([]);
    await redis[Symbol.asyncDispose]();
    await mariadb[Symbol.asyncDispose]();
    await lab[Symbol.asyncDispose]();
  });

  const withoutWorkers = (): Settings => ({ ...shared, roles: ['api', 'scheduler'] });

  async function startWorker(name: string): Promise<Attempt> {
    const file = lab.file(`${name}.yaml`);
    await mkdir(lab.file(name), { recursive: true });
    const places = { stateDirectory: lab.file(name, 'state'), runtimeDirectory: lab.file(name, 'run') };
    await writeFile(file, JSON.stringify({ ...shared, ...places, roles: ['worker'] }));
    const worker = attemptStart(rig, file);
    await waitUntilReady(worker);
    return worker;
  }

  it('are one appliance; the run of a worker that died is ended by the others, and the next one works', async () => {
    const disk = await makeDisk(rig);
    const setup = await setUp(rig.daemon, {
      root: lab.file('repository'),
      disks: [{ name: 'vda', source: imageDisk(disk) }],
    });
    const dying = await startWorker('worker-a');
    const run = await startBackup(rig.daemon, setup, { bytesPerSecond: SLOW });
    await waitUntilCopying(rig.daemon, run.id);
    dying.child.kill('SIGKILL');
    await dying.ended();
    await using other = await startWorker('worker-b');
    const ended = await rig.daemon.waitForRun(run.id, { timeoutMs: 15_000 });
    expect([ended.state, ended.error?.code]).toEqual(['interrupted', 'INTERRUPTED']);
    expect(await listPoints(rig.daemon, setup)).toEqual([]);
    await expectNothingLeft(rig, setup.repository.root);
    await expectGoodBackup(rig, setup, { truths: { vda: disk } });
    expect(other.child.exitCode).toBeNull();

    const again = await startWorker('worker-a');
    await again[Symbol.asyncDispose]();
    expect(await findLeftovers(lab.file('worker-a'))).toEqual([]);
  });
});
