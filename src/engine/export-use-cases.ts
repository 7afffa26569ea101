import { mkdir } from 'node:fs/promises';
import path from 'node:path';
import type { ManifestDisk, PointManifest } from '../../repository/index.js';
import type { ExportRow } from '../db/database.js';
import { makeBackupExportName } from '../exports/index.js';
import { toTimestamp } from '../lib/clock.js';
import { AppError } from '../lib/errors.js';
import { newUlid, type DiskId, type ExportId, type PointId, type RunId } from '../lib/id.js';
import { asTargetError, requireAllowed, requireFree } from '../target/file-target.js';
import { audit } from './audit.js';
import { requirePoint } from './backup-use-cases.js';
import type { EngineContext } from './context.js';
import type { Actor, Engine, ExportRequest } from './engine.js';
import { createIdentityUseCases } from './export-identities.js';
import { activeRunOf } from './export-record.js';
import { publishExport, unpublishExport, type ExportSpec } from './export-publisher.js';
import { lookAtDaemon } from './export-serving.js';
import { toExportView } from './export-view.js';
import { requireMaterializable } from './materialize.js';
import { toOperationView } from './operation-use-cases.js';
import { forbiddenTargets } from './restore-machine.js';
import { startRun } from './run-use-cases.js';
import type { OperationView } from './types.js';
import { toRunError } from './views.js';
import { volumeExportSpec } from './volume-export.js';

type ExportUseCases = Pick<
  Engine,
  | 'createExport'
  | 'listExports'
  | 'getExport'
  | 'removeExport'
  | 'materializeExport'
  | 'getExportDaemon'
  | 'createExportIdentity'
  | 'listExportIdentities'
  | 'removeExportIdentity'
>;

export function createExportUseCases(context: EngineContext): ExportUseCases {
  const { db } = context;
  return {
    async createExport(input, actor) {
      const { row } = await publishExport(context, await specOf(context, input));
      await audit(context, actor, { action: 'export.create', subject: row.id, details: { request: input } });
      return toExportView(context, row, await lookAtDaemon(context));
    },
    async listExports(filter, page) {
      const { rows, nextCursor } = await db.exports.list(filter, page);
      const daemon = await lookAtDaemon(context);
      return { items: rows.map((row) => toExportView(context, row, daemon)), nextCursor };
    },
    async getExport(id) {
      return toExportView(context, await requireExport(context, id), await lookAtDaemon(context));
    },
    async removeExport(id, actor) {
      const row = await requireExport(context, id);
      const runId = await activeRunOf(context, row);
      if (runId !== null) {
        throw new AppError('CONFLICT', 'a run uses the export; cancel that', { details: { runId } });
      }
      await unpublishExport(context, id);
      await audit(context, actor, { action: 'export.remove', subject: id, details: { name: row.name } });
    },
    async materializeExport(id, actor) {
      return requestMaterialize(context, await requireExport(context, id), actor);
    },
    async getExportDaemon() {
      const { status, problem } = await lookAtDaemon(context);
      return {
        isRunning: problem === null,
        status,
        problem: problem === null ? null : toRunError(problem),
      };
    },
    ...createIdentityUseCases(context),
  };
}

async function requireExport(context: EngineContext, id: ExportId): Promise<ExportRow> {
  const row = await context.db.exports.get(id);
  if (row === null) throw new AppError('NOT_FOUND', `there is no export ${id}`);
  return row;
}

async function specOf(context: EngineContext, input: ExportRequest): Promise<ExportSpec> {
  const { pointId, volumeId, isReadOnly, identity } = input;
  if (pointId !== null && volumeId === null) return pointSpec(context, pointId, input);
  if (volumeId !== null && pointId === null) {
    return volumeExportSpec(context, { volumeId, isReadOnly, identity, expiresAt: expiryOf(context, input) });
  }
  throw new AppError('INVALID_INPUT', 'either a point or a volume must be named', {
    details: { field: 'pointId' },
  });
}

