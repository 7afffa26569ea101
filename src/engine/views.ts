import path from 'node:path';
import type { BackingChain, PointManifest } from '../../repository/index.js';
import type { DiskRow, LayerRow, PointRow, RunRow, VmRow } from '../db/database.js';
import { AppError, toAppError, type ErrorCode } from '../lib/errors.js';
import { parseDiskSource, parseVmSource } from '../source/disk-source.js';
import type { DiskFacts, VmFacts } from '../source/source.js';
import type {
  BackupView,
  ChainView,
  DiskView,
  LayerView,
  MachineView,
  RunError,
  RunKind,
  RunProgress,
  RunRequest,
  RunResult,
  RunStage,
  RunState,
  RunView,
  VmView,
} from './types.js';

export const NO_PROGRESS: RunProgress = {
  share: null,
  bytesPerSecond: 0,
  etaSeconds: null,
  disks: [],
  push: null,
};

/** What runs had before these fields were there, by kind. */
const OLDER_REQUESTS: Record<string, Partial<RunRequest>> = {
  backup: { consistency: 'prefer', disks: { include: [], exclude: [] } },
  restore: { machine: null },
};
const OLDER_RESULTS: Record<string, Partial<RunResult>> = { restore: { machine: null } };

export function toRunError(error: unknown): RunError {
  const { code, message, remedy, details } = toAppError(error);
  return { code, message, remedy, details };
}

/** A stored run error as an AppError again, for results that are raised later. */
export function fromRunError(error: RunError): AppError {
  return new AppError(error.code satisfies ErrorCode, error.message, { details: error.details });
}

/** The JSON columns were written by this engine; their shape is the code's own. */
export function toRunView(row: RunRow, facts: { nowMs: number; stalledAfterMs: number }): RunView {
  const isRunning = row.state === 'running';
  const progressMs = row.progressAt === null ? null : Date.parse(row.progressAt);
  return {
    id: row.id,
    kind: row.kind as RunKind,
    state: row.state as RunState,
    stage: row.stage as RunStage | null,
    vmId: row.vmId,
    repositoryId: row.repositoryId,
    pointId: row.pointId,
    attempt: row.attempt,
    createdAt: row.createdAt,
    startedAt: row.startedAt,
    endedAt: row.endedAt,
    isStalled: isRunning && progressMs !== null && facts.nowMs - progressMs > facts.stalledAfterMs,
    isCancelRequested: row.cancelRequested,
    progress: { ...NO_PROGRESS, ...(row.progress as RunProgress | null) },
    error: row.error as RunError | null,
    request: { ...OLDER_REQUESTS[row.kind], ...(row.request as RunRequest) },
    result: row.result === null ? null : { ...OLDER_RESULTS[row.kind], ...(row.result as RunResult) },
  };
}

export function toDiskView(row: DiskRow): DiskView {
  return {
    id: row.id,
    vmId: row.vmId,
    number: row.number,
    name: row.name,
    sizeBytes: row.sizeBytes,
    source: row.source === null ? null : parseDiskSource(row.source),
    facts: row.facts as DiskFacts | null,
  };
}

export function toVmView(row: VmRow): VmView {
  return {
    id: row.id,
    name: row.name,
    createdAt: row.createdAt,
    machine: toMachineView(row),
    disks: row.disks.map(toDiskView),
  };
}

/** Source and facts are written together. */
function toMachineView(row: VmRow): MachineView | null {
  const source = parseVmSource(row.source);
  return source === null ? null : { source, ...(row.facts as VmFacts) };
}

export function toBackupView(row: PointRow): BackupView {
  return {
    id: row.id,
    vmId: row.vmId,
    vmName: row.manifest.vmName,
    repositoryId: row.repositoryId,
    runId: row.runId,
    sequence: row.sequence,
    type: row.type,
    consistency: row.manifest.consistency,
    capturedAt: row.capturedAt,
    committedAt: row.committedAt,
    fileBytes: row.fileBytes,
    layers: row.manifest.disks.map(toLayerView),
  };
}

function toLayerView(disk: PointManifest['disks'][number]): LayerView {
  return {
    id: disk.layerId,
    diskId: disk.diskId,
    diskName: disk.name,
    parentLayerId: disk.parentLayerId,
    sizeBytes: disk.sizeBytes,
    fileBytes: disk.layerFileBytes,
    method: disk.method,
    reason: disk.reason,
    changeIdFrom: disk.changeIdFrom,
    changeIdTo: disk.changeIdTo,
    bytesRead: disk.bytesRead,
    bytesWritten: disk.bytesWritten,
    bytesZeroed: disk.bytesZeroed,
  };
}

/** `points` must hold every point the chain stands on. */
export function toChainView(
  disk: PointManifest['disks'][number],
  chain: BackingChain,
  points: readonly PointManifest[],
): ChainView {
  const facts = new Map(
    points.flatMap((point) => point.disks.map((entry) => [entry.layerId, entry] as const)),
  );
  return {
    diskId: disk.diskId,
    diskName: disk.name,
    layers: chain.layers.map((layer) => {
      const entry = facts.get(layer.layerId);
      if (entry === undefined) {
        throw new AppError('CHAIN_BROKEN', `no manifest names layer ${layer.layerId}`);
      }
      return {
        layerId: layer.layerId,
        pointId: layer.pointId,
        path: path.resolve(layer.path),
        sizeBytes: layer.sizeBytes,
        fileBytes: entry.layerFileBytes,
        method: entry.method,
      };
    }),
  };
}

/** Index rows of a manifest: what a commit and a rescan put into the database. */
export function toIndexRows(manifest: PointManifest): { point: PointRow; layers: LayerRow[] } {
  return {
    point: {
      id: manifest.pointId,
      vmId: manifest.vmId,
      repositoryId: manifest.repositoryId,
      runId: manifest.runId,
      sequence: manifest.sequence,
      type: manifest.type,
      capturedAt: manifest.capturedAt,
      committedAt: manifest.committedAt,
      fileBytes: manifest.disks.reduce((sum, disk) => sum + disk.layerFileBytes, 0),
      manifest,
    },
    layers: manifest.disks.map((disk) => ({
      id: disk.layerId,
      pointId: manifest.pointId,
      repositoryId: manifest.repositoryId,
      diskId: disk.diskId,
      parentLayerId: disk.parentLayerId,
    })),
  };
}
