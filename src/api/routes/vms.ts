import type { Engine } from '../../engine/engine.js';
import type { VmId } from '../../lib/id.js';
import { asId, asPage, type Handlers } from '../operation.js';

export function vmHandlers(engine: Engine): Pick<Handlers, 'addVm' | 'listVms' | 'getVm' | 'removeVm'> {
  return {
    addVm: async ({ body, actor }) => {
      const vm = await engine.addVm(body, actor);
      return { status: 201, body: vm, location: `/api/v1/vms/${vm.id}` };
    },
    listVms: async ({ query }) => ({ status: 200, body: await engine.listVms(asPage(query)) }),
    getVm: async ({ params }) => ({ status: 200, body: await engine.getVm(asId<VmId>(params.id)) }),
    removeVm: async ({ params, actor }) => {
      await engine.removeVm(asId<VmId>(params.id), actor);
      return { status: 204 };
    },
  };
}
