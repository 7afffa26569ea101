import type { BlockStatus, CopySession, CopySessionOptions, ExportInfo } from '../nbd/index.js';
import type { DiskId, PointId } from '../lib/id.js';

/** Where one disk is read, as the administrator configured it. Stored as JSON with the disk. */
export type DiskSource = NbdDiskSource | ImageDiskSource;

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

export interface SourceProbe {
  sizeBytes: number;
  /** Identifies the disk at its source; another lineage means another disk. */
  lineage: string;
  records: ChangeRecord[];
}

/**
 * Read side of a run over one disk. `probe` looks without keeping anything open; `open` starts what
 * must be started (a private qemu-nbd) and answers the endpoint a copy session reads, valid until disposal.
 */
export interface Source {
  readonly diskId: DiskId;
  probe(options: { signal: AbortSignal }): Promise<SourceProbe>;
  open(options: { bitmap: string | null; signal: AbortSignal }): Promise<OpenSource>;
}

export interface OpenSource extends AsyncDisposable {
  readonly endpoint: Extract<CopySessionOptions['source'], { kind: 'nbd' }>;
  /** The metadata context that carries the changes, when a bitmap was asked for. */
  readonly dirtyContext: string | null;
}

export type { BlockStatus, CopySession, ExportInfo };