async function pointSpec(
  context: EngineContext,
  pointId: PointId,
  input: ExportRequest,
): Promise<ExportSpec> {
  const { repositoryId, vmId } = await requirePoint(context, pointId);
  const repository = await context.repositories.open(repositoryId);
  const point = await repository.readPoint(vmId, pointId);
  const disk = chooseDisk(point, input.disk);
  const { layers } = await repository.openChain(point, disk.diskId);
  const layerPath = layers[0]?.path;
  if (layerPath === undefined) throw new AppError('INTERNAL', `disk ${disk.diskId} has no layer`);
  const overlay = input.isReadOnly ? null : await planOverlay(context, input.overlayPath);
  return {
    kind: 'point',
    ...{ pointId, diskId: disk.diskId, runId: null, volumeId: null, layerId: disk.layerId },
    name: makeBackupExportName({
      vmName: point.vmName,
      diskNumber: disk.number,
      type: disk.parentLayerId === null ? 'full' : 'incr',
      createdAtMs: Date.parse(point.capturedAt),
      layerId: overlay?.id ?? disk.layerId,
    }),
    imagePath: path.resolve(overlay?.path ?? layerPath),
    format: 'qcow2',
    isReadOnly: input.isReadOnly,
    sizeBytes: disk.sizeBytes,
    description: `${point.vmName}, disk ${disk.name}, ${point.capturedAt}`,
    identity: input.identity,
    expiresAt: expiryOf(context, input),
    overlay: overlay === null ? null : { backingPath: path.resolve(layerPath) },
    confirm: () => requireNoDelete(context, pointId),
  };
}

function chooseDisk(point: PointManifest, wanted: string | null): ManifestDisk {
  const [only, ...others] = point.disks;
  const disk =
    wanted === null
      ? others.length === 0
        ? only
        : undefined
      : (point.disks.find(({ diskId }) => diskId === (wanted as DiskId)) ??
        point.disks.find(({ name }) => name === wanted));
  if (disk !== undefined) return disk;
  const names = point.disks.map(({ name }) => name).join(', ');
  throw new AppError(
    'INVALID_INPUT',
    wanted === null ? `name one of the disks: ${names}` : `the point has no disk ${wanted}, only ${names}`,
    { details: { field: 'disk' } },
  );
}

async function planOverlay(
  context: EngineContext,
  wanted: string | null,
): Promise<{ id: string; path: string }> {
  const id = newUlid(context.clock.nowMs());
  const { directory, overlayDirectory } = context.settings.exports;
  if (wanted === null) {
    await asTargetError(mkdir(overlayDirectory, { recursive: true, mode: 0o700 }));
    return { id, path: path.join(overlayDirectory, `${id}.qcow2`) };
  }
  await requireAllowed(wanted, [...(await forbiddenTargets(context)), directory]);
  await requireFree(wanted, false);
  return { id, path: wanted };
}

function expiryOf(context: EngineContext, { ttlSeconds }: ExportRequest): string | null {
  const seconds = ttlSeconds ?? context.settings.exports.defaultTtlSeconds;
  return seconds === 0 ? null : toTimestamp(context.clock.nowMs() + seconds * 1000);
}

/** Of a delete and an export that begin together at least one sees the other, because each writes its row first. */
async function requireNoDelete(context: EngineContext, pointId: PointId): Promise<void> {
  const active = await context.db.runs.countActiveForPoint(pointId);
  const runs = await Promise.all(active.map((id) => context.db.runs.get(id)));
  const runIds = runs.flatMap((run): RunId[] =>
    run?.kind === 'delete' && run.state === 'running' ? [run.id] : [],
  );
  if (runIds.length > 0)
    throw new AppError('POINT_IN_USE', 'the point is being deleted', { details: { runIds } });
}

async function requestMaterialize(
  context: EngineContext,
  row: ExportRow,
  actor: Actor,
): Promise<OperationView> {
  await requireMaterializable(context, row, null);
  const point = row.pointId === null ? null : await context.db.points.get(row.pointId);
  const run = await startRun(
    context,
    {
      kind: 'materialize',
      ...{ repositoryId: point?.repositoryId ?? null, vmId: point?.vmId ?? null, pointId: row.pointId },
      request: { kind: 'materialize', exportId: row.id },
      turn: 'none',
    },
    actor,
  );
  return toOperationView(run);
}
