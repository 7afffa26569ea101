import { AppError } from '../src/lib/errors.js';
import { isUlid, type DiskId, type LayerId, type PointId, type RunId, type VmId } from '../src/lib/id.js';

export const MARKER_FILE = 'holdfast.json';
export const GUIDE_FILE = 'RESTORE.md';
export const VMS_DIRECTORY = 'vms';
export const RUNS_DIRECTORY = 'runs';
export const LOCKS_DIRECTORY = 'locks';
export const TRASH_DIRECTORY = 'trash';
export const PARTIAL_PREFIX = '.partial-';

/** An id as a part of a path. Ids from outside become paths only through here. */
function part(id: string): string {
  if (!isUlid(id))
    throw new AppError('INVALID_INPUT', 'an id is not a ULID', { details: { id: id.slice(0, 64) } });
  return id;
}

export const vmDirectory = (vmId: VmId): string => `${VMS_DIRECTORY}/${part(vmId)}`;
export const vmRecordFile = (vmId: VmId): string => `${vmDirectory(vmId)}/vm.json`;

export const pointsDirectory = (vmId: VmId): string => `${vmDirectory(vmId)}/points`;
export const manifestFile = (vmId: VmId, pointId: PointId): string =>
  `${pointsDirectory(vmId)}/${part(pointId)}.json`;
export const stateFile = (vmId: VmId, pointId: PointId): string =>
  `${pointsDirectory(vmId)}/${part(pointId)}.state.json`;

export const recordsDirectory = (vmId: VmId): string => `${vmDirectory(vmId)}/merges`;
export const recordFile = (vmId: VmId, recordId: string): string =>
  `${recordsDirectory(vmId)}/${part(recordId)}.json`;

export const configRoot = (vmId: VmId): string => `${vmDirectory(vmId)}/config`;
export const configDirectory = (vmId: VmId, pointId: PointId): string =>
  `${configRoot(vmId)}/${part(pointId)}`;

export const layersDirectory = (vmId: VmId): string => `${vmDirectory(vmId)}/layers`;
export const diskDirectory = (vmId: VmId, diskId: DiskId): string =>
  `${layersDirectory(vmId)}/${part(diskId)}`;

/** The name other layers give as their backing file: in the same directory, so relative and short. */
export const layerName = (layerId: LayerId): string => `${part(layerId)}.qcow2`;
export const sumsName = (layerId: LayerId): string => `${part(layerId)}.sums`;
export const partialLayerName = (runId: RunId, layerId: LayerId): string =>
  `${PARTIAL_PREFIX}${part(runId)}-${layerName(layerId)}`;
export const partialSumsName = (runId: RunId, layerId: LayerId): string =>
  `${PARTIAL_PREFIX}${part(runId)}-${sumsName(layerId)}`;

/** Lease files of one resource: `locks/<name>/<token>.json`. */
export const leaseDirectory = (name: string): string => `${LOCKS_DIRECTORY}/${name}`;

/** `trash/YYYY-MM-DD`, UTC. */
export const trashDirectory = (nowMs: number): string =>
  `${TRASH_DIRECTORY}/${new Date(nowMs).toISOString().slice(0, 10)}`;

const PARTIAL_PATTERN = /^\.partial-([0-9A-Z]{26})-([0-9A-Z]{26})\.(qcow2|sums)$/;

/** The run and layer a partial file's name carries, or undefined for another name. */
export function parsePartialName(name: string): { runId: RunId; layerId: LayerId } | undefined {
  const match = PARTIAL_PATTERN.exec(name);
  if (match === null) return undefined;
  const [, runId = '', layerId = ''] = match;
  return isUlid(runId) && isUlid(layerId)
    ? { runId: runId as RunId, layerId: layerId as LayerId }
    : undefined;
}

/** The layer a committed file belongs to, or undefined for another name. */
export function parseLayerName(name: string, suffix: '.qcow2' | '.sums'): LayerId | undefined {
  const id = name.slice(0, -suffix.length);
  return name.endsWith(suffix) && isUlid(id) ? (id as LayerId) : undefined;
}

/** The point a manifest's file name carries, or undefined for another name (`.state.json` too). */
export function parseManifestName(name: string): PointId | undefined {
  const id = name.slice(0, -'.json'.length);
  return name.endsWith('.json') && isUlid(id) ? (id as PointId) : undefined;
}
