import os from 'node:os';
import { addon, type RawCopySession, type RawSessionOptions } from './addon.js';
import { NbdError, settled } from './errors.js';
import {
  HASH_BYTES,
  type AppendSink,
  type BlockStatus,
  type CopyProgress,
  type CopySession,
  type CopySessionOptions,
  type CopyWindow,
  type ExportInfo,
  type FileSink,
  type FilesSource,
  type HashAlgorithm,
  type NbdEndpoint,
  type NullSink,
  type WindowResult,
} from './types.js';
import { checkBytes, checkInteger, checkText, checkTimeout, toRawConnect } from './validate.js';

const DEFAULT_REQUEST_BYTES = 256 * 1024;
const MAX_REQUEST_BYTES = 32 * 1024 * 1024;
const MAX_CLUSTER_BYTES = 2 * 1024 * 1024;
const DEFAULT_IN_FLIGHT = 16;
const MAX_IN_FLIGHT = 64;
const MAX_CONNECTIONS = 16;
const NO_EXPECT = Buffer.alloc(0);
const ECANCELED = os.constants.errno.ECANCELED;

/**
 * Opens source and sink, checks their sizes, and starts the threads. Rejects with NbdError; an abort of
 * the signal, also later, cancels the session. Whoever opened it closes it.
 */
export async function openCopySession(
  options: CopySessionOptions,
  control: { signal?: AbortSignal | undefined } = {},
): Promise<CopySession> {
  const { signal } = control;
  const rawOptions = toRawOptions(options);
  // Decided here: once the threads run, the first thing that fails would be the answer.
  if (signal?.aborted === true) {
    throw new NbdError({ code: 'CANCELLED', op: 'open', message: 'open: cancelled', errno: ECANCELED });
  }
  const raw = new addon.RawCopySession(rawOptions);
  const onAbort = (): void => {
    raw.cancel();
  };
  const stopListening = (): void => {
    signal?.removeEventListener('abort', onAbort);
  };
  signal?.addEventListener('abort', onAbort, { once: true });
  try {
    const info = await settled(raw.open());
    return new Session(raw, { info, stopListening, isAppending: options.sink.kind === 'append' });
  } catch (error) {
    stopListening();
    await raw.close();
    throw error;
  }
}

function toRawOptions(options: CopySessionOptions): RawSessionOptions {
  const { connectTimeoutMs } = options;
  const clusterBytes = checkInteger('clusterBytes', options.clusterBytes, {
    min: 512,
    max: MAX_CLUSTER_BYTES,
  });
  if ((clusterBytes & (clusterBytes - 1)) !== 0) throw new RangeError('clusterBytes must be a power of two');
  const requestBytes = checkInteger(
    'requestBytes',
    options.requestBytes ?? Math.max(DEFAULT_REQUEST_BYTES, clusterBytes),
    { min: clusterBytes, max: MAX_REQUEST_BYTES },
  );
  if (requestBytes % clusterBytes !== 0) {
    throw new RangeError('requestBytes must be a multiple of clusterBytes');
  }
  return {
    source: toRawSource(options.source, connectTimeoutMs),
    sink: toRawSink(options.sink, { connectTimeoutMs, clusterBytes }),
    diskBytes: checkInteger('diskBytes', options.diskBytes, { min: 1, max: Number.MAX_SAFE_INTEGER }),
    clusterBytes,
    requestBytes,
    hash: checkHash(options.hash),
    requestsInFlight: checkInteger('requestsInFlight', options.requestsInFlight ?? DEFAULT_IN_FLIGHT, {
      min: 1,
      max: MAX_IN_FLIGHT,
    }),
    rateLimitBytesPerSecond: checkBytes('rateLimitBytesPerSecond', options.rateLimitBytesPerSecond ?? 0),
    stallTimeoutMs: checkTimeout('stallTimeoutMs', options.stallTimeoutMs),
  };
}

