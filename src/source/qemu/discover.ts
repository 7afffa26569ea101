import path from 'node:path';
import { systemClock, toTimestamp } from '../../lib/clock.js';
import { bitmapNameFor, pointOfBitmap } from '../bitmap-name.js';
import type {
  DiscoveredDisk,
  DiscoveredVm,
  DiskFacts,
  MachineRecord,
  QemuVmSource,
  VmState,
} from '../source.js';
import {
  FIRMWARE_TYPE,
  findForeignDisks,
  PASSTHROUGH_TYPES,
  readDeviceFacts,
  type DeviceFacts,
} from './devices.js';
import { lineageOf, locationOf, noRecordReason } from './disk-facts.js';
import { readMachine, type QemuDevice, type QemuMachine } from './machine-state.js';
import type { QmpClient } from '../../lib/qmp.js';

/** The machine and its disks as QEMU tells them now. */
export async function discoverMachine(qmp: QmpClient, source: QemuVmSource): Promise<DiscoveredVm> {
  const machine = await readMachine(qmp);
  const disks: DiscoveredDisk[] = [];
  for (const device of machine.devices) {
    const facts = await readDeviceFacts(qmp, device);
    if (facts.type !== FIRMWARE_TYPE) disks.push(describeDisk(machine, source.socket, { device, facts }));
  }
  for (const qomPath of await findForeignDisks(qmp)) disks.push(describeForeignDisk(source.socket, qomPath));
  return {
    source,
    key: `qemu:${source.socket}`,
    name: machineName(machine, source),
    facts: {
      isPresent: true,
      state: stateOf(machine.runState),
      seenAt: toTimestamp(systemClock.nowMs()),
      changeRecords: changeRecords(machine),
    },
    disks,
  };
}

export function machineName(machine: QemuMachine, source: QemuVmSource): string {
  return machine.name ?? path.basename(source.socket);
}

const STATES: Partial<Record<string, VmState>> = {
  running: 'running',
  paused: 'paused',
  prelaunch: 'paused',
  suspended: 'paused',
  'io-error': 'paused',
  shutdown: 'off',
};

function stateOf(runState: string): VmState {
  return STATES[runState] ?? 'other';
}

/** Bitmaps of one name on several disks are one record; it is broken when one of them is. */
function changeRecords({ devices }: QemuMachine): MachineRecord[] {
  const records = new Map<string, MachineRecord>();
  for (const { name, isPersistent, isUsable } of devices.flatMap(({ image }) => image?.bitmaps ?? [])) {
    const pointId = pointOfBitmap(name);
    if (pointId === null || !isPersistent || name !== bitmapNameFor(pointId)) continue;
    const isBroken = !isUsable || records.get(name)?.isBroken === true;
    records.set(name, { name, pointId, isBroken });
  }
  return [...records.values()];
}

function describeDisk(
  machine: QemuMachine,
  socket: string,
  { device, facts }: { device: QemuDevice; facts: DeviceFacts },
): DiscoveredDisk {
  const { target, image } = device;
  const reason = image === null ? 'there is no medium' : noRecordReason(image);
  return {
    facts: {
      isPresent: true,
      target,
      serial: facts.serial,
      format: image?.driver ?? 'none',
      location: image === null ? '' : locationOf(image),
      skip: whySkipped(device, facts),
      incremental: { isPossible: reason === null, reason },
    },
    sizeBytes: image?.virtualBytes ?? 0,
    lineage: image === null ? `qemu:${machine.uuid ?? socket}:` : lineageOf(machine, socket, image),
  };
}

function whySkipped({ isRemovable, image }: QemuDevice, { type }: DeviceFacts): DiskFacts['skip'] {
  if (PASSTHROUGH_TYPES.has(type)) {
    return { code: 'PASSTHROUGH', sentence: `the guest talks to the host's device directly (${type})` };
  }
  if (isRemovable) return { code: 'REMOVABLE', sentence: 'the medium is removable' };
  if (image === null) return { code: 'EMPTY', sentence: 'there is no medium' };
  if (image.isReadOnly) return { code: 'READ_ONLY', sentence: 'the guest cannot write to it' };
  return null;
}

function describeForeignDisk(socket: string, qomPath: string): DiscoveredDisk {
  const isNamed = qomPath.startsWith('/machine/peripheral/');
  return {
    facts: {
      isPresent: true,
      target: isNamed ? path.posix.basename(qomPath) : qomPath,
      serial: null,
      format: 'none',
      location: '',
      skip: { code: 'PASSTHROUGH', sentence: 'another process than QEMU serves this disk to the guest' },
      incremental: { isPossible: false, reason: 'QEMU does not see what is written to it' },
    },
    sizeBytes: 0,
    lineage: `qemu:${socket}:${qomPath}`,
  };
}
