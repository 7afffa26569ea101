import type { PointManifest } from '../../repository/index.js';
import type { DiskId, LayerId, PointId, RepositoryId, RunId, TokenId, VmId } from '../lib/id.js';
import type { HashAlgorithm } from '../nbd/index.js';
import type { ExportTable, PushDiskTable } from './export-contract.js';
import type { RowPage, RowPageRequest } from './row-page.js';
import type { VolumeTable } from './volume-contract.js';

export type * from './export-contract.js';
export type * from './row-page.js';
export type * from './volume-contract.js';

/**
 * The database as the engine sees it: an index of the repositories, and the truth about runs. One
 * object for each table; every method is one statement or one transaction, safe to call at the same
 * time from several processes. All reject with DATABASE_UNAVAILABLE when the server cannot be
 * reached (retryable), CONFLICT on a unique key, NOT_FOUND where a row must be there.
 * The JSON columns hold what the engine gives; the tables do not look inside.
 */
export interface Database extends AsyncDisposable {
  readonly repositories: RepositoryTable;
  readonly vms: VmTable;
  readonly runs: RunTable;
  readonly runEvents: RunEventTable;
  readonly points: RecoveryPointTable;
  readonly tokens: TokenTable;
  readonly idempotencyKeys: IdempotencyTable;
  readonly auditLog: AuditLogTable;
  readonly settings: SettingTable;
  readonly exports: ExportTable;
  readonly pushDisks: PushDiskTable;
  readonly volumes: VolumeTable;
  /** Creates and updates the tables; safe when several processes start at once. */
  migrate(): Promise<void>;
  /** One cheap round trip within the time. */
  ping(timeoutMs: number): Promise<void>;
}

export interface RepositoryRow {
  id: RepositoryId;
  /** Unique. */
  name: string;
  /** Unique. */
  root: string;
  hash: HashAlgorithm;
  createdAt: string;
}

export interface RepositoryTable {
  insert(row: RepositoryRow): Promise<void>;
  get(id: RepositoryId): Promise<RepositoryRow | null>;
  list(page: RowPageRequest): Promise<RowPage<RepositoryRow>>;
}

export interface DiskRow {
  id: DiskId;
  vmId: VmId;
  /** Unique within the VM, never reused. */
  number: number;
  /** Unique within the VM. */
  name: string;
  sizeBytes: number;
  lineage: string;
  /** DiskSource as JSON; null for a disk known only from a repository. */
  source: unknown;
  /** DiskFacts as JSON; null for a disk that was not discovered. */
  facts: unknown;
}

export interface VmRow {
  id: VmId;
  /** Unique. */
  name: string;
  createdAt: string;
  /** Unique: the machine wherever it is found; null for one that was not discovered. */
  sourceKey: string | null;
  /** VmSource and VmFacts as JSON. */
  source: unknown;
  facts: unknown;
  disks: DiskRow[];
}

export interface VmTable {
  /** VM and disks in one transaction. */
  insert(vm: VmRow): Promise<void>;
  get(id: VmId): Promise<VmRow | null>;
  list(page: RowPageRequest): Promise<RowPage<VmRow>>;
  updateDisk(id: DiskId, change: { sizeBytes?: number; lineage?: string; source?: unknown }): Promise<void>;
  /** By its unique name. */
  findByName(name: string): Promise<VmRow | null>;
  findBySourceKey(key: string): Promise<VmRow | null>;
  /** All machines whose source key begins so. */
  listBySourceKey(prefix: string): Promise<VmRow[]>;
  /**
   * The machine becomes what discovery found, in one transaction: name, source and facts change; disks of
   * the row are changed by their id, or added. Disks that are not in the row stay as they are.
   */
  follow(vm: VmRow): Promise<void>;
  /** The machine of a disk whose lineage begins so, and whose sources are not known (a rescan made it). */
  findAdoptable(lineagePrefix: string): Promise<VmRow | null>;
  /** CONFLICT while points or active runs refer to it. Ended runs keep their record, with the VM unset. */
  remove(id: VmId): Promise<void>;
}

