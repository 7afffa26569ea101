import type { CaptureMethod, CaptureReason, Consistency, CheckReport } from '../../repository/index.js';
import type { ExportIdentity } from '../exports/index.js';
import type { ErrorCode } from '../lib/errors.js';
import type { DiskId, ExportId, PointId, RepositoryId, RunId, VmId, VolumeId } from '../lib/id.js';
import type { HashAlgorithm } from '../nbd/index.js';
import type { ConsistencyWish } from '../source/source.js';
import type { MachineTargetSpec, RestoredMachine } from '../target/machine-target.js';
import type { TargetSpec } from '../target/target.js';

export const RUN_KINDS = [
  'backup',
  'restore',
  'check',
  'rescan',
  'delete',
  'materialize',
  'attach-volume',
  'detach-volume',
] as const;
export type RunKind = (typeof RUN_KINDS)[number];
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
  /** Of a pushed backup, once its exports are there. */
  push: PushView | null;
}

/** What the agent of a pushed backup works with. */
export interface PushView {
  /** `<disk name>=<URI>` for each disk, with a space between; a name is percent-encoded like a part of a URI. */
  exports: string;
  hash: HashAlgorithm;
  clusterBytes: number;
  /** An agent that reports nothing for this long fails the run. */
  silenceMs: number;
  disks: PushDiskView[];
}

export interface PushDiskView {
  diskId: DiskId;
  diskName: string;
  /** As in the export's name. */
  number: number;
  exportId: ExportId;
  exportName: string;
  /** Where it is offered; the first is the one of `exports`. */
  uris: string[];
  /** Exact. The export may be up to 511 bytes larger: whole sectors. */
  sizeBytes: number;
  method: 'full' | 'bitmap';
  reason: CaptureReason;
  /** The record whose changes are to be written; null for a full. */
  changeIdFrom: string | null;
  /**
   * Exact size of the disk at the point that the layer stands on; null for a full. Where the disk is larger now, all of
   * it from the cluster on that this size ends in is to be written as if it had changed: no record knows of it.
   */
  parentSizeBytes: number | null;
  isCompleted: boolean;
  /** As the agent completed it. */
  changeIdTo: string | null;
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
  | { kind: 'delete' }
  | {
      /** The run's kind is `backup`. */
      kind: 'push';
      type: BackupType;
      consistency: Consistency;
      identity: ExportIdentity | null;
      disks: PushDiskRequest[];
    }
  | { kind: 'materialize'; exportId: ExportId }
  | { kind: 'attach-volume' | 'detach-volume'; volumeId: VolumeId };

/** A disk of a pushed backup as its agent describes it. */
export interface PushDiskRequest {
  diskId: DiskId;
  /** Exact; null: as recorded. */
  sizeBytes: number | null;
  /**
   * What tells this disk from another that takes its place. Null: as it is recorded; of a disk that Holdfast reads
   * itself, one of its own, for the change records of the one say nothing of the other.
   */
  lineage: string | null;
  /** The change ids the agent can count from; null: the agent is believed to have the last one. */
  changeIds: string[] | null;
}

export type RunResult =
  | { kind: 'backup'; pointId: PointId }
  | {
      kind: 'restore';
      disks: { diskId: DiskId; target: RestoreTargetSpec; bytesWritten: number; damagedBytes: number }[];
      machine: RestoredMachine | null;
    }
  | { kind: 'check'; report: CheckReport }
  | { kind: 'rescan'; vms: number; points: number }
  | { kind: 'delete'; freedBytes: number }
  | { kind: 'materialize'; exportId: ExportId; imagePath: string; fileBytes: number }
  | { kind: 'attach-volume'; volumeId: VolumeId; devicePath: string }
  | { kind: 'detach-volume'; volumeId: VolumeId };

/** Where one disk of a restore goes; a volume must be attached. */
export type RestoreTargetSpec = TargetSpec | { kind: 'volume'; volumeId: VolumeId };

export interface RestoreDisk {
  diskId: DiskId;
  target: RestoreTargetSpec;
}

/**
 * Which disks of a VM, by id, name, target or serial. An empty `include` means all that discovery did not
 * leave out; a disk named there is taken although the machine's metadata opts it out.
 */
export interface DiskChoice {
  include: string[];
  exclude: string[];
}

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
