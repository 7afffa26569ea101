import type { AppError } from '../lib/errors.js';
import type { Consistency } from '../lib/consistency.js';
import type { CopySessionOptions } from '../nbd/index.js';
import type { DiskId, PointId, RepositoryId, RunId, VmId, VolumeId } from '../lib/id.js';

/** Where one disk is read, as the administrator configured it or discovery found it. Stored as JSON with the disk. */
export type DiskSource =
  NbdDiskSource | ImageDiskSource | VolumeDiskSource | PushDiskSource | MachineDiskSource;

/**
 * `bitmap`: a dirty bitmap is expected; when it is missing or inconsistent the next run is a full.
 * `compare`: bitmaps are not used, every run compares with the last point.
 * `auto`: a proven bitmap where one is offered, else compare.
 */
export type ChangeTracking = 'auto' | 'bitmap' | 'compare';

export interface NbdDiskSource {
  kind: 'nbd';
  uri: string;
  changeTracking: ChangeTracking;
  /** Names of files on this host, never their content. */
  tls?: { certificates?: string; pskFile?: string; username?: string };
}

export interface ImageDiskSource {
  kind: 'image';
  path: string;
  format: 'raw' | 'qcow2';
  changeTracking: ChangeTracking;
}

/** A registered block device of this host. Whoever knows the registry makes an image source of it for each use. */
export interface VolumeDiskSource {
  kind: 'volume';
  volumeId: VolumeId;
  changeTracking: ChangeTracking;
}

/** A disk that only an agent reads, which pushes it in. Nothing can be pulled from it. */
export interface PushDiskSource {
  kind: 'push';
  /** Exact, as it was stated last. */
  sizeBytes: number;
}

/** A disk of a discovered machine: read through the machine's own source, together with its other disks. */
export interface MachineDiskSource {
  kind: 'libvirt' | 'qemu';
  /** libvirt: the target device (`vda`); qemu: the id or QOM path of the guest device. */
  target: string;
  serial: string | null;
  changeTracking: ChangeTracking;
}

/** Where a machine is found whose hypervisor is asked. Stored as JSON with the VM. */
export type VmSource = LibvirtVmSource | QemuVmSource;

export interface LibvirtVmSource {
  kind: 'libvirt';
  /** Connection URI as virsh takes it, e.g. `qemu:///system` or `qemu+ssh://root@host/system`. */
  uri: string;
  /** The domain's UUID; its name may change. */
  uuid: string;
}

export interface QemuVmSource {
  kind: 'qemu';
  /** Absolute path of a QMP Unix socket of this host that nobody else uses. */
  socket: string;
  /** Of the guest agent's channel, where there is one. */
  agentSocket: string | null;
}

export type VmState = 'running' | 'paused' | 'off' | 'other';

/** What discovery found about a machine; stored as JSON with the VM. */
export interface VmFacts {
  /** False when the hypervisor does not know it any more. */
  isPresent: boolean;
  state: VmState;
  /** RFC 3339. */
  seenAt: string;
  /** Checkpoints or bitmaps at the source whose names are of Holdfast's form. */
  changeRecords: MachineRecord[];
}

/** A checkpoint (libvirt) or a persistent bitmap (qemu) at a machine. */
export interface MachineRecord {
  name: string;
  /** The point its name says it counts from. */
  pointId: PointId | null;
  isBroken: boolean;
}

export type SkipCode =
  | 'READ_ONLY'
  | 'REMOVABLE' // CD-ROM, floppy
  | 'PASSTHROUGH' // vhost-user, SCSI generic, a device no backup can read
  | 'EMPTY'
  | 'OPTED_OUT'; // the machine's own metadata says so

/** What discovery found about a disk; stored as JSON with the disk. */
export interface DiskFacts {
  /** False when the machine does not have it any more. */
  isPresent: boolean;
  target: string;
  serial: string | null;
  /** qcow2, raw, … as the hypervisor states it. */
  format: string;
  /** What stands behind it: a path or a URI without secrets. */
  location: string;
  /** Why it is left out of backups, when it is. */
  skip: { code: SkipCode; sentence: string } | null;
  /** Whether the hypervisor can keep a record of changes, and why not. */
  incremental: { isPossible: boolean; reason: string | null };
}

export interface DiscoveredDisk {
  facts: DiskFacts;
  sizeBytes: number;
  /** Identifies the disk at its source; another lineage means another disk. */
  lineage: string;
}

export interface DiscoveredVm {
  source: VmSource;
  /** The same text for the same machine wherever it is found: `libvirt:<uuid>`, `qemu:<socket>`. */
  key: string;
  name: string;
  facts: VmFacts;
  disks: DiscoveredDisk[];
}

/** A machine that is there and could not be looked at. */
export interface UnseenMachine {
  /** As of a discovered one. */
  key: string;
  error: AppError;
}

/** A bitmap the user states for one run, with the point it began at. */
export interface StatedBitmap {
  name: string;
  sincePointId: PointId;
}

