import type { Engine } from '../../engine/engine.js';
import type { RestoreDisk } from '../../engine/types.js';
import { AppError } from '../../lib/errors.js';
import type { DiskId, PointId, RunId, VmId, VolumeId } from '../../lib/id.js';
import type { components } from '../generated.js';
import { asId, asOptionalId, asPage, type Handlers } from '../operation.js';

function asTarget(target: components['schemas']['TargetSpec']): RestoreDisk['target'] {
  return target.kind === 'volume' ? { ...target, volumeId: asId<VolumeId>(target.volumeId) } : target;
}

/** A restore is a run of kind restore; these routes show no other. */
export function restoreHandlers(
  engine: Engine,
): Pick<Handlers, 'createRestore' | 'createMachineRestore' | 'listRestores' | 'getRestore'> {
  return {
    createRestore: async ({ body, actor }) => {
      const request = {
        pointId: asId<PointId>(body.pointId),
        disks: body.disks.map((disk) => ({
          diskId: asId<DiskId>(disk.diskId),
          target: asTarget(disk.target),
        })),
        overwrite: body.overwrite,
        acceptDamage: body.acceptDamage,
      };
      const run = await engine.requestRestore(request, actor);
      return { status: 202, body: run, location: `/api/v1/runs/${run.id}` };
    },
    createMachineRestore: async ({ body, actor }) => {
      const { uri, name, identity, place, format, start, acceptDamage } = body;
      const machine = { kind: 'libvirt' as const, uri, name, identity, place, format, start };
      const request = { pointId: asId<PointId>(body.pointId), machine, acceptDamage };
      const run = await engine.requestMachineRestore(request, actor);
      return { status: 202, body: run, location: `/api/v1/runs/${run.id}` };
    },
    listRestores: async ({ query }) => {
      const filter = {
        kind: 'restore' as const,
        state: query.state,
        vmId: asOptionalId<VmId>(query.vmId) ?? undefined,
      };
      return { status: 200, body: await engine.listRuns(filter, asPage(query)) };
    },
    getRestore: async ({ params }) => {
      const run = await engine.getRun(asId<RunId>(params.id));
      if (run.kind !== 'restore') {
        throw new AppError('NOT_FOUND', `run ${run.id} is a ${run.kind}, not a restore`);
      }
      return { status: 200, body: run };
    },
  };
}
