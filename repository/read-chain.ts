import { throwIfAborted } from '../src/lib/deadline.js';
import { AppError } from '../src/lib/errors.js';
import {
  COPY_OP,
  EXPECT_HASH,
  openCopySession,
  type CopySession,
  type CopySessionOptions,
  type HashAlgorithm,
} from '../src/nbd/index.js';
import { openChainReader, type ChainReader, type ChainWindow, type ShortCluster } from './chain-reader.js';
import type { BackingChain } from './types.js';

/** 256 MiB of disk in one window, three outstanding: the copy never waits for the planner. */
const WINDOW_CLUSTERS = 4096;
const WINDOWS_OUTSTANDING = 3;
/** Zeroes are written in windows of 4 GiB, so that progress and cancel are not far apart. */
const ZERO_WINDOW_BYTES = 4 * 1024 ** 3;
const ROW_FIELDS = 5;
const MAX_DAMAGED_RANGES = 1000;

export interface ChainCopyLimits {
  connectTimeoutMs: number;
  stallTimeoutMs: number;
  requestBytes?: number;
  requestsInFlight?: number;
}

export interface ChainCopyProgress {
  /** Bytes that will be looked at; exact at the end, before it an upper bound. */
  totalBytes: number;
  bytesRead: number;
  bytesWritten: number;
  bytesZeroed: number;
  bytesSkipped: number;
}

export interface ChainCopyOptions {
  chain: BackingChain;
  sink: CopySessionOptions['sink'];
  /** The sink reads as zero where nothing is written; else zeroes are written everywhere. */
  isZeroed: boolean;
  hash: HashAlgorithm;
  /** Bytes that do not match their hashes are copied and counted, not an error. */
  acceptDamage: boolean;
  limits: ChainCopyLimits;
  signal?: AbortSignal | undefined;
  onProgress?: ((progress: ChainCopyProgress) => void) | undefined;
}

export interface ChainCopyResult extends ChainCopyProgress {
  damagedBytes: number;
  /** [offset, length] of what did not match, the first thousand. */
  damagedRanges: [number, number][];
}

/**
 * Copies one disk of a point into a sink, holding every block against its hash, and flushes the sink.
 * Rejects with LAYER_CORRUPT naming disk, layer and offset at the first mismatch, unless damage is
 * accepted. The sink is then incomplete: the caller discards it.
 */
export async function copyChain(options: ChainCopyOptions): Promise<ChainCopyResult> {
  const { limits, signal } = options;
  await using reader = await openChainReader(options.chain, { signal });
  if (reader.hash !== options.hash) {
    throw new AppError('LAYER_CORRUPT', 'the sums of the layers have another hash than the recovery point', {
      details: { expected: options.hash, found: reader.hash },
    });
  }
  await using session = await openCopySession(
    {
      source: { kind: 'files', paths: reader.paths },
      sink: options.sink,
      diskBytes: reader.diskBytes,
      hash: reader.hash,
      clusterBytes: reader.clusterBytes,
      ...limitOptions(limits),
    },
    { signal, sinkRole: 'target' },
  );
  const copy = new ChainCopy(options, reader, session);
  await copy.run();
  await session.flush();
  throwIfAborted(signal);
  return copy.result;
}

function limitOptions(
  limits: ChainCopyLimits,
): Pick<CopySessionOptions, 'connectTimeoutMs' | 'stallTimeoutMs' | 'requestBytes' | 'requestsInFlight'> {
  const { connectTimeoutMs, stallTimeoutMs, requestBytes, requestsInFlight } = limits;
  return {
    connectTimeoutMs,
    stallTimeoutMs,
    ...(requestBytes === undefined ? {} : { requestBytes }),
    ...(requestsInFlight === undefined ? {} : { requestsInFlight }),
  };
}

class ChainCopy {
  readonly result: ChainCopyResult;
  readonly #options: ChainCopyOptions;
  readonly #reader: ChainReader;
  readonly #session: CopySession;
  readonly #outstanding: Promise<void>[] = [];

  constructor(options: ChainCopyOptions, reader: ChainReader, session: CopySession) {
    this.#options = options;
    this.#reader = reader;
    this.#session = session;
    this.result = {
      totalBytes: options.isZeroed ? reader.maxCopyBytes : reader.diskBytes,
      bytesRead: 0,
      bytesWritten: 0,
      bytesZeroed: 0,
      bytesSkipped: 0,
      damagedBytes: 0,
      damagedRanges: [],
    };
  }