/** What the source offers for telling what changed. */
export interface ChangeRecord {
  bitmap: string;
  /** A record that is there but cannot be used (`in-use` after a crash of its writer). */
  isInconsistent: boolean;
}

export interface DiskProbe {
  sizeBytes: number;
  /** Identifies the disk at its source; another lineage means another disk. */
  lineage: string;
  records: ChangeRecord[];
  /**
   * Who makes the records. `managed`: Holdfast makes one with each point, so only the record that the
   * newest point names proves anything: an older one beside a missing newer one means that the disk was
   * put back to an earlier state. `given`: somebody else does, and the name says which point it counts from.
   */
  recordKeeper: 'managed' | 'given';
  /** Why there can be no record, when that is known: goes into the reason of a compare. */
  noRecordReason: string | null;
}

/** A disk as the engine names it to a source. */
export interface SourceDisk {
  diskId: DiskId;
  name: string;
  source: DiskSource;
}

export type ConsistencyWish = 'require' | 'prefer' | 'never';

/** Something the user should read in the run's log. */
export interface SourceNote {
  level: 'info' | 'warning';
  code: string;
  message: string;
  details?: Record<string, unknown>;
}

export interface SnapshotRequest {
  vmId: VmId;
  repositoryId: RepositoryId;
  runId: RunId;
  pointId: PointId;
  disks: SnapshotDiskRequest[];
  consistency: ConsistencyWish;
  /** Records of ours that are broken and stand in the way: removed first. */
  brokenRecords: string[];
  note: (note: SourceNote) => void;
  signal: AbortSignal;
}

export interface SnapshotDiskRequest {
  disk: SourceDisk;
  probe: DiskProbe;
  /** The record to export as dirty bitmap, null for a full or a compare. */
  bitmap: string | null;
}

/** One disk of a snapshot, readable until the snapshot ends. */
export interface SnapshotDisk {
  readonly endpoint: Extract<CopySessionOptions['source'], { kind: 'nbd' }>;
  /** The metadata context that carries the changes, when a bitmap was asked for. */
  readonly dirtyContext: string | null;
  /**
   * What a later run counts from: the record begun at this instant; where none could begin, the one
   * counted from, which goes on.
   */
  readonly changeIdTo: string;
}

/** A file kept with the point under config/, mode 0600. */
export interface ConfigFile {
  name: string;
  content: Buffer;
}

/**
 * All chosen disks of a machine, held as they were at one instant. Whoever took it disposes it, in any
 * case: disposal ends what `close` did not, and removes the records begun here unless `commit` was called.
 */
export interface SourceSnapshot extends AsyncDisposable {
  readonly capturedAtMs: number;
  readonly consistency: Consistency;
  readonly disks: ReadonlyMap<DiskId, SnapshotDisk>;
  readonly configFiles: readonly ConfigFile[];
  /** Aborts, with an AppError as reason, when the snapshot cannot be relied upon or must be given up (SCRATCH_FULL). */
  readonly lost: AbortSignal;
  /**
   * Everything was read and all connections are closed: the hypervisor's job, server and scratch space go.
   * Rejects with SNAPSHOT_LOST when the snapshot had broken before, so that nothing read from it counts.
   */
  close(): Promise<void>;
  /** The point exists: its records stay, `obsolete` ones of ours are removed. What fails is noted, not thrown. */
  commit(obsolete: string[]): Promise<void>;
}

/**
 * Read side of a run over the disks of one VM. Nothing is kept open between calls. Every method rejects
 * with AppErrors: SOURCE_UNREACHABLE when the source cannot be asked (retryable), SOURCE_REFUSED when it
 * says no, SOURCE_BUSY while somebody else's backup runs there (retryable).
 */
export interface Source {
  probe(disks: readonly SourceDisk[], control: { signal: AbortSignal }): Promise<Map<DiskId, DiskProbe>>;
  snapshot(request: SnapshotRequest): Promise<SourceSnapshot>;
  /** Bytes a run would read of each disk, null where that cannot be told before. Bitmaps as in a snapshot. */
  estimate(
    disks: readonly SnapshotDiskRequest[],
    control: { signal: AbortSignal },
  ): Promise<Map<DiskId, number | null>>;
  /** Removes these records, which the caller knows to be ours. One that is gone already is no error. */
  removeRecords(names: readonly string[], control: { signal: AbortSignal }): Promise<void>;
  /**
   * Ends what a run that died left at the source: job, server, scratch space, a frozen guest, and, when its
   * point was not committed, the records it began. Finds them by run and point id, never by the VM's name.
   */
  cleanUp(
    leftover: { runId: RunId; pointId: PointId; isCommitted: boolean },
    control: { signal: AbortSignal },
  ): Promise<void>;
}

/** A source that knows whole machines. */
export interface MachineSource extends Source {
  /** As it is now. NOT_FOUND when the hypervisor does not know it any more. */
  discover(control: { signal: AbortSignal }): Promise<DiscoveredVm>;
}
