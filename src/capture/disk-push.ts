import { formatBytes, formatDuration, MIB } from '../lib/units.js';
import { pause, throwIfAborted } from '../lib/deadline.js';
import { AppError, toAppError } from '../lib/errors.js';
import { captureWindow, markGrown, planWindow, type PlannedWindow } from '../nbd/capture-plan.js';
import {
  addTotals,
  copyWindows,
  isServedSize,
  requireSourceSize,
  type CopyTotals,
} from '../nbd/copy-windows.js';
import { BASE_ALLOCATION, walkClusters, type ClusterMap } from '../nbd/extents.js';
import {
  connectNbd,
  HASH_BYTES,
  openCopySession,
  type CopySession,
  type HashAlgorithm,
  type TlsOptions,
} from '../nbd/index.js';
import { COPY_SHAPE, LIMITS } from './limits.js';
import { Flusher, SafeWindows, type DiskWindow } from './safe-windows.js';
import type { CaptureSource } from './source.js';

const FLUSH_BYTES = 512 * MIB;
/** Stretches of the disk that are planned at once, in what is copied between flushes. */
const WINDOWS_PER_FLUSH = 4;
const FIRST_PAUSE_MS = 500;
const LONGEST_PAUSE_MS = 5000;
/** What the system says of a connection between storage daemons that is going, and of a server that ends. */
const EIO = 5;
const ESHUTDOWN = 108;

/** A disk that the server wants, and where it is to be written. */
export interface PushedDisk {
  diskId: string;
  name: string;
  source: CaptureSource;
  sink: { uri: string; tls: TlsOptions };
  /** Exact, as the server has it. */
  sizeBytes: number;
  method: 'full' | 'bitmap';
  /** Context of the source that has the changes; null for a full. */
  dirtyContext: string | null;
  /** Of what an incremental stands on: a record of changes knows nothing of what the disk grew by. Null for a full. */
  parentSizeBytes: number | null;
  /** What a later push counts from. */
  changeId: string;
}

export interface CopySettings {
  hash: HashAlgorithm;
  clusterBytes: number;
  /** To each end, where it allows several. */
  connections: number;
  /** Read from the source; 0 for no limit. */
  bytesPerSecond: number;
  /** How long a lost connection may stay lost. */
  retryMs: number;
  /** How much is copied between flushes; up to three times as much comes again after a lost connection. Default 512 MiB. */
  flushBytes?: number;
  /** Remarks for the user. */
  notify: (text: string) => void;
}

export interface DiskProgress extends CopyTotals {
  /** Bytes that are looked at; 0 before that is known. */
  totalBytes: number;
}

export interface PushedTotals extends CopyTotals {
  sumsDigest: string;
}

/** Copies one disk from its source to its export, over as many connections as it takes. */
export class DiskPush {
  readonly disk: PushedDisk;
  readonly #settings: CopySettings;
  readonly #signal: AbortSignal;
  readonly #flushBytes: number;
  readonly #safe = new SafeWindows();
  #totalBytes: number | null = null;
  #live: { session: CopySession; before: CopyTotals } | null = null;
  #lost: { atMs: number; pauseMs: number } | null = null;

  constructor(disk: PushedDisk, settings: CopySettings, signal: AbortSignal) {
    this.disk = disk;
    this.#settings = settings;
    this.#signal = signal;
    this.#flushBytes = settings.flushBytes ?? FLUSH_BYTES;
  }

