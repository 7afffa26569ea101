import { expect, it } from 'vitest';
import type { RepositoryView, RunView, VmView } from '../../src/engine/types.js';
import { CleanupStack } from '../../src/lib/cleanup.js';
import { GuestConsole, readVerdict } from '../lab/guest.js';
import { findBlockLeftovers } from '../lab/leftovers.js';
import { startQemuGuest } from '../lab/qemu-guest.js';
import { restoreRaw } from './daemon.js';
import {
  backUpWriter,
  expectFrozen,
  expectOneInstant,
  expectWritesOn,
  makeGuestDisks,
  pointOf,
  waitForContent,
  type GuestVerdict,
} from './guest-rig.js';
import { methodsOf, startRig, stopRig, type Rig } from './rig.js';

it('a guest that writes to two disks of a bare QEMU is restored as it was at one instant', async () => {
  await using cleanup = new CleanupStack();
  const rig = await startRig((lab) => ({ snapshot: { scratchDirectory: lab.file('scratch') } }));
  cleanup.defer(() => stopRig(rig));
  const disks = await makeGuestDisks(rig.lab, 'bare');
  const qemu = cleanup.use(await startQemuGuest(rig.lab, { name: 'bare', disks, mode: 'writer' }));
  const console = new GuestConsole(qemu.serialFile);
  await waitForContent(console);
  const repository = await rig.daemon.expect<RepositoryView>(201, 'POST', '/repositories', {
    name: 'bare',
    root: rig.lab.file('repository'),
  });
  const { items } = await rig.daemon.expect<{ items: VmView[] }>(200, 'POST', '/vms/discover', {
    kind: 'qemu',
    socket: qemu.qmpSocket,
    agentSocket: qemu.agentSocket,
  });
  const setup = { repository, vm: items[0]! };

  const points = [
    await backUpWriter(rig.daemon, setup, { console, consistency: 'require' }),
    await backUpWriter(rig.daemon, setup, { console, consistency: 'require' }),
  ];
  expect(points[0]?.isWrittenMeanwhile).toBe(true);
  expect(points.map(({ run }) => methodsOf(run))).toEqual([
    ['full FIRST_POINT', 'full FIRST_POINT'],
    ['bitmap BITMAP', 'bitmap BITMAP'],
  ]);
  for (const { run } of points) {
    const { point, log } = await pointOf(rig.daemon, run);
    expect(point.consistency).toBe('application');
    expect(log.filter(({ level }) => level === 'warning')).toEqual([]);
  }
  const left = await findBlockLeftovers((command) => qemu.qmp.execute(command), { isOurs: /^holdfast-/ });
  // The record that the next run counts from, on both disks.
  expect(left.sort()).toEqual(
    ['disk0', 'disk1'].map((id) => `bitmap ${id}-format/holdfast-${points[1]!.run.pointId ?? ''}`),
  );

  let last = 0;
  for (const point of points) {
    const verdict = await verify(rig, point.run);
    expectOneInstant(verdict, point);
    expectFrozen(verdict);
    expect(verdict.vdb.lastRecord).toBeGreaterThan(last);
    last = verdict.vda.lastRecord;
  }
  await expectWritesOn(console);
}, 240_000);

/** Boots the guest on the disks of the point, in another QEMU. */
async function verify(rig: Rig, { id, pointId }: RunView): Promise<GuestVerdict> {
  const files = Object.entries(await restoreRaw(rig.daemon, pointId ?? '', rig.lab.file(`restored-${id}`)));
  const disks = files.toSorted().map(([, path]) => ({ path, format: 'raw' as const }));
  await using qemu = await startQemuGuest(rig.lab, { name: id, disks, mode: 'verify' });
  return await readVerdict(new GuestConsole(qemu.serialFile));
}