export interface RunRow {
  id: RunId;
  kind: string;
  state: string;
  stage: string | null;
  vmId: VmId | null;
  repositoryId: RepositoryId | null;
  pointId: PointId | null;
  attempt: number;
  createdAt: string;
  startedAt: string | null;
  endedAt: string | null;
  /** When bytes last moved or a stage changed. */
  progressAt: string | null;
  cancelRequested: boolean;
  /** Which worker process executes it, and its proof of life. */
  workerId: string | null;
  heartbeatAt: string | null;
  /** JSON. */
  request: unknown;
  progress: unknown;
  error: unknown;
  result: unknown;
}

/**
 * How a run takes turns with others of the same VM and repository. `refuse`: only when no other that
 * takes turns is queued or running; `wait`: after those, first in, first out; `none`: it takes no part
 * and neither waits nor is waited for.
 */
export type RunTurn = 'refuse' | 'wait' | 'none';

export interface RunTable {
  /**
   * Inserts a run. With the turn `refuse`, rejects with RUN_ACTIVE (details.runId) when another one
   * has the turn or waits for it, decided in one transaction.
   */
  insert(row: RunRow, options: { turn: RunTurn }): Promise<void>;
  get(id: RunId): Promise<RunRow | null>;
  list(
    filter: { kind?: string | undefined; state?: string | undefined; vmId?: VmId | undefined },
    page: RowPageRequest,
  ): Promise<RowPage<RunRow>>;
  /**
   * queued → running for one worker; false when it is not queued any more, or when an older run of the
   * same VM and repository is still queued or running, both taking turns; a backup also waits for any
   * backup of its VM that is running, into whatever repository.
   */
  claim(id: RunId, claim: { workerId: string; at: string }): Promise<boolean>;
  /**
   * Changes the run only while it is `running` under this worker; false when it is not (any more),
   * and the worker must stop.
   */
  update(
    id: RunId,
    workerId: string,
    change: Partial<Pick<RunRow, 'stage' | 'progress' | 'progressAt' | 'heartbeatAt' | 'pointId'>>,
  ): Promise<boolean>;
  /** running (under this worker) → an ended state, or back to queued for a retry (attempt + 1). */
  end(
    id: RunId,
    workerId: string,
    end: { state: string; at: string; error: unknown; result: unknown; progress?: unknown },
  ): Promise<boolean>;
  requeue(id: RunId, workerId: string): Promise<boolean>;
  /** Sets the flag on a queued or running run; a queued one becomes cancelled at once. Answers the state before, null when there is none such. */
  requestCancel(id: RunId, at: string): Promise<string | null>;
  isCancelRequested(ids: RunId[]): Promise<RunId[]>;
  /** Runs that are `running` with a heartbeat older than `before`, or under one of these workers. */
  listAbandoned(options: { heartbeatBefore: string; workerIds: string[] }): Promise<RunRow[]>;
  /** running → interrupted (or completed, when its manifest is found), whoever held it, if the heartbeat is still the given one. */
  endAbandoned(
    id: RunId,
    expectedHeartbeatAt: string | null,
    end: { state: string; at: string; error: unknown; result: unknown },
  ): Promise<boolean>;
  /** Queued runs oldest first: put into the queue again after Redis lost them. */
  listQueued(): Promise<RunRow[]>;
  /** Which of these points runs of this VM were to make, and in which repository. */
  findPointRepositories(
    vmId: VmId,
    pointIds: PointId[],
  ): Promise<{ pointId: PointId; repositoryId: RepositoryId }[]>;
  countActiveForPoint(pointId: PointId): Promise<RunId[]>;
}

export interface RunEventRow {
  runId: RunId;
  sequence: number;
  at: string;
  level: string;
  code: string;
  message: string;
  details: unknown;
}

