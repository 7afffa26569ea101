import { AppError } from '../../lib/errors.js';
import type { DiskProbe, SourceDisk } from '../source.js';
import type { QemuDevice, QemuMachine, QemuNode } from './machine-state.js';

/** A disk of the machine that can be backed up. */
export interface QemuDisk {
  device: QemuDevice;
  /** What the device writes to. */
  root: QemuNode;
  /** What holds the disk's format and its records of changes. */
  image: QemuNode;
}

/** Where the image is, without what a URI may say of users and passwords. */
export function locationOf(image: QemuNode): string {
  return image.filename
    .replace(/:\/\/[^/@]*@/g, '://')
    .replace(/"([^"]*(?:cookie|password|user)[^"]*)": "[^"]*"/g, '"$1": ""');
}

/** Identifies a disk: the machine, and the image it has. */
export function lineageOf(machine: QemuMachine, socket: string, image: QemuNode): string {
  return `qemu:${machine.uuid ?? socket}:${locationOf(image)}`;
}

/** Why QEMU can keep no record of this disk's changes, null when it can. */
export function noRecordReason(image: QemuNode): string | null {
  if (image.canKeepBitmaps) return null;
  return image.driver === 'qcow2'
    ? 'the image is a qcow2 file of the old version 2, which holds no bitmaps'
    : `an image of format ${image.driver} holds no bitmaps`;
}

/** The disk the engine names. NOT_FOUND when the machine has it no more, SOURCE_REFUSED when it cannot be read. */
export function findDisk(machine: QemuMachine, disk: SourceDisk): QemuDisk {
  const { source, name } = disk;
  if (source.kind !== 'qemu') {
    throw new AppError('CONFLICT', `disk ${name} is not a disk of a qemu machine`);
  }
  const device = machine.devices.find(({ target }) => target === source.target);
  if (device === undefined) {
    throw new AppError('NOT_FOUND', `the machine has no disk ${source.target}`, { details: { disk: name } });
  }
  if (device.root === null || device.image === null || device.image.isReadOnly) {
    throw new AppError('SOURCE_REFUSED', `${source.target} has no writable medium`, {
      details: { disk: name },
    });
  }
  return { device, root: device.root, image: device.image };
}

export function probeOf(machine: QemuMachine, socket: string, { image }: QemuDisk): DiskProbe {
  return {
    sizeBytes: image.virtualBytes,
    lineage: lineageOf(machine, socket, image),
    records: image.bitmaps
      .filter(({ isPersistent }) => isPersistent)
      .map((bitmap) => ({ bitmap: bitmap.name, isInconsistent: !bitmap.isUsable })),
    recordKeeper: 'managed',
    noRecordReason: noRecordReason(image),
  };
}
