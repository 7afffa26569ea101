import type { Consistency } from '../lib/consistency.js';
import type { ExportIdentity } from '../exports/index.js';
import type { DiskId, ExportId, PointId, RepositoryId, RunId, TokenId, VmId, VolumeId } from '../lib/id.js';
import type { HashAlgorithm } from '../nbd/index.js';
import type { DiscoveryPlace } from '../source/open-source.js';
import type { ConsistencyWish, DiskSource } from '../source/source.js';
import type { MachineTargetSpec } from '../target/machine-target.js';
import type {
  BackupEstimate,
  BackupStats,
  BackupType,
  BackupView,
  ChainView,
  ComponentHealth,
  DiskChoice,
  DiskView,
  DoctorFinding,
  ExportDaemonView,
  ExportView,
  FoundDeviceView,
  OperationView,
  Page,
  PageRequest,
  PushDiskView,
  RepositoryView,
  RestoreDisk,
  RunError,
  RunEvent,
  RunKind,
  RunState,
  RunView,
  TokenView,
  VmView,
  VolumeView,
} from './types.js';

/** Who asks, for the audit log. */
export interface Actor {
  tokenId: TokenId;
  tokenName: string;
}

export interface NewRepository {
  name: string;
  /** Absolute path. */
  root: string;
  hash: HashAlgorithm;
  /** create: an empty or absent directory becomes a repository; open: an existing one is added, and rescanned. */
  mode: 'create' | 'open';
  /** With open: take it over from another appliance. */
  takeover: boolean;
}

export interface NewVm {
  name: string;
  disks: { name: string; source: DiskSource }[];
}

export interface BackupRequest {
  vmId: VmId;
  repositoryId: RepositoryId;
  type: BackupType;
  /** Bitmaps the user vouches for. */
  bitmaps: { diskId: DiskId; name: string; sincePointId: PointId }[];
  /** Source read limit, 0 for none. */
  bytesPerSecond: number;
  consistency: ConsistencyWish;
  disks: DiskChoice;
  /** When another run of this VM and repository is active: refuse (RUN_ACTIVE), or wait in the queue. */
  whenBusy: 'refuse' | 'queue';
}

export type DiscoverRequest = DiscoveryPlace;

export interface DiscoverResult {
  vms: VmView[];
  /** Machines that are there and could not be looked at; what is known of them stays as it was. */
  problems: { key: string; error: RunError }[];
}

export interface MachineRestoreRequest {
  pointId: PointId;
  machine: MachineTargetSpec;
  acceptDamage: boolean;
}

export interface RestoreRequest {
  pointId: PointId;
  /** Empty is refused; list every disk wanted. */
  disks: RestoreDisk[];
  overwrite: boolean;
  /** Write what is there although hashes disagree; the damage is counted in the result. */
  acceptDamage: boolean;
}

/** The disks a remote agent pushes in. */
export interface PushRequest {
  vmId: VmId;
  repositoryId: RepositoryId;
  type: BackupType;
  /** What the agent promises of the instant it reads. */
  consistency: Consistency;
  /** Whom the exports are for; null: everybody who reaches the export daemon. */
  identity: ExportIdentity | null;
  /** Id or name of each disk; empty: all that are recorded. */
  disks: { disk: string; sizeBytes: number | null; lineage: string | null; changeIds: string[] | null }[];
  whenBusy: 'refuse' | 'queue';
}

/** Bytes of one disk so far, as the agent counts them. */
export interface PushReport {
  diskId: DiskId;
  totalBytes: number;
  bytesRead: number;
  bytesWritten: number;
  bytesZeroed: number;
  bytesSkipped: number;
}

export interface PushCompletion extends Omit<PushReport, 'diskId' | 'totalBytes'> {
  /** What a later push counts from. */
  changeId: string;
  /**
   * SHA-256, in hexadecimal, over the sums entries of what the agent wrote (see repository/FORMAT.md, sums), when it
   * made them; the layer is read back and must give the same.
   */
  sumsDigest: string | null;
}

