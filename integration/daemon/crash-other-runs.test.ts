import { mkdir, rm, stat } from 'node:fs/promises';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { RunView } from '../../src/engine/types.js';
import { pause } from '../../src/lib/deadline.js';
import { errnoOf } from '../../src/lib/errors.js';
import { MIB } from '../../src/lib/units.js';
import { makeRaw, writeRegions } from '../lab/disk-image.js';
import { findLeftovers } from '../lab/leftovers.js';
import { backUp, setUp, type Setup } from './daemon.js';
import { killDaemon, restart, waitForChild, waitForStage } from './crash.js';
import {
  expectGoodBackup,
  expectNothingLeft,
  expectReadsBack,
  imageDisk,
  listPoints,
  startRig,
  stopRig,
  type Rig,
} from './rig.js';

const DISK_BYTES = 32 * MIB;

describe('kill -9 of the daemon', { timeout: 60_000 }, () => {
  let rig: Rig;
  let disk: string;
  let setup: Setup;
  let truths: Record<string, string>;

  beforeAll(async () => {
    rig = await startRig();
    disk = rig.lab.file('disk.raw');
    truths = { vda: disk };
    await makeRaw({ path: disk, sizeBytes: DISK_BYTES, regions: [{ offset: 0, length: DISK_BYTES }] });
    setup = await setUp(rig.daemon, {
      root: rig.lab.file('repository'),
      disks: [{ name: 'vda', source: imageDisk(disk) }],
    });
    await backUp(rig.daemon, setup);
  });
  afterAll(() => stopRig(rig));

  const restoreTo = (
    path: string,
    { pointId, diskId }: { pointId: string | null; diskId: string | undefined },
  ): Promise<RunView> =>
    rig.daemon.expect<RunView>(202, 'POST', '/restore/images', {
      pointId,
      disks: [{ diskId, target: { kind: 'file', path, format: 'qcow2' } }],
    });

  it('during a restore leaves no file, and the same restore works after', async () => {
    const target = rig.lab.file('restored', 'disk.qcow2');
    await mkdir(rig.lab.file('restored'));
    // Large enough to be met on its way.
    const large = rig.lab.file('large.raw');
    await makeRaw({ path: large, sizeBytes: 128 * MIB, regions: [{ offset: 0, length: 128 * MIB }] });
    const other = await setUp(rig.daemon, {
      root: rig.lab.file('repository-large'),
      vmName: 'large',
      disks: [{ name: 'vda', source: imageDisk(large) }],
    });
    const point = { pointId: (await backUp(rig.daemon, other)).pointId, diskId: other.vm.disks[0]?.id };
    const run = await restoreTo(target, point);
    const writer = await waitForChild(rig, 'qemu-nbd', rig.lab.file('restored'));
    process.kill(writer, 'SIGSTOP');
    await waitForStage(rig, run.id, 'transfer');
    await killDaemon(rig);
    await restart(rig);
    const ended = await rig.daemon.waitForRun(run.id);
    expect([ended.state, ended.error?.code]).toEqual(['interrupted', 'INTERRUPTED']);
    expect(await findLeftovers(rig.lab.file('restored'))).toEqual([]);
    expect(await exists(target)).toBe(false);
    await expectReadsBack(rig, point.pointId, { vda: large });
    const again = await rig.daemon.waitForRun((await restoreTo(target, point)).id);
    expect(again.state).toBe('completed');
    await rm(target);
  });

  it('during a check ends it as interrupted, and the repository checks clean after', async () => {
    const run = await rig.daemon.expect<RunView>(202, 'POST', `/repositories/${setup.repository.id}/check`, {
      content: true,
    });
    await killDaemon(rig);
    await restart(rig);
    expect(['interrupted', 'completed']).toContain((await rig.daemon.waitForRun(run.id)).state);
    await expectClean();
  });

  it('at any moment of a delete: the point is whole, or gone from repository and index alike', async () => {
    for (const [round, delayMs] of [0, 25, 60].entries()) {
      await writeRegions(disk, [{ offset: 0, length: MIB, seed: round }]);
      const { pointId } = await backUp(rig.daemon, setup, { type: 'full' });
      const run = await rig.daemon.expect<RunView>(202, 'DELETE', `/backups/${pointId ?? ''}`);
      await pause(delayMs);
      await killDaemon(rig);
      await restart(rig);
      const ended = await rig.daemon.waitForRun(run.id);
      await expectNothingLeft(rig, setup.repository.root);
      if ((await listPoints(rig.daemon, setup)).includes(pointId ?? '')) {
        expect(ended.state).toBe('interrupted');
        await expectReadsBack(rig, pointId, truths);
      } else {
        expect(ended.state).toBe('completed');
        expect((await rig.daemon.request('GET', `/backups/${pointId ?? ''}/chain`)).status).toBe(404);
      }
      await expectClean();
    }
    await expectGoodBackup(rig, setup, { truths });
  });

  async function expectClean(): Promise<void> {
    const check = await rig.daemon.expect<RunView>(
      202,
      'POST',
      `/repositories/${setup.repository.id}/check`,
      { content: true },
    );
    const { state, result } = await rig.daemon.waitForRun(check.id);
    expect(state).toBe('completed');
    expect(result?.kind === 'check' ? result.report.findings : null).toEqual([]);
  }
});

async function exists(file: string): Promise<boolean> {
  try {
    await stat(file);
    return true;
  } catch (error) {
    if (errnoOf(error) === 'ENOENT') return false;
    throw error;
  }
}
