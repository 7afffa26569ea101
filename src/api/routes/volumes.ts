import type { Engine, NewVolume } from '../../engine/engine.js';
import { AppError } from '../../lib/errors.js';
import type { VolumeId } from '../../lib/id.js';
import type { components } from '../generated.js';
import { asId, asPage, type Handlers } from '../operation.js';

type Operations =
  | 'createVolume'
  | 'listVolumes'
  | 'discoverVolumes'
  | 'getVolume'
  | 'removeVolume'
  | 'getVolumeDevice'
  | 'attachVolume'
  | 'detachVolume';

function asNewVolume(body: components['schemas']['NewVolume']): NewVolume {
  if ((body.identity === null) === (body.devicePath === null)) {
    throw new AppError('INVALID_INPUT', 'give exactly one of identity and devicePath');
  }
  return body;
}

export function volumeHandlers(engine: Engine): Pick<Handlers, Operations> {
  return {
    createVolume: async ({ body, actor }) => {
      const volume = await engine.createVolume(asNewVolume(body), actor);
      return { status: 201, body: volume, location: `/api/v1/volumes/${volume.id}` };
    },
    listVolumes: async ({ query }) => ({ status: 200, body: await engine.listVolumes(asPage(query)) }),
    discoverVolumes: async () => ({ status: 200, body: { items: await engine.discoverVolumes() } }),
    getVolume: async ({ params }) => ({
      status: 200,
      body: await engine.getVolume(asId<VolumeId>(params.id)),
    }),
    removeVolume: async ({ params, actor }) => {
      await engine.removeVolume(asId<VolumeId>(params.id), actor);
      return { status: 204 };
    },
    getVolumeDevice: async ({ params }) => ({
      status: 200,
      body: await engine.getVolumeDevice(asId<VolumeId>(params.id)),
    }),
    attachVolume: async ({ params, actor }) => {
      const operation = await engine.attachVolume(asId<VolumeId>(params.id), actor);
      return { status: 202, body: operation, location: `/api/v1/operations/${operation.id}` };
    },
    detachVolume: async ({ params, actor }) => {
      const operation = await engine.detachVolume(asId<VolumeId>(params.id), actor);
      return { status: 202, body: operation, location: `/api/v1/operations/${operation.id}` };
    },
  };
}