export function checkHash(hash: HashAlgorithm): HashAlgorithm {
  if (!Object.hasOwn(HASH_BYTES, hash)) throw new TypeError('hash must be xxh3-128 or sha-256');
  return hash;
}

function toRawEndpoint(
  endpoint: NbdEndpoint,
  connectTimeoutMs: number,
): Extract<RawSessionOptions['source'], { kind: 'nbd' }> {
  const connections = checkInteger('connections', endpoint.connections, { min: 1, max: MAX_CONNECTIONS });
  return { kind: 'nbd', ...toRawConnect(endpoint, connectTimeoutMs), connections };
}

function toRawSource(
  source: NbdEndpoint | FilesSource,
  connectTimeoutMs: number,
): RawSessionOptions['source'] {
  if (source.kind === 'nbd') return toRawEndpoint(source, connectTimeoutMs);
  if (source.paths.length === 0) throw new RangeError('a files source needs at least one path');
  return { kind: 'files', paths: source.paths.map((it) => checkText('a path', it)) };
}

function toRawSink(
  sink: NbdEndpoint | FileSink | AppendSink | NullSink,
  options: { connectTimeoutMs: number; clusterBytes: number },
): RawSessionOptions['sink'] {
  switch (sink.kind) {
    case 'nbd':
      return toRawEndpoint(sink, options.connectTimeoutMs);
    case 'file':
      return { kind: 'file', path: checkText('path', sink.path), isZeroed: sink.isZeroed };
    case 'append': {
      const startOffset = checkBytes('startOffset', sink.startOffset);
      if (startOffset % options.clusterBytes !== 0) {
        throw new RangeError('startOffset must be a multiple of clusterBytes');
      }
      return { kind: 'append', path: checkText('path', sink.path), startOffset };
    }
    case 'null':
      return { kind: 'null' };
  }
}

class Session implements CopySession {
  readonly #raw: RawCopySession;
  readonly #stopListening: () => void;
  readonly #isAppending: boolean;
  readonly sourceInfo: ExportInfo | undefined;
  readonly sinkInfo: ExportInfo | undefined;

  constructor(
    raw: RawCopySession,
    opened: {
      info: { source?: ExportInfo; sink?: ExportInfo };
      stopListening: () => void;
      isAppending: boolean;
    },
  ) {
    this.#raw = raw;
    this.#stopListening = opened.stopListening;
    this.#isAppending = opened.isAppending;
    this.sourceInfo = opened.info.source;
    this.sinkInfo = opened.info.sink;
  }

  async blockStatus(offset: number, length: number): Promise<BlockStatus> {
    return settled(this.#raw.blockStatus(checkBytes('offset', offset), checkBytes('length', length)));
  }

  async submit(window: CopyWindow): Promise<WindowResult> {
    if (!(window.rows instanceof Float64Array)) throw new TypeError('rows must be a Float64Array');
    if (window.expect !== undefined && !Buffer.isBuffer(window.expect)) {
      throw new TypeError('expect must be a Buffer');
    }
    return settled(
      this.#raw.submit({
        rows: window.rows,
        zeroPolicy: window.zeroPolicy,
        emitEntries: window.emitEntries,
        expectPolicy: window.expectPolicy ?? 'none',
        expect: window.expect ?? NO_EXPECT,
        collectMismatches: window.collectMismatches ?? false,
      }),
    );
  }

  reserve(bytes: number): number {
    if (!this.#isAppending) throw new TypeError('only an append sink has places to reserve');
    return this.#raw.reserve(checkBytes('bytes', bytes));
  }

  progress(): CopyProgress {
    return this.#raw.progress();
  }

  setRateLimit(bytesPerSecond: number): void {
    this.#raw.setRateLimit(checkBytes('bytesPerSecond', bytesPerSecond));
  }

  async flush(): Promise<void> {
    await settled(this.#raw.flush());
  }

  cancel(): void {
    this.#raw.cancel();
  }

  async close(): Promise<void> {
    this.#stopListening();
    await settled(this.#raw.close());
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }
}
