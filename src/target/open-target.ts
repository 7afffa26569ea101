import type { ServerPlace } from '../nbd/qemu-nbd.js';
import { openDeviceTarget } from './device-target.js';
import { openFileTarget } from './file-target.js';
import { openLibvirtMachineTarget } from './libvirt/libvirt-machine-target.js';
import { requireLocal } from './libvirt/libvirt-host.js';
import type { MachineTarget, MachineTargetSpec } from './machine-target.js';
import { openNbdTarget } from './nbd-target.js';
import type { Target, TargetSpec } from './target.js';

export interface TargetLimits {
  connections: number;
  connectTimeoutMs: number;
  requestTimeoutMs: number;
}

/** The target of one disk by its kind; touches nothing yet. */
export function openTarget(
  spec: TargetSpec,
  options: { place: ServerPlace; limits: TargetLimits; forbiddenDirectories: readonly string[] },
): Target {
  switch (spec.kind) {
    case 'file':
      return openFileTarget(spec, {
        ...options.place,
        connections: options.limits.connections,
        forbiddenDirectories: options.forbiddenDirectories,
      });
    case 'nbd':
      return openNbdTarget(spec, options.limits);
    case 'device':
      return openDeviceTarget(spec);
  }
}

/** The target of a whole machine by its kind; touches nothing yet. */
export function openMachineTarget(
  spec: MachineTargetSpec,
  options: { place: ServerPlace; commandTimeoutMs: number; forbiddenDirectories: readonly string[] },
): MachineTarget {
  return openLibvirtMachineTarget(spec, options);
}

/** INVALID_INPUT for a connection that is none, or to a libvirt that is not of this host. */
export const requireLocalHypervisor = requireLocal;
