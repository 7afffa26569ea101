import type { Consistency } from '../src/lib/consistency.js';
import type { HashAlgorithm } from '../src/nbd/index.js';
import type { ApplianceId, DiskId, LayerId, PointId, RepositoryId, RunId, VmId } from '../src/lib/id.js';

export const FORMAT_VERSION = 1;

/** `<root>/holdfast.json`: the marker. A directory without it is not written to. */
export interface RepositoryMarker {
  formatVersion: number;
  repositoryId: RepositoryId;
  hash: HashAlgorithm;
  clusterBytes: number;
  /** Who may write. Changes only by an explicit takeover. */
  ownerApplianceId: ApplianceId;
  createdAt: string;
}

/** `vms/<vm-id>/vm.json` */
export interface VmRecord {
  vmId: VmId;
  name: string;
  disks: VmDiskRecord[];
}

export interface VmDiskRecord {
  diskId: DiskId;
  /** Fixed when the disk was recorded; never a position in a list. */
  number: number;
  name: string;
  sizeBytes: number;
  /** What the disk is at its source, without secrets. Change ids count only within one lineage. */
  sourceLineage: string;
}

/** Why a disk was captured the way it was: a code for programs, a sentence for people. */
export interface CaptureReason {
  code: CaptureReasonCode;
  sentence: string;
}

export type CaptureReasonCode =
  | 'REQUESTED' // full asked for
  | 'FIRST_POINT' // no point to stand on
  | 'BITMAP' // a proven bitmap counts from the parent point or an ancestor
  | 'BITMAP_MISSING'
  | 'BITMAP_INCONSISTENT'
  | 'BITMAP_UNPROVEN' // a bitmap is there, nothing proves when it began
  | 'NO_CHANGE_RECORD' // the source keeps none: compared
  | 'DISK_SHRANK'
  | 'DISK_REPLACED' // another lineage
  | 'PARENT_DAMAGED';

export type CaptureMethod = 'full' | 'bitmap' | 'compare';

export interface ManifestDisk extends VmDiskRecord {
  layerId: LayerId;
  parentLayerId: LayerId | null;
  /** The point whose layer `parentLayerId` is. */
  parentPointId: PointId | null;
  method: CaptureMethod;
  reason: CaptureReason;
  /** The change id the source was asked about; null for full and compare. */
  changeIdFrom: string | null;
  /** The change id a later record of changes counts from. */
  changeIdTo: string;
  bytesRead: number;
  bytesWritten: number;
  bytesZeroed: number;
  bytesSkipped: number;
  /** Size of the layer file when it was committed. */
  layerFileBytes: number;
  /** SHA-256 (hex) of the `.sums` file. */
  sumsSha256: string;
}

export type { Consistency };

/** `points/<point-id>.json`: written last, never changed. It exists = the point exists. */
export interface PointManifest {
  formatVersion: number;
  repositoryId: RepositoryId;
  pointId: PointId;
  vmId: VmId;
  vmName: string;
  runId: RunId;
  /** 1, 2, 3 … within the VM; orders the points whatever clocks did. */
  sequence: number;
  /** full: every disk's layer is full. */
  type: 'full' | 'incremental';
  /** The instant the disks were read at, RFC 3339. */
  capturedAt: string;
  committedAt: string;
  consistency: Consistency;
  hash: HashAlgorithm;
  /** The VM's previous manifest and the SHA-256 (hex) of its file, null for the first. */
  previous: { pointId: PointId; sha256: string } | null;
  disks: ManifestDisk[];
}

/** What the caller of a commit supplies; the repository adds the rest. */
export interface PointDraft {
  pointId: PointId;
  vmId: VmId;
  vmName: string;
  runId: RunId;
  capturedAt: string;
  consistency: Consistency;
  disks: DraftDisk[];
}

export type DraftDisk = Omit<ManifestDisk, 'layerFileBytes' | 'sumsSha256'>;

/** One layer of a chain with its files, as the manifest names it. */
export interface ChainLayer {
  layerId: LayerId;
  pointId: PointId;
  /** Exact disk size at that point. */
  sizeBytes: number;
  /** Absolute path of the QCOW2 file on this host. */
  path: string;
  sumsPath: string;
  sumsSha256: string;
}

/** Top first. Every layer was found, and each header names the next one as its backing file. */
export interface BackingChain {
  vmId: VmId;
  diskId: DiskId;
  layers: ChainLayer[];
}

export interface Capacity {
  totalBytes: number;
  freeBytes: number;
  /** Kept back for merging: 5 % and at least the largest recent increment. */
  reserveBytes: number;
  /** What a capture may use: free − reserve, not below 0. */
  availableBytes: number;
}