  /** What is written again after a lost connection counts once. */
  progress(): DiskProgress {
    const live = this.#live;
    const totals = live === null ? this.#safe.totals : addTotals(live.before, live.session.progress());
    const { bytesRead, bytesWritten, bytesZeroed, bytesSkipped } = totals;
    return { totalBytes: this.#totalBytes ?? 0, bytesRead, bytesWritten, bytesZeroed, bytesSkipped };
  }

  /** Connects to the export once, so that a wrong key or address is told at once and in its own name. */
  async checkSink(): Promise<void> {
    const { sink, name } = this.disk;
    try {
      await using handle = await connectNbd({ ...sink, ...LIMITS }, { signal: this.#signal });
      this.#requireSinkSize(handle.info.sizeBytes);
    } catch (error) {
      throw about(`the export for disk ${name}`, error);
    }
  }

  /**
   * Resolves when all is written and flushed. When an end is lost, what no flush made safe is copied again, for
   * as long as `retryMs` without anything becoming safe. Any other error ends it.
   */
  async copy(): Promise<PushedTotals> {
    for (;;) {
      try {
        await this.#attempt();
        return { ...this.#safe.totals, sumsDigest: this.#safe.digest() };
      } catch (error) {
        throwIfAborted(this.#signal);
        await this.#waitAfter(toAppError(error));
      }
    }
  }

  async #waitAfter(error: AppError): Promise<void> {
    const { name, source } = this.disk;
    const { retryMs, notify } = this.#settings;
    if (!isPassing(error)) throw about(`disk ${name}`, error);
    source.requireUnchanged();
    const now = performance.now();
    this.#lost ??= { atMs: now, pauseMs: FIRST_PAUSE_MS };
    if (now - this.#lost.atMs >= retryMs) {
      throw about(`disk ${name}, for more than ${formatDuration(retryMs)}`, error);
    }
    notify(`disk ${name}: ${error.message} (${error.code}); going on from ${formatBytes(this.#safe.end)}`);
    await pause(this.#lost.pauseMs, this.#signal);
    this.#lost.pauseMs = Math.min(this.#lost.pauseMs * 2, LONGEST_PAUSE_MS);
  }

  async #attempt(): Promise<void> {
    const session = await this.#openSession();
    const flusher = new Flusher(session, {
      fromBytes: this.#safe.end,
      flushBytes: this.#flushBytes,
      onSafe: (batch) => {
        this.#safe.add(batch);
        this.#lost = null;
      },
    });
    try {
      requireSourceSize(session, this.disk.sizeBytes);
      this.#requireSinkSize(session.sinkInfo?.sizeBytes ?? 0);
      this.#totalBytes ??= await this.#measure(session);
      this.#live = { session, before: this.#safe.totals };
      await copyWindows(session, this.#windows(session), (result, window) => flusher.settled(result, window));
      await flusher.finish();
    } finally {
      this.#live = null;
      await session.close();
      await flusher.stop();
    }
  }

  #openSession(): Promise<CopySession> {
    const { source, sink, dirtyContext, sizeBytes } = this.disk;
    const { hash, clusterBytes, connections, bytesPerSecond } = this.#settings;
    return openCopySession(
      {
        source: {
          kind: 'nbd',
          uri: source.uri,
          connections,
          metaContexts: [BASE_ALLOCATION, ...(dirtyContext === null ? [] : [dirtyContext])],
        },
        sink: { kind: 'nbd', ...sink, connections },
        diskBytes: sizeBytes,
        hash,
        clusterBytes,
        rateLimitBytesPerSecond: bytesPerSecond,
        ...COPY_SHAPE,
        ...LIMITS,
      },
      { signal: this.#signal, sinkRole: 'layer' },
    );
  }

  #requireSinkSize(servedBytes: number): void {
    const { sizeBytes } = this.disk;
    if (isServedSize(servedBytes, sizeBytes)) return;
    throw new AppError(
      'SOURCE_SIZE_MISMATCH',
      `the export has ${servedBytes} bytes where the disk has ${sizeBytes}`,
    );
  }

  async #measure(session: CopySession): Promise<number> {
    let totalBytes = 0;
    for await (const map of this.#walk(session, 0)) totalBytes += this.#planned(map).plannedBytes;
    return totalBytes;
  }

  async *#windows(session: CopySession): AsyncGenerator<DiskWindow> {
    for await (const map of this.#walk(session, this.#safe.end)) {
      const planned = this.#planned(map);
      if (planned.rows.length === 0) continue;
      yield { ...captureWindow(this.disk.method, planned), end: map.end, copyBytes: planned.copyBytes };
    }
  }

  #planned(map: ClusterMap): PlannedWindow {
    const { hash, clusterBytes } = this.#settings;
    return planWindow(this.disk.method, map, { clusterBytes, hashBytes: HASH_BYTES[hash] });
  }

  async *#walk(session: CopySession, fromBytes: number): AsyncGenerator<ClusterMap> {
    const { sizeBytes, dirtyContext, parentSizeBytes } = this.disk;
    const { clusterBytes } = this.#settings;
    const maps = walkClusters((offset, length) => session.blockStatus(offset, length), {
      diskBytes: sizeBytes,
      clusterBytes,
      dirtyContext,
      grantedContexts: session.sourceInfo?.metaContexts ?? [],
      windowBytes: this.#flushBytes / WINDOWS_PER_FLUSH,
      fromBytes,
    });
    for await (const map of maps) {
      throwIfAborted(this.#signal);
      if (parentSizeBytes !== null) markGrown(map, parentSizeBytes, clusterBytes);
      yield map;
    }
  }
}

/** A connection that is gone may come back; what a server says to a request stays said. */
function isPassing(error: AppError): boolean {
  switch (error.code) {
    case 'NBD_CONNECT':
    case 'NBD_PROTOCOL':
    case 'NBD_STALLED':
      return true;
    case 'NBD_REQUEST':
      return error.details['errno'] === EIO || error.details['errno'] === ESHUTDOWN;
    default:
      return false;
  }
}

function about(subject: string, error: unknown): AppError {
  const { code, message, details } = toAppError(error);
  return code === 'CANCELLED'
    ? toAppError(error)
    : new AppError(code, `${subject}: ${message}`, { cause: error, details });
}
