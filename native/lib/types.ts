/**
 * What the addon offers. Two things: `NbdHandle`, libnbd's calls by name as promises, and
 * `CopySession`, which executes copy plans in threads of its own so that data never crosses into
 * JavaScript. No policy lives here: what to copy, retries and names are the callers' (`src/nbd`).
 *
 * All offsets and lengths are bytes, safe integers. Errors are `NbdError`.
 */

export type HashAlgorithm = 'xxh3-128' | 'sha-256';
/** Bytes of one hash. */
export const HASH_BYTES: Record<HashAlgorithm, number> = { 'xxh3-128': 16, 'sha-256': 32 };

/** Where the failure class tells the caller what may be done next. */
export type NbdErrorCode =
  | 'NBD_URI_INVALID' // libnbd could not parse it
  | 'NBD_CONNECT' // no connection, refused, TLS failed, unknown export
  | 'NBD_PROTOCOL' // the connection is dead: closed by the server or broken protocol
  | 'NBD_REQUEST' // the server answered one request with an error; the connection lives
  | 'NBD_STALLED' // no answer within the deadline; the connection was closed
  | 'NBD_CLOSED' // used after close()
  | 'FILE_IO' // pread/pwrite/fallocate on a local file failed
  | 'CANCELLED'
  | 'HASH_MISMATCH'; // verify found other bytes than the hashes say

export interface TlsOptions {
  /** Directory with ca-cert.pem (client-cert.pem, client-key.pem), or a pre-shared key file. */
  certificates?: string;
  pskFile?: string;
  username?: string;
}

export interface ConnectOptions {
  uri: string;
  /** Metadata contexts to ask for; the server may grant fewer. */
  metaContexts?: string[];
  tls?: TlsOptions;
  /** Deadline for the whole connect and handshake. */
  connectTimeoutMs: number;
  /** Deadline for each later request. */
  requestTimeoutMs: number;
}

export interface ExportInfo {
  sizeBytes: number;
  isReadOnly: boolean;
  canMultiConn: boolean;
  canFlush: boolean;
  canFua: boolean;
  canZero: boolean;
  canFastZero: boolean;
  canTrim: boolean;
  canCache: boolean;
  isRotational: boolean;
  isTls: boolean;
  isStructured: boolean;
  protocol: string;
  /** 0 where the server does not say. */
  blockSize: { minimum: number; preferred: number; maximum: number };
  /** The contexts the server granted, in full (`qemu:dirty-bitmap:b0`, not `qemu:dirty-bitmap:`). */
  metaContexts: string[];
}

/**
 * One block-status answer: for each granted context a flat array [length, flags, length, flags, …]
 * counted from the asked offset. Contexts have their own lengths, and may stop before or (by
 * clipping in the server) at the asked end: intersect them.
 */
export type BlockStatus = Record<string, Float64Array>;

/** One connection. Not for concurrent close; requests may overlap. Close it in the end: idempotent. */
export interface NbdHandle extends AsyncDisposable {
  readonly info: ExportInfo;
  blockStatus(offset: number, length: number): Promise<BlockStatus>;
  pread(offset: number, length: number): Promise<Buffer>;
  pwrite(offset: number, data: Buffer, options?: { fua?: boolean }): Promise<void>;
  zero(offset: number, length: number, options?: { noHole?: boolean; fua?: boolean }): Promise<void>;
  trim(offset: number, length: number, options?: { fua?: boolean }): Promise<void>;
  cache(offset: number, length: number): Promise<void>;
  flush(): Promise<void>;
  close(): Promise<void>;
}

/** An export a server lists. */
export interface ListedExport {
  name: string;
  description: string;
}

export interface NbdEndpoint {
  kind: 'nbd';
  uri: string;
  tls?: TlsOptions;
  /**
   * Upper bound of connections. More than one are opened only when the first says can_multi_conn.
   * Every connection counts against the server's own limit (`qemu-nbd --shared`).
   */
  connections: number;
  /** Source only: contexts for `CopySession.blockStatus`. */
  metaContexts?: string[];
}

/** Local files read by pread; a plan row names the file by its index and the position in it. */
export interface FilesSource {
  kind: 'files';
  paths: string[];
}

/** A raw file or block device, opened for writing by path; must exist. Zeroes punch holes where the file can, else are written. */
export interface FileSink {
  kind: 'file';
  path: string;
  /** Everything not written already reads as zero (new file, or freshly discarded device). */
  isZeroed: boolean;
}

/**
 * A file that grows at its end, opened for writing by path; must exist. Clusters that are not zero are written from
 * `startOffset` on in the order they come, and `WindowResult.places` says where; zero ones take no place. Windows
 * need `emitEntries`. What lies beyond `startOffset` must read as zero: a cluster that the end of the disk cuts is
 * not filled up. Errors of writing name the position in the file.
 */
export interface AppendSink {
  kind: 'append';
  path: string;
  /** A multiple of clusterBytes. */
  startOffset: number;
}

/** Reads and judges without writing: verification. */
export interface NullSink {
  kind: 'null';
}

