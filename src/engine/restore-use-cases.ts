import path from 'node:path';
import { AppError } from '../lib/errors.js';
import type { PointId } from '../lib/id.js';
import type { MachineTargetSpec } from '../target/machine-target.js';
import { requireLocalHypervisor } from '../target/open-target.js';
import { requirePoint } from './backup-use-cases.js';
import type { EngineContext } from './context.js';
import type { Actor, Engine } from './engine.js';
import { startRun } from './run-use-cases.js';
import type { RestoreDisk, RunRequest, RunView } from './types.js';

type RestoreUseCases = Pick<Engine, 'requestRestore' | 'requestMachineRestore'>;

export function createRestoreUseCases(context: EngineContext): RestoreUseCases {
  const start = async (
    pointId: PointId,
    request: Extract<RunRequest, { kind: 'restore' }>,
    actor: Actor,
  ): Promise<RunView> => {
    const row = await requirePoint(context, pointId);
    const { repositoryId, vmId } = row;
    return startRun(context, { kind: 'restore', repositoryId, vmId, pointId, request, turn: 'none' }, actor);
  };
  return {
    requestRestore({ pointId, disks, overwrite, acceptDamage }, actor) {
      requireDistinctTargets(disks);
      return start(pointId, { kind: 'restore', disks, machine: null, overwrite, acceptDamage }, actor);
    },
    requestMachineRestore({ pointId, machine, acceptDamage }, actor) {
      requireMachine(machine);
      const request = { kind: 'restore' as const, disks: [], machine, overwrite: false, acceptDamage };
      return start(pointId, request, actor);
    },
  };
}

/** What is wrong with a wish whatever the point and the hypervisor say. */
function requireMachine(machine: MachineTargetSpec): void {
  const refuse = (field: string, message: string): never => {
    throw new AppError('INVALID_INPUT', message, { details: { field } });
  };
  requireLocalHypervisor(machine.uri);
  const { name, place, identity } = machine;
  if (name !== null && !MACHINE_NAME.test(name)) refuse('name', 'this is no name for a machine');
  if (name !== null && identity === 'replace') refuse('name', 'a machine that is replaced keeps its name');
  if (place === null && identity !== 'replace') refuse('place', 'a directory or a pool must be named');
  if (place?.kind === 'directory' && !path.isAbsolute(place.path)) {
    refuse('place', 'the directory must be absolute');
  }
}

/** libvirt has none with a slash; control characters would break its own tools. */
// eslint-disable-next-line no-control-regex -- they are what is refused
const MACHINE_NAME = /^(?!\s*$)[^/\u0000-\u001f\u007f]{1,128}$/;

/** Two disks written to one target would destroy each other. */
function requireDistinctTargets(disks: readonly RestoreDisk[]): void {
  if (disks.length === 0) {
    throw new AppError('INVALID_INPUT', 'no disk to restore was named', { details: { field: 'disks' } });
  }
  const seen = new Set<string>();
  for (const { diskId, target } of disks) {
    const place = placeOf(target);
    for (const key of [`disk:${diskId}`, place]) {
      if (seen.has(key)) {
        throw new AppError('INVALID_INPUT', 'a disk or a target is named twice', {
          details: { field: 'disks' },
        });
      }
      seen.add(key);
    }
  }
}

function placeOf(target: RestoreDisk['target']): string {
  switch (target.kind) {
    case 'nbd':
      return `uri:${target.uri}`;
    case 'volume':
      return `volume:${target.volumeId}`;
    default:
      return `path:${target.path}`;
  }
}