/** Exactly one of point and volume. */
export interface ExportRequest {
  pointId: PointId | null;
  /** Id or name of a disk of the point; null when it has one only. */
  disk: string | null;
  volumeId: VolumeId | null;
  /** False: a point is written to through a throw-away overlay, a volume itself. */
  isReadOnly: boolean;
  /** Absolute, a new file: where the overlay of a writable point lies. Null: in exports.overlayDirectory. */
  overlayPath: string | null;
  /** Null: the default; 0: until it is removed. */
  ttlSeconds: number | null;
  identity: ExportIdentity | null;
}

export interface NewVolume {
  /** Null: made of the device's name. */
  name: string | null;
  /** One of the identities of a device that is here now, or the path of one. */
  identity: string | null;
  devicePath: string | null;
}

export interface RunFilter {
  kind?: RunKind | undefined;
  state?: RunState | undefined;
  vmId?: VmId | undefined;
}

/**
 * The use cases, as the API, CLI and workers call them. All methods reject with AppError. What takes
 * long answers a queued run at once; the run's row is the truth about it.
 */
export interface Engine {
  createRepository(input: NewRepository, actor: Actor): Promise<RepositoryView>;
  listRepositories(page: PageRequest): Promise<Page<RepositoryView>>;
  getRepository(id: RepositoryId): Promise<RepositoryView>;
  checkRepository(
    id: RepositoryId,
    options: { content: boolean; vmId: VmId | null; pointId: PointId | null },
    actor: Actor,
  ): Promise<RunView>;
  rescanRepository(id: RepositoryId, actor: Actor): Promise<RunView>;

  /** A machine known only from a repository, by name and with the same disk names, is given these sources and keeps its ids. */
  addVm(input: NewVm, actor: Actor): Promise<VmView>;
  listVms(page: PageRequest): Promise<Page<VmView>>;
  getVm(id: VmId): Promise<VmView>;
  /** CONFLICT while it has points or active runs. */
  removeVm(id: VmId, actor: Actor): Promise<void>;

  /**
   * Asks a hypervisor and records what it knows: new machines and disks are added, known ones follow what
   * they are now, whatever their name or host. Known machines of this connection that are gone are marked.
   */
  discoverVms(input: DiscoverRequest, actor: Actor): Promise<DiscoverResult>;
  listVmDisks(id: VmId): Promise<DiskView[]>;
  /**
   * Removes our checkpoints or bitmaps from the machine, of every repository of this appliance: a domain
   * with checkpoints cannot be undefined. The next run compares or is a full. RUN_ACTIVE while one is active.
   */
  releaseVm(id: VmId, actor: Actor): Promise<{ removed: string[]; kept: string[] }>;

  requestBackup(input: BackupRequest, actor: Actor): Promise<RunView>;
  /** What such a backup would do now, and how much it would read; nothing is held or changed. */
  estimateBackup(
    input: Omit<BackupRequest, 'whenBusy' | 'bytesPerSecond' | 'consistency'>,
  ): Promise<BackupEstimate>;
  /** Newest first. */
  listBackups(
    filter: { vmId?: VmId | undefined; repositoryId?: RepositoryId | undefined },
    page: PageRequest,
  ): Promise<Page<BackupView>>;
  getBackup(id: PointId): Promise<BackupView>;
  getBackupChain(id: PointId): Promise<ChainView[]>;
  getBackupStats(filter: {
    vmId?: VmId | undefined;
    repositoryId?: RepositoryId | undefined;
  }): Promise<BackupStats>;
  /** POINT_HAS_DEPENDENTS lists them in `details.dependents`. */
  requestDelete(id: PointId, actor: Actor): Promise<RunView>;

  requestRestore(input: RestoreRequest, actor: Actor): Promise<RunView>;
  /** The whole machine: its disks, then its definition. */
  requestMachineRestore(input: MachineRestoreRequest, actor: Actor): Promise<RunView>;

  /**
   * Begins a pushed backup. Answers when the exports are there (`progress.push`), or the run has ended, or
   * after a minute: then the run shows them later.
   */
  requestPush(input: PushRequest, actor: Actor, signal: AbortSignal): Promise<RunView>;
  /** RUN_NOT_ACTIVE when the backup has ended; its answer tells the agent whether to go on. */
  reportPush(id: PointId, reports: PushReport[]): Promise<RunView>;
  /**
   * The agent has written and flushed a disk. The same again answers the same; another completion of a
   * completed disk is a CONFLICT, a disk that is not part of the backup NOT_FOUND.
   */
  completePushDisk(id: PointId, diskId: DiskId, completion: PushCompletion): Promise<PushDiskView>;

