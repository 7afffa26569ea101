import type { Actor, Engine } from '../../engine/engine.js';
import type { RunView } from '../../engine/types.js';
import { AppError } from '../../lib/errors.js';
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
  | 'getBackupChain'
  | 'reportPush'
  | 'completePushDisk';
type Selection = components['schemas']['EstimateRequest'];
type BackupBody = components['schemas']['BackupRequest'];

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

/** Fields of one kind of backup that are given although the other is asked for. */
function refuseFields(body: BackupBody, names: readonly (keyof BackupBody)[]): void {
  const given = names.filter((name) => body[name] !== undefined);
  if (given.length === 0) return;
  throw new AppError(
    'INVALID_INPUT',
    `${given.join(', ')} cannot be given with source ${body.source ?? 'configured'}`,
    {
      details: { fields: given },
    },
  );
}

/** The validator fills in no defaults of fields that only one source has. */
function requestConfigured(engine: Engine, body: BackupBody, actor: Actor): Promise<RunView> {
  refuseFields(body, ['push']);
  const { bitmaps = [], disks = { include: [], exclude: [] } } = body;
  const request = {
    ...asSelection({ ...body, bitmaps, disks }),
    bytesPerSecond: body.bytesPerSecond ?? 0,
    consistency: body.consistency ?? 'prefer',
    whenBusy: body.whenBusy,
  };
  return engine.requestBackup(request, actor);
}

function requestPush(
  engine: Engine,
  body: BackupBody,
  { actor, signal }: { actor: Actor; signal: AbortSignal },
): Promise<RunView> {
  refuseFields(body, ['bitmaps', 'bytesPerSecond', 'consistency', 'disks']);
  const { identity = null, consistency = 'crash', disks = [] } = body.push ?? {};
  const request = {
    vmId: asId<VmId>(body.vmId),
    repositoryId: asId<RepositoryId>(body.repositoryId),
    type: body.type,
    consistency,
    identity,
    disks,
    whenBusy: body.whenBusy,
  };
  return engine.requestPush(request, actor, signal);
}

export function backupHandlers(engine: Engine): Pick<Handlers, Operations> {
  return {
    createBackup: async ({ body, actor, signal }) => {
      const run =
        body.source === 'push'
          ? await requestPush(engine, body, { actor, signal })
          : await requestConfigured(engine, body, actor);
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
    reportPush: async ({ params, body }) => {
      const reports = body.disks.map((report) => ({ ...report, diskId: asId<DiskId>(report.diskId) }));
      return { status: 200, body: await engine.reportPush(asId<PointId>(params.id), reports) };
    },
    completePushDisk: async ({ params, body }) => ({
      status: 200,
      body: await engine.completePushDisk(asId<PointId>(params.id), asId<DiskId>(params.diskId), body),
    }),
  };
}
