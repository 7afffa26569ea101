import { mkdir } from 'node:fs/promises';
import { expect, it } from 'vitest';
import type { RunView } from '../../src/engine/types.js';
import { MIB } from '../../src/lib/units.js';
import { exportRaw, firstDifference, makeRaw } from '../lab/disk-image.js';
import { waitForChild } from './crash.js';
import { backUp, setUp, startBackup } from './daemon.js';
import { expectReadsBack, imageDisk, startRig, stopRig, waitUntilCopying } from './rig.js';

const DISK_BYTES = 24 * MIB;
const SLOW = 3 * MIB;

it('what only reads waits neither for a backup of the same machine nor for another reader', async () => {
  const rig = await startRig({ runs: { workers: 4 }, nbd: { stallTimeoutMs: 30_000 } });
  const disk = rig.lab.file('disk.raw');
  await makeRaw({ path: disk, sizeBytes: DISK_BYTES, regions: [{ offset: 0, length: DISK_BYTES }] });
  const setup = await setUp(rig.daemon, {
    root: rig.lab.file('repository'),
    disks: [{ name: 'vda', source: imageDisk(disk) }],
  });
  const first = await backUp(rig.daemon, setup);
  const truths = { vda: disk };
  const stateOf = async (run: RunView): Promise<string> =>
    (await rig.daemon.expect<RunView>(200, 'GET', `/runs/${run.id}`)).state;

  const backup = await startBackup(rig.daemon, setup, { type: 'full', bytesPerSecond: SLOW });
  await waitUntilCopying(rig.daemon, backup.id);
  const refused = await rig.daemon.request('POST', '/backups', {
    vmId: setup.vm.id,
    repositoryId: setup.repository.id,
    type: 'auto',
  });
  expect([refused.status, refused.body]).toEqual([
    409,
    expect.objectContaining({ code: 'RUN_ACTIVE', details: { runId: backup.id } }),
  ]);

  const slow = rig.lab.file('slow', 'disk.qcow2');
  await mkdir(rig.lab.file('slow'));
  const restore = await rig.daemon.expect<RunView>(202, 'POST', '/restore/images', {
    pointId: first.pointId,
    disks: [{ diskId: setup.vm.disks[0]?.id, target: { kind: 'file', path: slow, format: 'qcow2' } }],
  });
  const writer = await waitForChild(rig, 'qemu-nbd', rig.lab.file('slow'));
  process.kill(writer, 'SIGSTOP');
  await expectReadsBack(rig, first.pointId, truths);
  expect([await stateOf(backup), await stateOf(restore)]).toEqual(['running', 'running']);
  process.kill(writer, 'SIGCONT');
  expect((await rig.daemon.waitForRun(restore.id)).state).toBe('completed');
  expect(await stateOf(backup)).toBe('running');
  await exportRaw(slow, 'qcow2', rig.lab.file('slow.raw'));
  expect(await firstDifference(rig.lab.file('slow.raw'), disk)).toBeNull();
  expect((await rig.daemon.waitForRun(backup.id)).state).toBe('completed');
  await expectReadsBack(rig, backup.pointId, truths);
  await stopRig(rig);
}, 60_000);
