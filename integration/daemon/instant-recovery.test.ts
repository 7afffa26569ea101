import { afterAll, beforeAll, expect, it } from 'vitest';
import type { ExportView, OperationView, RunView } from '../../src/engine/types.js';
import { CleanupStack } from '../../src/lib/cleanup.js';
import { pollUntil } from '../../src/lib/deadline.js';
import { GuestConsole, readVerdict } from '../lab/guest.js';
import { qemuImg } from '../lab/disk-image.js';
import { startQemuGuest } from '../lab/qemu-guest.js';
import { backUp, setUp } from './daemon.js';
import {
  hashLayers,
  publish,
  startExportRig,
  stopExportRig,
  topLayer,
  type ExportRig,
} from './export-rig.js';
import { expectWritesOn, makeGuestDisks } from './guest-rig.js';
import { imageDisk } from './rig.js';

let rig: ExportRig;

beforeAll(async () => {
  rig = await startExportRig();
});
afterAll(async () => {
  await stopExportRig(rig);
});

/** Two disks for QEMU, over NBD. */
function nbdDisks(servers: { server: Record<string, string>; name: string }[]): string[] {
  return servers.flatMap(({ server, name }, index) => [
    '-blockdev',
    JSON.stringify({
      driver: 'raw',
      'node-name': `nbd${index}`,
      discard: 'unmap',
      file: { driver: 'nbd', server, export: name },
    }),
    ...['-device', `virtio-blk-pci,id=disk${index},drive=nbd${index}`],
  ]);
}

it('a machine starts from a point at once, and its disks become images of its own while it writes', async () => {
  const { lab, daemon, exportd } = rig;
  await using cleanup = new CleanupStack();
  const disks = await makeGuestDisks(lab, 'lost');
  const setup = await setUp(daemon, {
    root: lab.file('repository'),
    disks: disks.map(({ target, path }) => ({ name: target, source: imageDisk(path, 'qcow2') })),
  });
  const pointId = (await backUp(daemon, setup)).pointId ?? '';
  const before = await hashLayers(daemon, pointId);
  const exports: ExportView[] = [];
  for (const disk of ['vda', 'vdb']) {
    const overlayPath = lab.file(`again-${disk}.qcow2`);
    exports.push(await publish(daemon, { pointId, disk, isReadOnly: false, overlayPath }));
  }
  const [one, two] = exports as [ExportView, ExportView];
  const extra = nbdDisks([
    { server: { type: 'inet', host: '127.0.0.1', port: String(exportd.port) }, name: one.name },
    { server: { type: 'unix', path: exportd.socketPath }, name: two.name },
  ]);
  const qemu = cleanup.use(await startQemuGuest(lab, { name: 'again', disks: [], extra, mode: 'writer' }));
  const console = new GuestConsole(qemu.serialFile);
  await console.waitFor(/^hf: record 100$/m);

  const operations: OperationView[] = [];
  for (const { id } of exports) {
    operations.push(await daemon.expect<OperationView>(202, 'POST', `/exports/${id}/materialize`));
  }
  for (const { id } of operations) {
    await pollUntil(
      async () => {
        const now = await daemon.expect<OperationView>(200, 'GET', `/operations/${id}`);
        if (now.endedAt === null) return undefined;
        expect([now.state, now.error]).toEqual(['completed', null]);
        return true;
      },
      { timeoutMs: 60_000, intervalMs: 200, what: `operation ${id}` },
    );
  }
  await expectWritesOn(console);
  expect(await hashLayers(daemon, pointId)).toBe(before);
  const run = await daemon.expect<RunView>(202, 'DELETE', `/backups/${pointId}`);
  expect((await daemon.waitForRun(run.id)).state).toBe('completed');
  await expect(topLayer(daemon, pointId)).rejects.toThrow('404');
  await expectWritesOn(console);
  const told = await console.lastRecord();
  await qemu.stop();
  for (const { id, imagePath } of exports) {
    await daemon.expect(204, 'DELETE', `/exports/${id}`);
    expect(await qemuImg(['info', '-f', 'qcow2', imagePath])).not.toMatch(/backing file/);
  }

  const images = exports.map(({ imagePath }) => ({ path: imagePath, format: 'qcow2' as const }));
  const check = cleanup.use(await startQemuGuest(lab, { name: 'check', disks: images, mode: 'verify' }));
  const verdict = await readVerdict(new GuestConsole(check.serialFile));
  for (const disk of [verdict.vda, verdict.vdb]) {
    expect(disk).toMatchObject({ missingRecords: 0, fsckReplayed: 0 });
    expect(disk.lastRecord).toBeGreaterThanOrEqual(told);
  }
}, 180_000);
