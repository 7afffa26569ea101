import type { CaptureMethod, CaptureReason, Capacity, Consistency } from '../../repository/index.js';
import type { ExportIdentity, ExportStatus } from '../exports/index.js';
import type {
  DiskId,
  ExportId,
  LayerId,
  PointId,
  RepositoryId,
  RunId,
  TokenId,
  VmId,
  VolumeId,
} from '../lib/id.js';
import type { HashAlgorithm } from '../nbd/index.js';
import type { DiskFacts, DiskSource, MachineRecord, SkipCode, VmSource, VmState } from '../source/source.js';
import type { RunError, RunState, RunResult } from './run-types.js';

export * from './run-types.js';

/** One page of a list; `nextCursor` is null on the last. Cursors are opaque. */
export interface Page<T> {
  items: T[];
  nextCursor: string | null;
}

export interface PageRequest {
  limit: number;
  cursor: string | null;
}

export interface RepositoryView {
  id: RepositoryId;
  name: string;
  root: string;
  hash: HashAlgorithm;
  createdAt: string;
  /** Whether the marker could be read just now, and the capacity then. */
  isOnline: boolean;
  capacity: Capacity | null;
  /** Why it is not usable, when it is not. */
  problem: RunError | null;
}

export interface DiskView {
  id: DiskId;
  vmId: VmId;
  /** Fixed when the disk was recorded. */
  number: number;
  name: string;
  sizeBytes: number;
  /** Null for a disk known only from a repository: it can be restored, not backed up. */
  source: DiskSource | null;
  /** What discovery found; null for a disk that was recorded by hand. */
  facts: DiskFacts | null;
}

export interface VmView {
  id: VmId;
  name: string;
  createdAt: string;
  /** The machine at its hypervisor; null where the disks stand for themselves. */
  machine: MachineView | null;
  disks: DiskView[];
}

/** A machine as its hypervisor showed it last. */
export interface MachineView {
  source: VmSource;
  /** False when the hypervisor does not know it any more. */
  isPresent: boolean;
  state: VmState;
  seenAt: string;
  /** Checkpoints or bitmaps of Holdfast's form at the source; `holdfast vm release` removes ours. */
  changeRecords: MachineRecord[];
}

/** What a backup would do with a disk, before anything is done. */
export interface DiskEstimate {
  diskId: DiskId;
  diskName: string;
  sizeBytes: number;
  /** Null for a disk that would be left out. */
  method: CaptureMethod | null;
  reason: { code: CaptureReason['code'] | SkipReasonCode; sentence: string };
  /** What would be read at the source, null where nobody can tell before. */
  bytes: number | null;
}

export interface BackupEstimate {
  vmId: VmId;
  repositoryId: RepositoryId;
  disks: DiskEstimate[];
  /** Null when it is not known of every disk. */
  totalBytes: number | null;
}

/** Why a disk is not part of a run. */
export type SkipReasonCode = SkipCode | 'EXCLUDED' | 'NOT_INCLUDED' | 'ABSENT';

export interface LayerView {
  id: LayerId;
  diskId: DiskId;
  diskName: string;
  parentLayerId: LayerId | null;
  sizeBytes: number;
  fileBytes: number;
  method: CaptureMethod;
  reason: CaptureReason;
  changeIdFrom: string | null;
  changeIdTo: string;
  bytesRead: number;
  bytesWritten: number;
  bytesZeroed: number;
}

/** A recovery point as an index entry. */
export interface BackupView {
  id: PointId;
  vmId: VmId;
  vmName: string;
  repositoryId: RepositoryId;
  runId: RunId;
  sequence: number;
  type: 'full' | 'incremental';
  consistency: Consistency;
  capturedAt: string;
  committedAt: string;
  /** Bytes all layer files of this point take. */
  fileBytes: number;
  layers: LayerView[];
}

/** One disk's chain, top first, with the file paths stock qemu opens. */
export interface ChainView {
  diskId: DiskId;
  diskName: string;
  layers: {
    layerId: LayerId;
    pointId: PointId;
    path: string;
    sizeBytes: number;
    fileBytes: number;
    method: CaptureMethod;
  }[];
}

export interface BackupStats {
  points: number;
  fullPoints: number;
  incrementalPoints: number;
  vms: number;
  fileBytes: number;
  oldestCapturedAt: string | null;
  newestCapturedAt: string | null;
}

export interface TokenView {
  id: TokenId;
  name: string;
  createdAt: string;
  lastUsedAt: string | null;
}

export interface ComponentHealth {
  name: 'database' | 'queue' | 'repositories';
  isHealthy: boolean;
  message: string;
}

export interface DoctorFinding {
  name: string;
  isOk: boolean;
  /** Whether Holdfast works without it. */
  isRequired: boolean;
  found: string;
  remedy: string | null;
}

/** A point's disk, a volume or a layer under capture, published over NBD. */
export interface ExportView {
  id: ExportId;
  name: string;
  kind: 'point' | 'volume' | 'push';
  state: 'publishing' | 'published' | 'removing';
  pointId: PointId | null;
  diskId: DiskId | null;
  runId: RunId | null;
  volumeId: VolumeId | null;
  isReadOnly: boolean;
  /** What clients see: whole sectors. Null while it is not known. */
  sizeBytes: number | null;
  /** Where it is offered now; empty while the export daemon does not serve it. */
  uris: string[];
  identity: ExportIdentity | null;
  /** What is served: a layer, a device, or the throw-away overlay of a writable one. */
  imagePath: string;
  createdAt: string;
  expiresAt: string | null;
  /** Of a writable one that is, or was, made independent of its point. */
  materialization: { state: 'running' | 'completed' | 'failed'; runId: RunId } | null;
  /** Why it is not served now, when it is not. */
  problem: RunError | null;
}

/** The export daemon as it shows itself. */
export interface ExportDaemonView {
  isRunning: boolean;
  /** Its own words; null when it never ran or ended properly. */
  status: ExportStatus | null;
  problem: RunError | null;
}

/** Something asked of a volume or an export that takes a while; a run, seen from what it is about. */
export interface OperationView {
  /** Of the run. */
  id: RunId;
  kind: 'materialize' | 'attach-volume' | 'detach-volume';
  state: RunState;
  /** Of the export or the volume. */
  subjectId: ExportId | VolumeId;
  createdAt: string;
  endedAt: string | null;
  /** 0…1, null when unknown. */
  share: number | null;
  error: RunError | null;
  result: RunResult | null;
}

/** A block device under a stable identity. */
export interface VolumeView {
  id: VolumeId;
  name: string;
  provider: 'host';
  /** `<kind>:<value>`, e.g. `wwn:0x5000…`, `fs-uuid:…`. */
  identity: string;
  sizeBytes: number;
  createdAt: string;
  /** Set while it is attached; checked when the volume is shown. */
  mapping: { devicePath: string; deviceNumber: string; attachedAt: string; verifiedAt: string } | null;
  /** Where it was found just now, also while it is not attached; null when it is not there. */
  devicePath: string | null;
  /** VOLUME_GONE, VOLUME_MISMATCH, or what kept from looking. */
  problem: RunError | null;
}

/** A block device of this host that could be registered. */
export interface FoundDeviceView {
  devicePath: string;
  deviceNumber: string;
  type: string;
  sizeBytes: number;
  model: string | null;
  /** Best first; empty when nothing tells the device from another. */
  identities: string[];
  /** Why it cannot be attached now (mounted, held …). */
  inUseBy: string[];
  /** The volume that has one of these identities. */
  volumeId: VolumeId | null;
}
