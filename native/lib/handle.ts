import { addon, type RawNbdHandle } from './addon.js';
import { settled } from './errors.js';
import type { BlockStatus, ConnectOptions, ExportInfo, ListedExport, NbdHandle } from './types.js';
import { checkBytes, checkInteger, checkTimeout, toRawConnect } from './validate.js';

const FLAG_FUA = 1;
const FLAG_NO_HOLE = 2;
/** What libnbd and most servers take at once. */
const MAX_DATA_BYTES = 32 * 1024 * 1024;
/** Zero and trim carry 32 bits of length; longer ones are sent in pieces of this. */
const MAX_RANGE_BYTES = 1024 * 1024 * 1024;

/**
 * Opens one connection and finishes the handshake. Rejects with NbdError: NBD_URI_INVALID, NBD_CONNECT,
 * NBD_STALLED when the server accepts and says nothing, CANCELLED when the signal aborts. Throws
 * TypeError or RangeError for options that no caller should give.
 */
export async function connectNbd(
  options: ConnectOptions,
  control: { signal?: AbortSignal | undefined } = {},
): Promise<NbdHandle> {
  const raw = rawHandle(options);
  const info = await opened(raw, () => raw.open(), control.signal);
  return new Handle(raw, info);
}

/** The exports a server lists. The export name in the URI does not matter. Rejects like `connectNbd`. */
export async function listExports(
  options: ConnectOptions,
  control: { signal?: AbortSignal | undefined } = {},
): Promise<ListedExport[]> {
  const raw = rawHandle(options);
  return opened(raw, () => raw.listExports(), control.signal);
}

function rawHandle(options: ConnectOptions): RawNbdHandle {
  return new addon.RawNbdHandle({
    ...toRawConnect(options, options.connectTimeoutMs),
    requestTimeoutMs: checkTimeout('requestTimeoutMs', options.requestTimeoutMs),
  });
}

/** Runs the opening call; an abort closes the handle, which ends the call with CANCELLED. */
async function opened<T>(
  raw: RawNbdHandle,
  call: () => Promise<T>,
  signal: AbortSignal | undefined,
): Promise<T> {
  const onAbort = (): void => {
    void raw.close();
  };
  if (signal?.aborted === true) onAbort();
  signal?.addEventListener('abort', onAbort, { once: true });
  try {
    return await settled(call());
  } finally {
    signal?.removeEventListener('abort', onAbort);
  }
}

class Handle implements NbdHandle {
  readonly #raw: RawNbdHandle;
  readonly info: ExportInfo;

  constructor(raw: RawNbdHandle, info: ExportInfo) {
    this.#raw = raw;
    this.info = info;
  }

  async blockStatus(offset: number, length: number): Promise<BlockStatus> {
    return settled(this.#raw.blockStatus(checkBytes('offset', offset), checkBytes('length', length)));
  }

  async pread(offset: number, length: number): Promise<Buffer> {
    checkInteger('length', length, { min: 1, max: MAX_DATA_BYTES });
    return settled(this.#raw.pread(checkBytes('offset', offset), length));
  }

  async pwrite(offset: number, data: Buffer, options: { fua?: boolean } = {}): Promise<void> {
    if (!Buffer.isBuffer(data)) throw new TypeError('data must be a Buffer');
    checkInteger('data.length', data.length, { min: 1, max: MAX_DATA_BYTES });
    await settled(this.#raw.pwrite(checkBytes('offset', offset), data, options.fua === true ? FLAG_FUA : 0));
  }

  async zero(
    offset: number,
    length: number,
    options: { noHole?: boolean; fua?: boolean } = {},
  ): Promise<void> {
    const flags = (options.fua === true ? FLAG_FUA : 0) | (options.noHole === true ? FLAG_NO_HOLE : 0);
    await inPieces(offset, length, (at, bytes) => this.#raw.zero(at, bytes, flags));
  }

  async trim(offset: number, length: number, options: { fua?: boolean } = {}): Promise<void> {
    const flags = options.fua === true ? FLAG_FUA : 0;
    await inPieces(offset, length, (at, bytes) => this.#raw.trim(at, bytes, flags));
  }

  async cache(offset: number, length: number): Promise<void> {
    await inPieces(offset, length, (at, bytes) => this.#raw.cache(at, bytes));
  }

  async flush(): Promise<void> {
    await settled(this.#raw.flush());
  }

  async close(): Promise<void> {
    await settled(this.#raw.close());
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }
}

async function inPieces(
  offset: number,
  length: number,
  send: (offset: number, length: number) => Promise<void>,
): Promise<void> {
  checkBytes('offset', offset);
  checkInteger('length', length, { min: 1, max: Number.MAX_SAFE_INTEGER - offset });
  for (let at = 0; at < length; at += MAX_RANGE_BYTES) {
    await settled(send(offset + at, Math.min(MAX_RANGE_BYTES, length - at)));
  }
}
