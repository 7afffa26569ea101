import type { DiscoverRequest, Engine, NewVm } from '../../engine/engine.js';
import type { VmId, VolumeId } from '../../lib/id.js';
import type { components } from '../generated.js';
import { asId, asPage, type Handlers } from '../operation.js';

type Operations = 'addVm' | 'listVms' | 'getVm' | 'removeVm' | 'discoverVms' | 'listVmDisks' | 'releaseVm';

/** The validator fills no defaults into a body that may have one of several forms. */
function asDiscoverRequest(body: components['schemas']['DiscoverRequest']): DiscoverRequest {
  return body.kind === 'libvirt'
    ? { ...body, names: body.names ?? [] }
    : { ...body, agentSocket: body.agentSocket ?? null };
}

function asNewVm({ name, disks }: components['schemas']['NewVm']): NewVm {
  return {
    name,
    disks: disks.map(({ name: diskName, source }) => ({
      name: diskName,
      source: source.kind === 'volume' ? { ...source, volumeId: asId<VolumeId>(source.volumeId) } : source,
    })),
  };
}

export function vmHandlers(engine: Engine): Pick<Handlers, Operations> {
  return {
    addVm: async ({ body, actor }) => {
      const vm = await engine.addVm(asNewVm(body), actor);
      return { status: 201, body: vm, location: `/api/v1/vms/${vm.id}` };
    },
    listVms: async ({ query }) => ({ status: 200, body: await engine.listVms(asPage(query)) }),
    getVm: async ({ params }) => ({ status: 200, body: await engine.getVm(asId<VmId>(params.id)) }),
    removeVm: async ({ params, actor }) => {
      await engine.removeVm(asId<VmId>(params.id), actor);
      return { status: 204 };
    },
    discoverVms: async ({ body, actor }) => {
      const { vms, problems } = await engine.discoverVms(asDiscoverRequest(body), actor);
      return { status: 200, body: { items: vms, problems } };
    },
    listVmDisks: async ({ params }) => ({
      status: 200,
      body: { items: await engine.listVmDisks(asId<VmId>(params.id)) },
    }),
    releaseVm: async ({ params, actor }) => ({
      status: 200,
      body: await engine.releaseVm(asId<VmId>(params.id), actor),
    }),
  };
}
