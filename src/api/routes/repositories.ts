import type { Engine } from '../../engine/engine.js';
import type { PointId, RepositoryId, VmId } from '../../lib/id.js';
import { asId, asOptionalId, asPage, type Handlers } from '../operation.js';

type Operations =
  'createRepository' | 'listRepositories' | 'getRepository' | 'checkRepository' | 'rescanRepository';

export function repositoryHandlers(engine: Engine): Pick<Handlers, Operations> {
  return {
    createRepository: async ({ body, actor }) => {
      const repository = await engine.createRepository(body, actor);
      return { status: 201, body: repository, location: `/api/v1/repositories/${repository.id}` };
    },
    listRepositories: async ({ query }) => ({
      status: 200,
      body: await engine.listRepositories(asPage(query)),
    }),
    getRepository: async ({ params }) => ({
      status: 200,
      body: await engine.getRepository(asId<RepositoryId>(params.id)),
    }),
    checkRepository: async ({ params, body, actor }) => {
      const options = {
        content: body?.content ?? true,
        vmId: asOptionalId<VmId>(body?.vmId),
        pointId: asOptionalId<PointId>(body?.pointId),
      };
      const run = await engine.checkRepository(asId<RepositoryId>(params.id), options, actor);
      return { status: 202, body: run, location: `/api/v1/runs/${run.id}` };
    },
    rescanRepository: async ({ params, actor }) => {
      const run = await engine.rescanRepository(asId<RepositoryId>(params.id), actor);
      return { status: 202, body: run, location: `/api/v1/runs/${run.id}` };
    },
  };
}
