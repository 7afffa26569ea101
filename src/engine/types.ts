import type {
  CaptureMethod,
  CaptureReason,
  Capacity,
  Consistency,
  CheckReport,
} from '../../repository/index.js';
import type { ErrorCode } from '../lib/errors.js';
import type { DiskId, LayerId, PointId, RepositoryId, RunId, TokenId, VmId } from '../lib/id.js';
import type { HashAlgorithm } from '../nbd/index.js';
import type {
  ConsistencyWish,
  DiskFacts,
  DiskSource,
  MachineRecord,
  SkipCode,
  VmSource,
  VmState,
} from '../source/source.js';
import type { MachineTargetSpec, RestoredMachine } from '../target/machine-target.js';
import type { TargetSpec } from '../target/target.js';

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

export type RunKind = 'backup' | 'restore' | 'check' | 'rescan' | 'delete';
export type RunState = 'queued' | 'running' | 'completed' | 'failed' | 'cancelled' | 'interrupted';
export type RunStage = 'discover' | 'snapshot' | 'transfer' | 'finalize' | 'verify';
export const ENDED_STATES: readonly RunState[] = ['completed', 'failed', 'cancelled', 'interrupted'];

/** The machine-readable reason a run ended badly, with the fix. */
export interface RunError {
  code: ErrorCode;
  message: string;
  remedy: string;
  details: Record<string, unknown>;
}

export interface RunDiskProgress {
  diskId: DiskId;
  /** Bytes of the plan: what has to be looked at. Grows while a plan is streamed. */
  totalBytes: number;
  bytesRead: number;
  bytesWritten: number;
  bytesZeroed: number;
  bytesSkipped: number;
  method: CaptureMethod | null;
  reason: CaptureReason | null;
}

export interface RunProgress {
  /** 0…1 of the current stage, null when unknown. */
  share: number | null;
  bytesPerSecond: number;
  etaSeconds: number | null;
  disks: RunDiskProgress[];
}

export interface RunView {
  id: RunId;
  kind: RunKind;
  state: RunState;
  stage: RunStage | null;
  vmId: VmId | null;
  repositoryId: RepositoryId | null;
  /** The point a backup will make or made, a restore reads, a delete removes. */
  pointId: PointId | null;
  attempt: number;
  createdAt: string;
  startedAt: string | null;
  endedAt: string | null;
  /** Set while running: no progress for 60 s. */
  isStalled: boolean;
  isCancelRequested: boolean;
  progress: RunProgress;
  error: RunError | null;
  request: RunRequest;
  result: RunResult | null;
}

export type RunRequest =
  | {
      kind: 'backup';
      type: BackupType;
      bitmaps: { diskId: DiskId; name: string; sincePointId: PointId }[];
      bytesPerSecond: number;
      consistency: ConsistencyWish;
      disks: DiskChoice;
    }
  | {
      kind: 'restore';
      disks: RestoreDisk[];
      overwrite: boolean;
      acceptDamage: boolean;
      /** The whole machine; its disks' places are decided when the run starts. */
      machine: MachineTargetSpec | null;
    }
  | { kind: 'check'; content: boolean; pointId: PointId | null; vmId: VmId | null }
  | { kind: 'rescan' }
  | { kind: 'delete' };

export type RunResult =
  | { kind: 'backup'; pointId: PointId }
  | {
      kind: 'restore';
      disks: { diskId: DiskId; target: TargetSpec; bytesWritten: number; damagedBytes: number }[];
      machine: RestoredMachine | null;
    }
  | { kind: 'check'; report: CheckReport }
  | { kind: 'rescan'; vms: number; points: number }
  | { kind: 'delete'; freedBytes: number };

export interface RestoreDisk {
  diskId: DiskId;
  target: TargetSpec;
}

/**
 * Which disks of a VM, by id, name, target or serial. An empty `include` means all that discovery did not
 * leave out; a disk named there is taken although the machine's metadata opts it out.
 */
export interface DiskChoice {
  include: string[];
  exclude: string[];
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

export type BackupType = 'full' | 'incremental' | 'auto';

/** The user-visible log of a run: data, not the daemon's log. */
export interface RunEvent {
  /** Ascending within the run. */
  sequence: number;
  at: string;
  level: 'info' | 'warning' | 'error';
  code: string;
  message: string;
  details: Record<string, unknown>;
}

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
