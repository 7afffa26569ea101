import type { Engine, ExportRequest } from '../../engine/engine.js';
import { AppError } from '../../lib/errors.js';
import type { ExportId, PointId, VolumeId } from '../../lib/id.js';
import type { components } from '../generated.js';
import { asId, asOptionalId, asPage, type Handlers } from '../operation.js';

type Operations =
  | 'createExport'
  | 'listExports'
  | 'getExport'
  | 'removeExport'
  | 'materializeExport'
  | 'getExportDaemon'
  | 'createExportIdentity'
  | 'listExportIdentities'
  | 'removeExportIdentity';

function asExportRequest(body: components['schemas']['ExportRequest']): ExportRequest {
  const { disk, isReadOnly, overlayPath } = body;
  if ((body.pointId === null) === (body.volumeId === null)) {
    throw new AppError('INVALID_INPUT', 'give exactly one of pointId and volumeId');
  }
  if (body.volumeId !== null && disk !== null) {
    throw new AppError('INVALID_INPUT', 'disk is for a point: a volume is one disk');
  }
  if (overlayPath !== null && (isReadOnly || body.pointId === null)) {
    throw new AppError('INVALID_INPUT', 'overlayPath is for a writable export of a point');
  }
  return {
    pointId: asOptionalId<PointId>(body.pointId),
    disk,
    volumeId: asOptionalId<VolumeId>(body.volumeId),
    isReadOnly,
    overlayPath,
    ttlSeconds: body.ttlSeconds,
    identity: body.identity,
  };
}

export function exportHandlers(engine: Engine): Pick<Handlers, Operations> {
  return {
    createExport: async ({ body, actor }) => {
      const made = await engine.createExport(asExportRequest(body), actor);
      return { status: 201, body: made, location: `/api/v1/exports/${made.id}` };
    },
    listExports: async ({ query }) => {
      const filter = {
        pointId: asOptionalId<PointId>(query.pointId) ?? undefined,
        volumeId: asOptionalId<VolumeId>(query.volumeId) ?? undefined,
      };
      return { status: 200, body: await engine.listExports(filter, asPage(query)) };
    },
    getExport: async ({ params }) => ({
      status: 200,
      body: await engine.getExport(asId<ExportId>(params.id)),
    }),
    removeExport: async ({ params, actor }) => {
      await engine.removeExport(asId<ExportId>(params.id), actor);
      return { status: 204 };
    },
    materializeExport: async ({ params, actor }) => {
      const operation = await engine.materializeExport(asId<ExportId>(params.id), actor);
      return { status: 202, body: operation, location: `/api/v1/operations/${operation.id}` };
    },
    getExportDaemon: async () => ({ status: 200, body: await engine.getExportDaemon() }),
    createExportIdentity: async ({ body, actor }) => ({
      status: 201,
      body: await engine.createExportIdentity(body.user, actor),
    }),
    listExportIdentities: async () => ({
      status: 200,
      body: { items: await engine.listExportIdentities() },
    }),
    removeExportIdentity: async ({ params, actor }) => {
      await engine.removeExportIdentity(params.user, actor);
      return { status: 204 };
    },
  };
}
