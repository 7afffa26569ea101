import type { PointId, VmId } from '../src/lib/id.js';
import type { ManifestDisk, PointManifest } from './types.js';

export interface CheckOptions {
  vmId?: VmId;
  pointId?: PointId;
  /** Read every cluster and compare it with its hash; else structure only. */
  content: boolean;
  signal?: AbortSignal | undefined;
  onProgress?: (progress: { doneBytes: number; totalBytes: number }) => void;
}

export interface CheckFinding {
  code:
    | 'MANIFEST_UNREADABLE'
    | 'LAYER_NOT_FOUND'
    | 'LAYER_CORRUPT'
    | 'CHAIN_BROKEN'
    | 'UNREFERENCED'
    | 'LEFTOVER';
  severity: 'error' | 'warning';
  message: string;
  vmId?: string;
  pointId?: string;
  diskId?: string;
  layerId?: string;
  /** Disk offset of the first bad byte range where one is known. */
  offset?: number;
  file?: string;
}

export interface CheckReport {
  vms: number;
  points: number;
  layers: number;
  bytesVerified: number;
  findings: CheckFinding[];
  /** Points that cannot be trusted because something they stand on is damaged. */
  damagedPoints: string[];
}

/** One layer to look at, with the point that committed it. */
export interface LayerTask {
  point: PointManifest;
  disk: ManifestDisk;
}
