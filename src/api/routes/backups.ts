import type { Engine } from '../../engine/engine.js';
import type { DiskId, PointId, RepositoryId, VmId } from '../../lib/id.js';
import type { components } from '../generated.js';
import { asId, asOptionalId, asPage, type Handlers } from '../operation.js';

type Operations =
  | 'createBackup'
  | 'estimateBackup'
  | 'listBackups'
  | 'getBackupStats'
  | 'getBackup'
  | 'deleteBackup'
  | 'getBackupChain';
type Selection = components['schemas']['EstimateRequest'];

interface PointFilter {
  vmId?: VmId | undefined;
  repositoryId?: RepositoryId | undefined;
}

function asFilter(query: { vmId?: string; repositoryId?: string }): PointFilter {
  return {
    vmId: asOptionalId<VmId>(query.vmId) ?? undefined,
    repositoryId: asOptionalId<RepositoryId>(query.repositoryId) ?? undefined,
  };
}

/** What a backup and its estimate have in common. */
function asSelection(body: Selection): Parameters<Engine['estimateBackup']>[0] {
  return {
    vmId: asId<VmId>(body.vmId),
    repositoryId: asId<RepositoryId>(body.repositoryId),
    type: body.type,
    bitmaps: body.bitmaps.map((bitmap) => ({
      diskId: asId<DiskId>(bitmap.diskId),
      name: bitmap.name,
      sincePointId: asId<PointId>(bitmap.sincePointId),
    })),
    disks: body.disks,
  };
}

export function backupHandlers(engine: Engine): Pick<Handlers, Operations> {
  return {
    createBackup: async ({ body, actor }) => {
      const request = {
        ...asSelection(body),
        bytesPerSecond: body.bytesPerSecond,
        consistency: body.consistency,
        whenBusy: body.whenBusy,
      };
      const run = await engine.requestBackup(request, actor);
      return { status: 202, body: run, location: `/api/v1/runs/${run.id}` };
    },
    estimateBackup: async ({ body }) => ({
      status: 200,
      body: await engine.estimateBackup(asSelection(body)),
    }),
    listBackups: async ({ query }) => ({
      status: 200,
      body: await engine.listBackups(asFilter(query), asPage(query)),
    }),
    getBackupStats: async ({ query }) => ({
      status: 200,
      body: await engine.getBackupStats(asFilter(query)),
    }),
    getBackup: async ({ params }) => ({
      status: 200,
      body: await engine.getBackup(asId<PointId>(params.id)),
    }),
    deleteBackup: async ({ params, actor }) => {
      const run = await engine.requestDelete(asId<PointId>(params.id), actor);
      return { status: 202, body: run, location: `/api/v1/runs/${run.id}` };
    },
    getBackupChain: async ({ params }) => ({
      status: 200,
      body: { items: await engine.getBackupChain(asId<PointId>(params.id)) },
    }),
  };
}
