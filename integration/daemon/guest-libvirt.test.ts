import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { LabGuest } from '../lab/guest.js';
import { backUp, type Setup } from './daemon.js';
import {
  backUpWriter,
  expectFrozen,
  expectOneInstant,
  expectWritesOn,
  pointOf,
  restoreAndBoot,
  startWriter,
  type GuestPoint,
} from './guest-rig.js';
import {
  discoverOne,
  expectCleanSource,
  recordOf,
  startLiveRig,
  stopLiveRig,
  type LiveRig,
} from './live-rig.js';
import { expectFailure, methodsOf } from './rig.js';
import type { RepositoryView } from '../../src/engine/types.js';

const NAME = 'writer';

describe('a guest that writes to two disks under libvirt', () => {
  let rig: LiveRig;
  let guest: LabGuest;
  let setup: Setup;

  beforeAll(async () => {
    rig = await startLiveRig({ snapshot: { agentTimeoutMs: 2000 } });
    guest = await startWriter(rig, NAME);
    const repository = await rig.daemon.expect<RepositoryView>(201, 'POST', '/repositories', {
      name: 'guests',
      root: rig.lab.file('repository'),
    });
    setup = { repository, vm: await discoverOne(rig.daemon, rig.libvirt.uri, NAME) };
  }, 240_000);

  afterAll(() => stopLiveRig(rig));

  it('is restored from each point as it was at one instant, and never notices', async () => {
    const back = (consistency: 'require' | 'prefer' | 'never'): Promise<GuestPoint> =>
      backUpWriter(rig.daemon, setup, { console: guest.console, consistency });
    const points = [await back('require'), await back('prefer'), await back('never')];
    expect(points[0]?.isWrittenMeanwhile).toBe(true);
    expect(points.map(({ run }) => methodsOf(run))).toEqual([
      ['full FIRST_POINT', 'full FIRST_POINT'],
      ['bitmap BITMAP', 'bitmap BITMAP'],
      ['bitmap BITMAP', 'bitmap BITMAP'],
    ]);
    const found = await Promise.all(points.map(({ run }) => pointOf(rig.daemon, run)));
    expect(found.map(({ point }) => point.consistency)).toEqual(['application', 'application', 'crash']);
    const warnings = found.flatMap(({ log }) => log.filter(({ level }) => level === 'warning'));
    expect(warnings).toEqual([]);
    await expectCleanSource(rig, NAME, [recordOf(points[2]!.run)]);

    let last = 0;
    for (const [index, point] of points.entries()) {
      const verdict = await restoreAndBoot(rig, point.run, `restored-${index}`);
      expectOneInstant(verdict, point);
      if (found[index]!.point.consistency === 'application') expectFrozen(verdict);
      expect(verdict.vdb.lastRecord).toBeGreaterThan(last);
      last = verdict.vda.lastRecord;
    }
    await expectWritesOn(guest.console);
  }, 240_000);

  it('whose agent does not answer is backed up as after a power cut, unless a freeze is required', async () => {
    await guest.agent('guest-exec', { path: '/bin/sh', arg: ['-c', 'sleep 1; kill $(pidof qemu-ga)'] });
    const askAgent = (): Promise<string> => rig.libvirt.virsh('domtime', NAME).then(() => 'there', String);
    await expect.poll(askAgent, { timeout: 30_000, interval: 500 }).toMatch(/agent/);
    const failed = await expectFailure(rig, setup, { consistency: 'require', code: 'FREEZE_FAILED' });
    expect(failed.error?.message).toContain('not frozen');
    await expectWritesOn(guest.console);

    const run = await backUp(rig.daemon, setup, { consistency: 'prefer' });
    const { point, log } = await pointOf(rig.daemon, run);
    expect(point.consistency).toBe('crash');
    expect(log).toContainEqual(expect.objectContaining({ level: 'warning', code: 'FREEZE_UNAVAILABLE' }));
    await expectCleanSource(rig, NAME, [recordOf(run)]);
    await expectWritesOn(guest.console);
  }, 120_000);
});
