import type { Engine } from '../../engine/engine.js';
import type { RunId, VmId } from '../../lib/id.js';
import { asId, asOptionalId, asPage, type Handlers } from '../operation.js';

type Operations = 'listRuns' | 'getRun' | 'getRunLog' | 'cancelRun' | 'streamRunEvents';

export function runHandlers(engine: Engine): Pick<Handlers, Operations> {
  return {
    listRuns: async ({ query }) => {
      const filter = {
        kind: query.kind,
        state: query.state,
        vmId: asOptionalId<VmId>(query.vmId) ?? undefined,
      };
      return { status: 200, body: await engine.listRuns(filter, asPage(query)) };
    },
    getRun: async ({ params }) => ({ status: 200, body: await engine.getRun(asId<RunId>(params.id)) }),
    getRunLog: async ({ params, query }) => {
      const items = await engine.getRunLog(
        asId<RunId>(params.id),
        query.afterSequence ?? 0,
        asPage(query).limit,
      );
      return { status: 200, body: { items } };
    },
    cancelRun: async ({ params, actor }) => {
      const run = await engine.cancelRun(asId<RunId>(params.id), actor);
      return { status: 202, body: run, location: `/api/v1/runs/${run.id}` };
    },
    streamRunEvents: async ({ params, signal }) => {
      const id = asId<RunId>(params.id);
      // Asked first, so that an unknown run is a plain 404 and not a stream that ends at once.
      await engine.getRun(id);
      return { status: 200, stream: engine.watchRun(id, signal) };
    },
  };
}