  async run(): Promise<void> {
    try {
      for (;;) {
        throwIfAborted(this.#options.signal);
        const window = await this.#reader.next(WINDOW_CLUSTERS);
        if (window === undefined) break;
        for (const part of this.#parts(window)) await this.#submit(part);
        for (const short of window.shortClusters) await this.#verifyShort(short);
      }
      while (this.#outstanding.length > 0) await this.#outstanding.shift();
    } finally {
      // After a failure the others fail with it; their rejections are known already.
      await Promise.allSettled(this.#outstanding);
    }
    const { bytesRead, bytesZeroed } = this.result;
    this.result.totalBytes = Math.max(bytesRead, bytesRead + (this.#options.isZeroed ? 0 : bytesZeroed));
    this.#options.onProgress?.({ ...this.result });
  }

  /** What the session is asked for one window: nothing for zeroes in a sink that is zero already. */
  #parts(window: ChainWindow): Pick<ChainWindow, 'rows' | 'expect'>[] {
    if (this.#options.isZeroed) return window.rows.length === 0 ? [] : [window];
    if (window.rows.length > 0) {
      return [{ rows: mergeZeroRows(window.rows, window.zeroRanges), expect: window.expect }];
    }
    const parts: Pick<ChainWindow, 'rows' | 'expect'>[] = [];
    const [start = 0, length = 0] = window.zeroRanges;
    for (let done = 0; done < length; done += ZERO_WINDOW_BYTES) {
      const rows = Float64Array.of(
        start + done,
        Math.min(ZERO_WINDOW_BYTES, length - done),
        COPY_OP.zero,
        0,
        0,
      );
      parts.push({ rows, expect: Buffer.alloc(0) });
    }
    return parts;
  }

  async #submit(part: Pick<ChainWindow, 'rows' | 'expect'>): Promise<void> {
    const settled = this.#settle(part);
    // Looked at in order below; until then a failure must not count as unhandled.
    settled.catch(() => undefined);
    this.#outstanding.push(settled);
    if (this.#outstanding.length >= WINDOWS_OUTSTANDING) await this.#outstanding.shift();
  }

  async #settle({ rows, expect }: Pick<ChainWindow, 'rows' | 'expect'>): Promise<void> {
    const answer = await this.#session.submit({
      rows,
      expect,
      zeroPolicy: this.#options.isZeroed ? 'skip' : 'write',
      emitEntries: false,
      expectPolicy: 'verify',
      collectMismatches: true,
    });
    for (const offset of answer.mismatches) this.#noteDamage(offset, rows);
    const { result } = this;
    result.bytesRead += answer.bytesRead;
    result.bytesWritten += answer.bytesWritten;
    result.bytesZeroed += answer.bytesZeroed;
    result.bytesSkipped += answer.bytesSkipped;
    this.#options.onProgress?.({ ...result });
  }

  /** The last cluster of a smaller layer: its hash ends where that layer's disk ended. */
  async #verifyShort(short: ShortCluster): Promise<void> {
    const { clusterBytes, hash, paths } = this.#reader;
    const offset = short.cluster * clusterBytes;
    await using session = await openCopySession(
      {
        source: { kind: 'files', paths: [paths[short.fileIndex] ?? ''] },
        sink: { kind: 'null' },
        diskBytes: short.layerBytes,
        hash,
        clusterBytes,
        ...limitOptions(this.#options.limits),
      },
      { signal: this.#options.signal },
    );
    const { mismatches } = await session.submit({
      rows: Float64Array.of(offset, short.layerBytes - offset, COPY_OP.copy, 0, short.fileOffset),
      expect: Buffer.concat([Buffer.of(EXPECT_HASH), short.hash]),
      zeroPolicy: 'skip',
      emitEntries: false,
      expectPolicy: 'verify',
      collectMismatches: true,
    });
    const row = Float64Array.of(offset, clusterBytes, COPY_OP.copy, short.fileIndex, short.fileOffset);
    for (const bad of mismatches) this.#noteDamage(bad, row);
  }

  #noteDamage(offset: number, rows: Float64Array): void {
    const { clusterBytes, diskBytes } = this.#reader;
    const length = Math.min(clusterBytes, diskBytes - offset);
    if (!this.#options.acceptDamage) throw this.#damage(offset, rows);
    this.result.damagedBytes += length;
    if (this.result.damagedRanges.length < MAX_DAMAGED_RANGES)
      this.result.damagedRanges.push([offset, length]);
  }

  #damage(offset: number, rows: Float64Array): AppError {
    const { chain } = this.#options;
    const layer = chain.layers[findFile(rows, offset)];
    return new AppError(
      'LAYER_CORRUPT',
      `the bytes at disk offset ${offset} do not have the hash taken at backup`,
      {
        details: {
          diskId: chain.diskId,
          layerId: layer?.layerId,
          pointId: layer?.pointId,
          file: layer?.path,
          offset,
        },
      },
    );
  }
}

function findFile(rows: Float64Array, offset: number): number {
  for (let at = 0; at < rows.length; at += ROW_FIELDS) {
    const start = rows[at] ?? 0;
    if (start <= offset && offset < start + (rows[at + 1] ?? 0)) return rows[at + 3] ?? 0;
  }
  return -1;
}

/** Copy rows and zero ranges, both ascending, as one ascending list of rows. */
export function mergeZeroRows(rows: Float64Array, zeroRanges: Float64Array): Float64Array {
  const merged = new Float64Array(rows.length + (zeroRanges.length / 2) * ROW_FIELDS);
  let row = 0;
  let zero = 0;
  let at = 0;
  while (row < rows.length || zero < zeroRanges.length) {
    const isRowNext =
      zero >= zeroRanges.length || (row < rows.length && (rows[row] ?? 0) < (zeroRanges[zero] ?? 0));
    if (isRowNext) {
      merged.set(rows.subarray(row, row + ROW_FIELDS), at);
      row += ROW_FIELDS;
    } else {
      merged.set([zeroRanges[zero] ?? 0, zeroRanges[zero + 1] ?? 0, COPY_OP.zero, 0, 0], at);
      zero += 2;
    }
    at += ROW_FIELDS;
  }
  return merged;
}
