import type { ApplianceId, DiskId, LayerId, PointId, RunId, VmId } from '../src/lib/id.js';
import type { CheckOptions, CheckReport } from './check-report.js';
import type { ConfigFile } from './config-files.js';
import type { LayerTables } from './layer-tables.js';
import type { Lease, LeaseHolder } from './lease.js';
import type { SumsWriter } from './sums.js';
import type {
  BackingChain,
  Capacity,
  PointDraft,
  PointManifest,
  RepositoryMarker,
  VmRecord,
} from './types.js';

export interface NewLayer {
  vmId: VmId;
  diskId: DiskId;
  runId: RunId;
  layerId: LayerId;
  /** Exact size; the QCOW2 file is created with whole sectors. */
  sizeBytes: number;
  /** The layer it stands on, null for a full. */
  parentLayerId: LayerId | null;
}

/** A layer under way: `.partial-<run-id>-<layer-id>.qcow2` beside its parent, and its sums. */
export interface PartialLayer {
  readonly layerId: LayerId;
  readonly diskId: DiskId;
  /** Absolute path for whoever writes its data. */
  readonly path: string;
  /** Size of the QCOW2 disk: sizeBytes rounded up to whole sectors. */
  readonly virtualBytes: number;
  /** Takes the entries of each window in order. Closed by commit or discard. */
  readonly sums: SumsWriter;
  /** For a writer of bare data, while the layer is empty. Whoever opened them closes them. */
  openTables(): Promise<LayerTables>;
}

export interface CommitOptions {
  lease: Lease;
  signal?: AbortSignal | undefined;
  /** Domain XML and the like, kept under config/<point-id>/ with mode 0600. */
  configFiles?: { name: string; content: Buffer }[];
  /** Asked for when the layers are sealed: rejects when what they were read from cannot be relied upon after all. */
  confirm?: () => Promise<void>;
  /** 0…1 over the whole commit; long checks call it at least every two seconds. */
  onProgress?: (share: number) => void;
}

export interface DeleteResult {
  removedFiles: string[];
  freedBytes: number;
}

export interface HashLayerOptions {
  signal?: AbortSignal | undefined;
  /** 0…1. */
  onProgress?: (share: number) => void;
}

export interface LayerHash {
  /**
   * SHA-256, in hexadecimal, over the layer's sums entries in ascending order, as they stand in the file: of a layer
   * with a parent all of them, of a full those that are not zero.
   */
  digest: string;
}

/** What a sweep moved to trash/ or why it touched nothing of a VM. */
export interface SweepReport {
  moved: string[];
  skipped: { vmId: string; reason: string }[];
  purged: string[];
}

/**
 * A storage repository: where layers and manifests live. Needs no database, queue or HTTP.
 *
 * Every method rejects with REPOSITORY_OFFLINE when the marker is not there (checked anew before
 * each write), REPOSITORY_READ_ONLY, REPOSITORY_FULL or REPOSITORY_IO by what the system said.
 * "Not there" and "could not look" are different answers. Methods that write take the VM's lease
 * and reject with LEASE_LOST when its fencing token is no longer the newest.
 */
export interface Repository {
  readonly root: string;
  readonly marker: RepositoryMarker;

  capacity(): Promise<Capacity>;
  /** Rejects with REPOSITORY_FULL when `neededBytes` do not fit into what captures may use. */
  requireSpace(neededBytes: number): Promise<void>;

  putVm(vm: VmRecord): Promise<void>;
  listVmIds(): Promise<VmId[]>;
  readVm(vmId: VmId): Promise<VmRecord>;

  /** All manifests of the VM by sequence. Rejects with MANIFEST_UNREADABLE if any one cannot be read or verified. */
  listPoints(vmId: VmId): Promise<PointManifest[]>;
  /** Verified against nothing but its own form; the chain of digests is checked by `check`. POINT_NOT_FOUND when absent. */
  readPoint(vmId: VmId, pointId: PointId): Promise<PointManifest>;
  /**
   * The chain under one disk of a point, every header read and compared with the manifests.
   * CHAIN_BROKEN when a header names another parent, LAYER_NOT_FOUND when a file is missing.
   */
  openChain(point: PointManifest, diskId: DiskId): Promise<BackingChain>;
  /**
   * The configuration kept with a point, by name; none where the machine is only disks. The manifest has no
   * digest of them: their content is to be judged like input. REPOSITORY_FORMAT for what is no such directory.
   */
  readConfigFiles(vmId: VmId, pointId: PointId): Promise<ConfigFile[]>;

  /**
   * One writer for each VM: the newest fencing token wins. A live lease of somebody else rejects with
   * REPOSITORY_LOCKED naming its holder; a dead one (its process is gone on this host, or it expired) is taken over.
   */
  acquireVmLease(vmId: VmId, holder: LeaseHolder): Promise<Lease>;

  /** Creates the partial file with `qemu-img create -f qcow2 … -F qcow2 -b <relative parent>`. */
  createLayer(layer: NewLayer, lease: Lease): Promise<PartialLayer>;
  /**
   * Fills the sums of a layer that somebody else wrote, whoever gave them its path, by reading its own clusters back.
   * Nobody may write to it from here on: CONFLICT while it is open for writing. LAYER_CORRUPT when it is no layer.
   */
  hashLayer(layer: PartialLayer, options?: HashLayerOptions): Promise<LayerHash>;
  /** Removes what `createLayer` made; idempotent. */
  discardLayer(layer: PartialLayer): Promise<void>;
  /** Removes every partial file of a run in a VM, found by the run id in its name; for recovery. Returns the names. */
  discardRun(vmId: VmId, runId: RunId): Promise<string[]>;
  /**
   * Removes every partial file in the lease's VM, for a holder that has made none yet: what a run left that
   * could not reach the repository in the end. Returns the names.
   */
  discardAbandoned(lease: Lease): Promise<string[]>;

  /**
   * The commit of the design, section 4: all layers, then the manifest last. The layers must be
   * written and flushed. Verifies that each layer's parent is what the draft says (PARENT_MISMATCH)
   * and `qemu-img check` (LAYER_CORRUPT). Before the manifest is renamed nothing counts; after, the point exists.
   */
  commitPoint(draft: PointDraft, layers: PartialLayer[], options: CommitOptions): Promise<PointManifest>;

  /** Points of the VM whose layers stand on this point's, by id. */
  dependents(vmId: VmId, pointId: PointId): Promise<PointId[]>;
  /** Tombstone first (the manifest goes), then files. POINT_HAS_DEPENDENTS lists who stands on it. */
  deletePoint(vmId: VmId, pointId: PointId, lease: Lease): Promise<DeleteResult>;

  check(options: CheckOptions): Promise<CheckReport>;
  /** Moves what no manifest references to trash/, purges trash older than 7 days; nothing on doubt. */
  sweep(options?: { trashDays?: number }): Promise<SweepReport>;
}

export interface OpenOptions {
  root: string;
  /** Absent: read-only use (check, rescue). Writing methods then reject with REPOSITORY_FOREIGN. */
  applianceId?: ApplianceId;
  /** Take the repository over from another appliance, explicitly. */
  takeover?: boolean;
}

export type { CheckOptions, CheckReport, LayerId };