export interface CopySessionOptions {
  source: NbdEndpoint | FilesSource;
  sink: NbdEndpoint | FileSink | AppendSink | NullSink;
  /** Exact size of the disk in bytes; the last cluster is hashed up to here, never beyond. Nothing is read beyond it. */
  diskBytes: number;
  hash: HashAlgorithm;
  clusterBytes: number;
  /** Bytes a request reads or writes at the most; a multiple of clusterBytes. Default 256 KiB. */
  requestBytes?: number;
  /** Requests in flight on each connection. Default 16, at most 64. */
  requestsInFlight?: number;
  /** Bytes per second read from the source, 0 for no limit. Can be changed while running. */
  rateLimitBytesPerSecond?: number;
  connectTimeoutMs: number;
  /** The session fails with NBD_STALLED when work is outstanding and none of it completes for this long. */
  stallTimeoutMs: number;
}

/** What one row of a plan asks for. */
export const COPY_OP = { copy: 0, zero: 1 } as const;

/**
 * What happens with a cluster that was read and found all zero:
 * - `skip`: nothing is written (a full into an empty layer, a restore into a zeroed target);
 * - `write`: zeroes are written into the sink (an incremental: the parent's bytes must not show).
 */
export type ZeroPolicy = 'skip' | 'write';

/**
 * What the known hashes (`expect`) are for:
 * - `verify`: a cluster that hashes differently fails the window (restore), or with `collectMismatches`
 *   is only listed;
 * - `compare`: a cluster equal to what is expected is not written (compare run).
 */
export type ExpectPolicy = 'verify' | 'compare';

/**
 * One window of a plan. Rows are flat: [offset, length, op, fileIndex, fileOffset] × n, ascending, not
 * overlapping. Offsets are cluster-aligned; lengths too, except at the end of the disk. fileIndex and
 * fileOffset are for a `files` source (else 0). A `copy` row is read, judged, hashed and written;
 * a `zero` row is not read: zeroes are written to the sink.
 */
export interface CopyWindow {
  rows: Float64Array;
  zeroPolicy: ZeroPolicy;
  /** Produce the `entries` of the result. */
  emitEntries: boolean;
  expectPolicy?: ExpectPolicy;
  /**
   * For each cluster of the `copy` rows, in order: one kind byte (EXPECT_*) and the hash. Stride 1 + hash bytes.
   */
  expect?: Buffer;
  collectMismatches?: boolean;
}

export const EXPECT_UNKNOWN = 0; // verify: not judged; compare: always written
export const EXPECT_HASH = 1;
export const EXPECT_ZERO = 2; // the content is known to be all zero

export interface WindowResult {
  /**
   * For each cluster that the sink now holds because of this window, ascending: 8 bytes little-endian
   * cluster index with bit 63 set when the cluster is zero, then the hash (zero bytes for a zero cluster).
   * A `skip`ped zero cluster and an equal cluster of a compare have none.
   */
  entries: Buffer;
  /** `append` sink: the position in its file for each entry, 0 for a zero cluster. Else empty. */
  places: Float64Array;
  bytesRead: number;
  bytesWritten: number;
  /** Bytes for which zeroes were written. */
  bytesZeroed: number;
  /** Bytes read and not written: zero under `skip`, or equal under `compare`. */
  bytesSkipped: number;
  /** Disk offsets of clusters that did not verify; empty unless collectMismatches. */
  mismatches: Float64Array;
}

export interface CopyProgress {
  bytesRead: number;
  bytesWritten: number;
  bytesZeroed: number;
  bytesSkipped: number;
  requestsInFlight: number;
  /** Connections really open. */
  sourceConnections: number;
  sinkConnections: number;
}

/**
 * A running copy. Windows may be submitted before earlier ones have settled (keep two or three
 * outstanding so that the pipeline never drains); results settle in the order of submission.
 * The first failure fails every outstanding and later window with the same error.
 */
export interface CopySession extends AsyncDisposable {
  /** undefined for a `files` source. */
  readonly sourceInfo: ExportInfo | undefined;
  /** undefined unless the sink is `nbd`. */
  readonly sinkInfo: ExportInfo | undefined;
  /** Block status on the session's own first source connection, so that a server with one place for clients suffices. */
  blockStatus(offset: number, length: number): Promise<BlockStatus>;
  submit(window: CopyWindow): Promise<WindowResult>;
  /**
   * Takes whole clusters for so many bytes at the end of an `append` sink's file, for the caller to write; answers
   * their position. TypeError for other sinks.
   */
  reserve(bytes: number): number;
  progress(): CopyProgress;
  setRateLimit(bytesPerSecond: number): void;
  /** Flushes the sink (NBD flush, fdatasync). Call after the last window has settled; success is not claimed without it. */
  flush(): Promise<void>;
  /** Ends the work within two seconds, also inside a stalled read: outstanding windows reject with CANCELLED. */
  cancel(): void;
  /** Closes connections (with NBD disconnect when idle) and files, joins the threads. Idempotent. */
  close(): Promise<void>;
}

export interface HashOptions {
  hash: HashAlgorithm;
  clusterBytes: number;
}
