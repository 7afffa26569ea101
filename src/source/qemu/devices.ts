import path from 'node:path';
import { z } from 'zod';
import { AppError } from '../../lib/errors.js';
import { survivesNbdInIothread } from './features.js';
import type { QemuDevice, QemuMachine } from './machine-state.js';
import { QmpError, type QmpClient } from '../../lib/qmp.js';

/** What a guest device says of itself. */
export interface DeviceFacts {
  /** QOM class, e.g. `virtio-blk-device`, `scsi-hd`. */
  type: string;
  serial: string | null;
  /** It or its controller does its I/O in a thread of its own. */
  hasIothread: boolean;
}

/** Hand the guest's own SCSI commands to a device of the host: what they write passes by QEMU's block layer. */
export const PASSTHROUGH_TYPES: ReadonlySet<string> = new Set(['scsi-block', 'scsi-generic']);
/** Firmware and its variables; not a disk. */
export const FIRMWARE_TYPE = 'cfi.pflash01';

export async function readDeviceFacts(qmp: QmpClient, device: QemuDevice): Promise<DeviceFacts> {
  const { qomPath } = device;
  const [type, serial, iothread, bus] = await Promise.all([
    qomText(qmp, qomPath, 'type'),
    qomText(qmp, qomPath, 'serial'),
    qomText(qmp, qomPath, 'iothread'),
    qomText(qmp, qomPath, 'parent_bus'),
  ]);
  // The bus of a SCSI disk is a child of its controller.
  const controllers = bus === null ? null : await qomText(qmp, path.posix.dirname(bus), 'iothread');
  return { type: type ?? '', serial, hasIothread: (iothread ?? controllers) !== null };
}

/** A textual property, null where the object has none or it is empty. */
async function qomText(qmp: QmpClient, qomPath: string, property: string): Promise<string | null> {
  try {
    const text = z.string().safeParse(await qmp.execute('qom-get', { path: qomPath, property }));
    return text.success && text.data !== '' ? text.data : null;
  } catch (error) {
    if (error instanceof QmpError) return null;
    throw error;
  }
}

/**
 * Devices that no drive of QEMU stands behind, by QOM path: another process has the guest's disk.
 * Only those that are surely disks; a passed-through PCI device may be anything.
 */
export async function findForeignDisks(qmp: QmpClient): Promise<string[]> {
  const listSchema = z.array(z.object({ name: z.string(), type: z.string() }));
  const found: string[] = [];
  for (const parent of ['/machine/peripheral', '/machine/peripheral-anon']) {
    const children = listSchema.parse(await qmp.execute('qom-list', { path: parent }));
    for (const { name, type } of children) {
      if (/^child<(vhost-user-blk|vhost-user-scsi|vhost-scsi)/.test(type)) found.push(`${parent}/${name}`);
    }
  }
  return found;
}

/** Rejects with SOURCE_REFUSED when reading these disks' exports would endanger the guest. */
export async function requireSafeThreads(
  qmp: QmpClient,
  machine: QemuMachine,
  devices: readonly QemuDevice[],
): Promise<void> {
  if (!machine.hasIothreads || survivesNbdInIothread(machine)) return;
  for (const device of devices) {
    const { hasIothread } = await readDeviceFacts(qmp, device);
    if (!hasIothread) continue;
    throw new AppError(
      'SOURCE_REFUSED',
      `${device.target} has an iothread, and QEMU before 9.0 aborts when a reader of such a disk disconnects`,
      { details: { target: device.target, version: machine.version } },
    );
  }
}