  /**
   * Publishes a disk and answers when it can be read. CONFLICT, with `details.exportId`, when the same is
   * published already.
   */
  createExport(input: ExportRequest, actor: Actor): Promise<ExportView>;
  listExports(
    filter: { pointId?: PointId | undefined; volumeId?: VolumeId | undefined },
    page: PageRequest,
  ): Promise<Page<ExportView>>;
  getExport(id: ExportId): Promise<ExportView>;
  /** Clients are cut off. The overlay goes too, unless it was materialized: that image belongs to the user. */
  removeExport(id: ExportId, actor: Actor): Promise<void>;
  /** A run that turns the overlay into an image that stands alone, while it is in use. */
  materializeExport(id: ExportId, actor: Actor): Promise<OperationView>;
  getExportDaemon(): Promise<ExportDaemonView>;
  /** The key is answered here once; the export daemon's file is the only place it is kept in. */
  createExportIdentity(user: string, actor: Actor): Promise<{ user: string; key: string }>;
  listExportIdentities(): Promise<{ user: string }[]>;
  /** CONFLICT while an export is for it. */
  removeExportIdentity(user: string, actor: Actor): Promise<void>;

  /** Block devices of this host as they are now. */
  discoverVolumes(): Promise<FoundDeviceView[]>;
  createVolume(input: NewVolume, actor: Actor): Promise<VolumeView>;
  listVolumes(page: PageRequest): Promise<Page<VolumeView>>;
  getVolume(id: VolumeId): Promise<VolumeView>;
  /** The device, checked just now to be the volume: VOLUME_GONE, VOLUME_MISMATCH otherwise. */
  getVolumeDevice(id: VolumeId): Promise<{ devicePath: string; deviceNumber: string; sizeBytes: number }>;
  attachVolume(id: VolumeId, actor: Actor): Promise<OperationView>;
  /** Fails with VOLUME_IN_USE while an export or a run uses it. */
  detachVolume(id: VolumeId, actor: Actor): Promise<OperationView>;
  /** CONFLICT while it is attached or used by a disk. */
  removeVolume(id: VolumeId, actor: Actor): Promise<void>;
  getOperation(id: RunId): Promise<OperationView>;

  listRuns(filter: RunFilter, page: PageRequest): Promise<Page<RunView>>;
  getRun(id: RunId): Promise<RunView>;
  getRunLog(id: RunId, afterSequence: number, limit: number): Promise<RunEvent[]>;
  /** RUN_NOT_ACTIVE when it has ended. A queued run ends at once, a running one within two seconds. */
  cancelRun(id: RunId, actor: Actor): Promise<RunView>;
  /** The run now and at each change (at most one in 500 ms) until it has ended or the signal aborts. */
  watchRun(id: RunId, signal: AbortSignal): AsyncIterable<RunView>;

  /** The token's text is answered here once and kept only as a hash. */
  createToken(name: string, actor: Actor | null): Promise<{ token: TokenView; secret: string }>;
  listTokens(): Promise<TokenView[]>;
  revokeToken(id: TokenId, actor: Actor): Promise<void>;
  /** Null for an unknown or revoked token. */
  authenticate(secret: string): Promise<Actor | null>;

  /** The earlier answer to this key by this token, CONFLICT while it is still under way, IDEMPOTENCY_MISMATCH for another request. */
  findIdempotent(key: IdempotencyKey): Promise<{ status: number; body: unknown } | null>;
  saveIdempotent(key: IdempotencyKey, answer: { status: number; body: unknown }): Promise<void>;
  /** Frees the key after a request that failed, so that it can be sent again. */
  dropIdempotent(key: IdempotencyKey): Promise<void>;

  health(): Promise<ComponentHealth[]>;
  doctor(): Promise<DoctorFinding[]>;
}

export interface IdempotencyKey {
  tokenId: TokenId;
  key: string;
  /** SHA-256 of method, path and body. */
  requestHash: string;
}
