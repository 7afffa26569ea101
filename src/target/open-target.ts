import type { ServerPlace } from '../nbd/qemu-nbd.js';
import { openDeviceTarget } from './device-target.js';
import { openFileTarget } from './file-target.js';
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
