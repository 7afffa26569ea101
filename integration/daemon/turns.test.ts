import { expect, it } from 'vitest';
import type { RunView } from '../../src/engine/types.js';
import { pollUntil } from '../../src/lib/deadline.js';
import { MIB } from '../../src/lib/units.js';
import { exportRaw, firstDifference, makeRaw } from '../lab/disk-image.js';
import { startNbdkit } from '../lab/nbd-server.js';
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

  await using slow = await startNbdkit({
    socketPath: rig.lab.file('slow.sock'),
    plugin: ['memory', `size=${DISK_BYTES}`],
    filters: ['rate'],
    parameters: [`rate=${8 * SLOW * 2}`],
  });
  const restore = await rig.daemon.expect<RunView>(202, 'POST', '/restore/images', {
    pointId: first.pointId,
    disks: [{ diskId: setup.vm.disks[0]?.id, target: { kind: 'nbd', uri: slow.uri } }],
  });
  await pollUntil(async () => ((await stateOf(restore)) === 'running' ? true : undefined), {
    timeoutMs: 5000,
    what: 'the restore running',
  });
  await expectReadsBack(rig, first.pointId, truths);
  expect([await stateOf(backup), await stateOf(restore)]).toEqual(['running', 'running']);
  expect((await rig.daemon.waitForRun(restore.id)).state).toBe('completed');
  await exportRaw(slow.uri, 'raw', rig.lab.file('slow.raw'));
  expect(await firstDifference(rig.lab.file('slow.raw'), disk)).toBeNull();
  expect((await rig.daemon.waitForRun(backup.id)).state).toBe('completed');
  await expectReadsBack(rig, backup.pointId, truths);
  await stopRig(rig);
}, 60_000);
