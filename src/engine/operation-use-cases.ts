import { AppError } from '../lib/errors.js';
import type { Engine } from './engine.js';
import type { OperationView, RunView } from './types.js';

type OperationUseCases = Pick<Engine, 'getOperation'>;

export function createOperationUseCases({ getRun }: Pick<Engine, 'getRun'>): OperationUseCases {
  return {
    getOperation: async (id) => toOperationView(await getRun(id)),
  };
}

/** NOT_FOUND for a run that is about a machine or a repository. */
export function toOperationView({ request, ...run }: RunView): OperationView {
  const operation = subjectOf(request);
  if (operation === null) throw new AppError('NOT_FOUND', `there is no operation ${run.id}`);
  const { id, state, createdAt, endedAt, error, result, progress } = run;
  const share = state === 'completed' ? 1 : progress.share;
  return { id, ...operation, state, createdAt, endedAt, share, error, result };
}

function subjectOf(request: RunView['request']): Pick<OperationView, 'kind' | 'subjectId'> | null {
  switch (request.kind) {
    case 'materialize':
      return { kind: request.kind, subjectId: request.exportId };
    case 'attach-volume':
    case 'detach-volume':
      return { kind: request.kind, subjectId: request.volumeId };
    default:
      return null;
  }
}
