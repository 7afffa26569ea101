import { AppError } from '../lib/errors.js';
import { requirePoint } from './backup-use-cases.js';
import type { EngineContext } from './context.js';
import type { Engine } from './engine.js';
import { startRun } from './run-use-cases.js';

type RestoreUseCases = Pick<Engine, 'requestRestore'>;

export function createRestoreUseCases(context: EngineContext): RestoreUseCases {
  return {
    async requestRestore(input, actor) {
      const row = await requirePoint(context, input.pointId);
      requireDistinctTargets(input.disks);
      return startRun(
        context,
        {
          kind: 'restore',
          repositoryId: row.repositoryId,
          vmId: row.vmId,
          pointId: input.pointId,
          request: {
            kind: 'restore',
            disks: input.disks,
            overwrite: input.overwrite,
            acceptDamage: input.acceptDamage,
          },
          turn: 'none',
        },
        actor,
      );
    },
  };
}

/** Two disks written to one target would destroy each other. */
function requireDistinctTargets(disks: { diskId: string; target: { kind: string } }[]): void {
  if (disks.length === 0) {
    throw new AppError('INVALID_INPUT', 'no disk to restore was named', { details: { field: 'disks' } });
  }
  const seen = new Set<string>();
  for (const { diskId, target } of disks) {
    const place =
      'path' in target ? `path:${String(target.path)}` : `uri:${'uri' in target ? String(target.uri) : ''}`;
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