export interface RunEventTable {
  /** Gives the next sequence number within the run. */
  append(event: Omit<RunEventRow, 'sequence'>): Promise<void>;
  list(runId: RunId, options: { afterSequence: number; limit: number }): Promise<RunEventRow[]>;
}

/** A recovery point and its layers as indexed: columns to search by, the manifest for the rest. */
export interface PointRow {
  id: PointId;
  vmId: VmId;
  repositoryId: RepositoryId;
  runId: RunId;
  sequence: number;
  type: 'full' | 'incremental';
  capturedAt: string;
  committedAt: string;
  fileBytes: number;
  manifest: PointManifest;
}

export interface LayerRow {
  id: LayerId;
  pointId: PointId;
  repositoryId: RepositoryId;
  diskId: DiskId;
  parentLayerId: LayerId | null;
}

export interface PointFilter {
  vmId?: VmId | undefined;
  repositoryId?: RepositoryId | undefined;
}

export interface RecoveryPointTable {
  /** Point and layers in one transaction; idempotent for the same point id (a step may run again). */
  insert(point: PointRow, layers: LayerRow[]): Promise<void>;
  get(id: PointId): Promise<PointRow | null>;
  /** Newest first, by committedAt then id; ≤ 50 ms at the 99th percentile for 50 of 100,000. */
  list(filter: PointFilter, page: RowPageRequest): Promise<RowPage<PointRow>>;
  remove(id: PointId): Promise<void>;
  /** Points of other ids whose layers have a layer of this point as parent. */
  dependents(id: PointId): Promise<PointId[]>;
  stats(filter: PointFilter): Promise<{
    points: number;
    fullPoints: number;
    vms: number;
    fileBytes: number;
    oldestCapturedAt: string | null;
    newestCapturedAt: string | null;
  }>;
  /**
   * Replaces everything known of one repository by this list, in one transaction: a rescan. VMs and
   * disks that are not there yet are made (source null), parents before children.
   */
  replaceRepository(
    repositoryId: RepositoryId,
    content: { vms: VmRow[]; points: { point: PointRow; layers: LayerRow[] }[] },
  ): Promise<void>;
}

export interface TokenRow {
  id: TokenId;
  name: string;
  /** SHA-256 (hex) of the secret; unique. */
  hash: string;
  createdAt: string;
  lastUsedAt: string | null;
}

export interface TokenTable {
  insert(row: TokenRow): Promise<void>;
  findByHash(hash: string): Promise<TokenRow | null>;
  list(): Promise<TokenRow[]>;
  /** false when there was none. */
  remove(id: TokenId): Promise<boolean>;
  touch(id: TokenId, at: string): Promise<void>;
}

export interface IdempotencyRow {
  tokenId: TokenId;
  key: string;
  requestHash: string;
  createdAt: string;
  /** null while the first request is under way. */
  status: number | null;
  body: unknown;
}

export interface IdempotencyTable {
  /** Inserts the key; when it is there already answers that row instead (null = inserted). Rows older than `expireBefore` are dropped first. */
  begin(row: IdempotencyRow, expireBefore: string): Promise<IdempotencyRow | null>;
  finish(tokenId: TokenId, key: string, answer: { status: number; body: unknown }): Promise<void>;
  remove(tokenId: TokenId, key: string): Promise<void>;
}

export interface AuditRow {
  at: string;
  actor: string;
  action: string;
  subject: string;
  details: unknown;
}

export interface AuditLogTable {
  append(row: AuditRow): Promise<void>;
  list(page: RowPageRequest): Promise<RowPage<AuditRow>>;
}

/** What everybody that shares the database must agree on, and nobody configures. */
export interface SettingTable {
  /** The value under the key; `value` becomes it when there is none. Of several at once, all get the same answer. */
  getOrCreate(key: string, value: string): Promise<string>;
}
