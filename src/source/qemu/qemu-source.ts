import type { DiskId } from '../../lib/id.js';
import { openLocalHost } from '../libvirt/local-host.js';
import type { DiskProbe, MachineSource, QemuVmSource } from '../source.js';
import type { SourceOptions } from '../source-settings.js';
import { requireSafeThreads } from './devices.js';
import { discoverMachine } from './discover.js';
import { findDisk, probeOf } from './disk-facts.js';
import { endRun } from './end-run.js';
import { readMachine } from './machine-state.js';
import type { QemuContext } from './qemu-context.js';
import { connectQmp } from '../../lib/qmp.js';
import { estimateDisk } from './estimate.js';
import { placesOf } from './run-places.js';
import { takeSnapshot } from './snapshot.js';
import { removeBitmaps } from './tear-down.js';

/**
 * A running QEMU of this host, asked over its QMP socket, without libvirt. The socket serves one client:
 * it is connected for each operation, and free again while a snapshot is held.
 */
export function openQemuSource(source: QemuVmSource, { settings }: SourceOptions): MachineSource {
  const timeoutMs = settings.snapshot.commandTimeoutMs;
  const context: QemuContext = {
    source,
    settings,
    host: openLocalHost({ timeoutMs }),
    connect: (signal) => connectQmp(source.socket, { timeoutMs, signal }),
  };
  return {
    async probe(disks, { signal }) {
      await using qmp = await context.connect(signal);
      const machine = await readMachine(qmp);
      const found = disks.map((disk) => ({ diskId: disk.diskId, ...findDisk(machine, disk) }));
      await requireSafeThreads(
        qmp,
        machine,
        found.map(({ device }) => device),
      );
      return new Map<DiskId, DiskProbe>(
        found.map((disk) => [disk.diskId, probeOf(machine, source.socket, disk)]),
      );
    },
    snapshot: (request) => takeSnapshot(context, request),
    async estimate(disks, { signal }) {
      await using qmp = await context.connect(signal);
      const machine = await readMachine(qmp);
      return new Map(
        disks.map(({ disk, bitmap }) => [
          disk.diskId,
          estimateDisk(machine, findDisk(machine, disk), bitmap),
        ]),
      );
    },
    async removeRecords(names, { signal }) {
      await using qmp = await context.connect(signal);
      await removeBitmaps(qmp, await readMachine(qmp), (name) => names.includes(name));
    },
    async cleanUp(leftover, { signal }) {
      const places = placesOf(settings.snapshot.scratchDirectory, leftover);
      await endRun(context, { places, record: leftover.isCommitted ? null : places.record, signal });
    },
    async discover({ signal }) {
      await using qmp = await context.connect(signal);
      return await discoverMachine(qmp, source);
    },
  };
}
