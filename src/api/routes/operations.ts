import type { Engine } from '../../engine/engine.js';
import type { RunId } from '../../lib/id.js';
import { asId, type Handlers } from '../operation.js';

export function operationHandlers(engine: Engine): Pick<Handlers, 'getOperation'> {
  return {
    getOperation: async ({ params }) => ({
      status: 200,
      body: await engine.getOperation(asId<RunId>(params.id)),
    }),
  };
}
