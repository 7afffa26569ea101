import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { RunView } from '../../src/engine/types.js';
import { pollUntil } from '../../src/lib/deadline.js';
import type { ErrorCode } from '../../src/lib/errors.js';
import { newUlid } from '../../src/lib/id.js';
import { MIB } from '../../src/lib/units.js';
import type { DiskSource } from '../../src/source/source.js';
import { makeRaw } from '../lab/disk-image.js';
import { startQemuNbd } from '../lab/nbd-server.js';
import { findChildren, logOf, waitForChild } from './crash.js';
import { setUp, startBackup, startDaemon, type Setup } from './daemon.js';
import {
  expectGoodBackup,
  expectNothingLeft,
  expectReadsBack,
  imageDisk,
  listPoints,
  nbdDisk,
  startRig,
  stopRig,
  waitUntilCopying,
  type Rig,
} from './rig.js';

const DISK_BYTES = 24 * MIB;
const SLOW = 2 * MIB;
/** What the death of either server may be called; all of them may pass, so that the run is tried again. */
const SERVER_DIED: ErrorCode[] = ['NBD_PROTOCOL', 'NBD_CONNECT', 'NBD_STALLED', 'NBD_REQUEST'];

describe('kill -9 of a server of a run', { timeout: 60_000 }, () => {
  let rig: Rig;
  let disk: string;
  let truths: Record<string, string>;

  beforeAll(async () => {
    rig = await startRig();
    disk = rig.lab.file('disk.raw');
    truths = { vda: disk };
    await makeRaw({
      path: disk,
      sizeBytes: DISK_BYTES,
      regions: [{ offset: MIB, length: DISK_BYTES - 2 * MIB }],
    });
  });
  afterAll(() => stopRig(rig));

  const setUpOn = (source: DiskSource): Promise<Setup> => {
    const name = `vm-${newUlid()}`;
    return setUp(rig.daemon, {
      root: rig.lab.file(name),
      vmName: name,
      disks: [{ name: 'vda', source }],
    });
  };

  async function expectDied(setup: Setup, run: RunView): Promise<void> {
    const ended = await rig.daemon.waitForRun(run.id);
    expect(ended.state, JSON.stringify(ended.error)).toBe('failed');
    expect(SERVER_DIED).toContain(ended.error?.code);
    await expectNothingLeft(rig, setup.repository.root);
    expect(await listPoints(rig.daemon, setup)).not.toContain(run.pointId);
    await expectGoodBackup(rig, setup, { truths });
  }

  it('the private source of an image, in transfer', async () => {
    const setup = await setUpOn(imageDisk(disk));
    const run = await startBackup(rig.daemon, setup, { bytesPerSecond: SLOW });
    await waitUntilCopying(rig.daemon, run.id);
    process.kill(await waitForChild(rig, 'qemu-nbd', disk), 'SIGKILL');
    await expectDied(setup, run);
  });

  it('the external server, in transfer; the backup after it came back is right', async () => {
    const options = {
      image: disk,
      format: 'raw' as const,
      socketPath: rig.lab.file('source.sock'),
      isReadOnly: true,
    };
    const server = await startQemuNbd(options);
    const setup = await setUpOn(nbdDisk(server.uri));
    const run = await startBackup(rig.daemon, setup, { bytesPerSecond: SLOW });
    await waitUntilCopying(rig.daemon, run.id);
    await server.kill();
    await using again = await startQemuNbd(options);
    expect(again.uri).toBe(server.uri);
    await expectDied(setup, run);
  });

  it('Redis of the daemon itself: it comes back and runs go on', async () => {
    const setup = await setUpOn(imageDisk(disk));
    const run = await startBackup(rig.daemon, setup, { bytesPerSecond: 8 * MIB });
    await waitUntilCopying(rig.daemon, run.id);
    const redis = await waitForChild(rig, 'redis-server');
    process.kill(redis, 'SIGKILL');
    const next = await startBackup(rig.daemon, setup, { whenBusy: 'queue' });
    expect((await rig.daemon.waitForRun(run.id)).state).toBe('completed');
    expect((await rig.daemon.waitForRun(next.id)).state).toBe('completed');
    expect(await findChildren(rig, 'redis-server')).not.toContain(redis);
    await expectReadsBack(rig, run.pointId, truths);
    await expectGoodBackup(rig, setup, { truths });
  });
});

describe('a run that fails for a passing reason', { timeout: 60_000 }, () => {
  it('is tried again after a back-off, and succeeds once the source is back', async () => {
    const rig = await startRig();
    await rig.daemon.stop();
    rig.daemon = await startDaemon({
      directory: rig.lab.file('daemon'),
      settings: { runs: { attempts: 4, backoffMs: 1000 } },
    });
    const disk = rig.lab.file('disk.raw');
    await makeRaw({ path: disk, sizeBytes: 4 * MIB, regions: [{ offset: 0, length: 4 * MIB }] });
    const options = {
      image: disk,
      format: 'raw' as const,
      socketPath: rig.lab.file('source.sock'),
      isReadOnly: true,
    };
    const server = await startQemuNbd(options);
    const setup = await setUp(rig.daemon, {
      root: rig.lab.file('repository'),
      disks: [{ name: 'vda', source: nbdDisk(server.uri) }],
    });
    await server.stop();
    const run = await startBackup(rig.daemon, setup);
    const waiting = await pollUntil(
      async () => {
        const seen = await rig.daemon.expect<RunView>(200, 'GET', `/runs/${run.id}`);
        return seen.attempt === 2 ? seen : undefined;
      },
      { timeoutMs: 15_000, what: 'the second attempt' },
    );
    expect(waiting.endedAt).toBeNull();
    await using again = await startQemuNbd(options);
    expect(again.uri).toBe(server.uri);
    const ended = await rig.daemon.waitForRun(run.id);
    expect([ended.state, ended.pointId], JSON.stringify(ended)).toEqual(['completed', run.pointId]);
    expect(ended.attempt).toBeGreaterThanOrEqual(2);
    await expectNothingLeft(rig, setup.repository.root);
    await expectReadsBack(rig, ended.pointId, { vda: disk });
    const log = await logOf(rig, run);
    expect(log.filter(({ code }) => code === 'RUN_STARTED')).toHaveLength(ended.attempt);
    expect(log).toContainEqual(
      expect.objectContaining({
        level: 'warning',
        message: expect.stringContaining('trying again in 1 s') as string,
      }),
    );

    const permanent = await startBackup(rig.daemon, setup, {
      type: 'incremental',
      bitmaps: [{ diskId: setup.vm.disks[0]?.id ?? '', name: 'no-such', sincePointId: ended.pointId ?? '' }],
    });
    const refused = await rig.daemon.waitForRun(permanent.id);
    expect([refused.state, refused.attempt, refused.error?.code]).toEqual(['failed', 1, 'BITMAP_MISSING']);
    await stopRig(rig);
  });
});

/** Between looking and killing it may have ended by itself. */
