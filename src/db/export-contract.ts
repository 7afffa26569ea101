import type { DiskId, ExportId, PointId, RunId, VolumeId } from '../lib/id.js';
import type { RowPage, RowPageRequest } from './row-page.js';

/**
 * An export that Holdfast published, or is about to: the row is there before its file and goes after it, so
 * that no file of ours is ever without a row. Point, disk and volume are no foreign keys: a rescan
 * replaces points, and an export outlives it.
 */
export interface ExportRow {
  id: ExportId;
  /** Unique. */
  name: string;
  kind: 'point' | 'volume' | 'push';
  /** publishing: its file may not be there yet; removing: its file may be gone already. */
  state: 'publishing' | 'published' | 'removing';
  pointId: PointId | null;
  diskId: DiskId | null;
  /** Of a push: the run whose layer it is. */
  runId: RunId | null;
  volumeId: VolumeId | null;
  createdAt: string;
  /** Null: until it is removed. */
  expiresAt: string | null;
  /** JSON. */
  facts: unknown;
}

export interface ExportFilter {
  kind?: ExportRow['kind'] | undefined;
  pointId?: PointId | undefined;
  runId?: RunId | undefined;
  volumeId?: VolumeId | undefined;
}

export interface ExportTable {
  /** CONFLICT, with `details.exportId`, when there is one of this name. */
  insert(row: ExportRow): Promise<void>;
  get(id: ExportId): Promise<ExportRow | null>;
  /** Newest first. */
  list(filter: ExportFilter, page: RowPageRequest): Promise<RowPage<ExportRow>>;
  /** All of them, oldest first: what the reaper looks through. */
  listAll(filter: ExportFilter): Promise<ExportRow[]>;
  /** NOT_FOUND when it is gone. */
  update(id: ExportId, change: Partial<Pick<ExportRow, 'state' | 'expiresAt' | 'facts'>>): Promise<void>;
  /** None there is fine. */
  remove(id: ExportId): Promise<void>;
}

/** What the agent of a push says about one disk. */
export interface PushDiskRow {
  runId: RunId;
  diskId: DiskId;
  /** When the agent last reported; the creation of the row before that. */
  seenAt: string;
  /** JSON; null before the first report. */
  progress: unknown;
  /** JSON; set once, when the agent completes the disk. */
  completion: unknown;
}

export interface PushDiskTable {
  /** All disks of a run in one transaction; the rows of an earlier attempt of the run go. */
  replace(runId: RunId, rows: PushDiskRow[]): Promise<void>;
  list(runId: RunId): Promise<PushDiskRow[]>;
  /** False when there is no such disk in the run, or it is completed. */
  report(runId: RunId, diskId: DiskId, report: { progress: unknown; at: string }): Promise<boolean>;
  /**
   * Sets the completion of a disk that has none, and answers the row as it is then: whoever finds another
   * completion in it than its own came second. Null when there is no such disk in the run.
   */
  complete(
    runId: RunId,
    diskId: DiskId,
    completion: { completion: unknown; at: string },
  ): Promise<PushDiskRow | null>;
}
