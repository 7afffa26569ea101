import { createHash } from 'node:crypto';
import { constants } from 'node:fs';
import { open, type FileHandle } from 'node:fs/promises';
import { throwIfAborted } from '../src/lib/deadline.js';
import { AppError, errnoOf } from '../src/lib/errors.js';
import { MIB } from '../src/lib/units.js';
import { toStorageError } from './backend.js';
import type { SumsEntry } from './sums.js';
import {
  ENTRY_INDEX_BYTES,
  SUMS_FOOTER_BYTES,
  SUMS_HEADER_BYTES,
  checkEntryOrder,
  corruptSums,
  decodeSumsFooter,
  decodeSumsHeader,
  entryBytesOf,
  entryIndex,
  entryIsZero,
  type SumsHeader,
} from './sums-format.js';

const CHUNK_BYTES = 64 * 1024;

export interface PackedEntries {
  /** Whole packed entries, as they stand in the file. Valid until the next call on the reader. */
  data: Buffer;
  entryBytes: number;
}

/**
 * Reads a `.sums` file in windows of clusters with a buffer of 64 KiB. Windows in ascending order
 * stream the file; another order costs a binary search. One call at a time. The owner closes it.
 */
export class SumsReader implements AsyncDisposable {
  readonly header: SumsHeader;
  readonly entryCount: number;
  readonly entryBytes: number;
  readonly #file: FileHandle;
  readonly #name: string;
  readonly #clusterLimit: number;
  readonly #entriesPerChunk: number;
  #chunk: Buffer = Buffer.alloc(0);
  #chunkStart = 0;
  /** The entry that `#cursorCluster` was looked for last: every entry before it is below that cluster. */
  #cursor = 0;
  #cursorCluster = 0;

  private constructor(file: FileHandle, name: string, facts: { header: SumsHeader; entryCount: number }) {
    this.#file = file;
    this.#name = name;
    this.header = facts.header;
    this.entryCount = facts.entryCount;
    this.entryBytes = entryBytesOf(facts.header.hash);
    this.#clusterLimit = Math.ceil(facts.header.diskBytes / facts.header.clusterBytes);
    this.#entriesPerChunk = Math.floor(CHUNK_BYTES / this.entryBytes);
  }

  /** LAYER_NOT_FOUND when it is not there, LAYER_CORRUPT when header, footer and length do not fit together. */
  static async open(name: string): Promise<SumsReader> {
    const file = await openRegular(name);
    try {
      const { size } = await file.stat();
      if (size < SUMS_HEADER_BYTES + SUMS_FOOTER_BYTES) throw corruptSums(name, 'it was cut short');
      const header = decodeSumsHeader(
        await readExactly(file, { name, offset: 0, length: SUMS_HEADER_BYTES }),
        name,
      );
      const footer = await readExactly(file, {
        name,
        offset: size - SUMS_FOOTER_BYTES,
        length: SUMS_FOOTER_BYTES,
      });
      return new SumsReader(file, name, {
        header,
        entryCount: decodeSumsFooter(footer, { fileBytes: size, header, file: name }),
      });
    } catch (error) {
      await file.close();
      throw toStorageError(error, 'reading a sums file');
    }
  }

  /** Reads the whole file: checks the order of the entries and answers its SHA-256. */
  async digest(signal?: AbortSignal): Promise<string> {
    const digest = createHash('sha256');
    const bodyEnd = SUMS_HEADER_BYTES + this.entryCount * this.entryBytes;
    digest.update(await this.#read(0, SUMS_HEADER_BYTES));
    const step = Math.floor(MIB / this.entryBytes) * this.entryBytes;
    let last = -1;
    for (let offset = SUMS_HEADER_BYTES; offset < bodyEnd; offset += step) {
      throwIfAborted(signal);
      const data = await this.#read(offset, Math.min(step, bodyEnd - offset));
      last = this.#checkOrder(data, last);
      digest.update(data);
    }
    digest.update(await this.#read(bodyEnd, SUMS_FOOTER_BYTES));
    return digest.digest('hex');
  }

  /** The first cluster at or after `cluster` that has an entry; Infinity when none. */
  async nextCluster(cluster: number): Promise<number> {
    await this.#seek(cluster);
    return this.#cursor < this.entryCount ? this.#indexAt(this.#cursor) : Infinity;
  }

  /** The packed entries of a window, in pieces. */
  async *window(startCluster: number, clusterCount: number): AsyncGenerator<PackedEntries> {
    const end = startCluster + clusterCount;
    await this.#seek(startCluster);
    while (this.#cursor < this.entryCount) {
      await this.#load(this.#cursor);
      const from = this.#cursor - this.#chunkStart;
      const to = this.#findInChunk(end, from);
      if (to > from) {
        yield {
          data: this.#chunk.subarray(from * this.entryBytes, to * this.entryBytes),
          entryBytes: this.entryBytes,
        };
      }
      this.#cursor = this.#chunkStart + to;
      this.#cursorCluster = end;
      if (to < this.#chunkCount()) return;
    }
  }

  /** Every entry, one object each: for tests and small files. */
  async *entries(): AsyncGenerator<SumsEntry> {
    for await (const { data } of this.window(0, this.#clusterLimit)) {
      for (let offset = 0; offset < data.length; offset += this.entryBytes) {
        const isZero = entryIsZero(data, offset);
        const hash = data.subarray(offset + ENTRY_INDEX_BYTES, offset + this.entryBytes);
        yield {
          clusterIndex: entryIndex(data, offset),
          isZero,
          hash: isZero ? Buffer.alloc(0) : Buffer.from(hash),
        };
      }
    }
  }

  close(): Promise<void> {
    return this.#file.close();
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  /** Puts the cursor on the first entry at or after `cluster` and loads its chunk. */
  async #seek(cluster: number): Promise<void> {
    let low = cluster >= this.#cursorCluster ? this.#cursor : 0;
    let high = this.entryCount;
    if (low < high) {
      // Ascending use ends here: the answer lies in the chunk of the cursor or right behind it.
      await this.#load(low);
      const found = this.#chunkStart + this.#findInChunk(cluster, low - this.#chunkStart);
      if (found < this.#chunkStart + this.#chunkCount()) high = found;
      low = found;
    }
    while (low < high) {
      const middle = Math.floor((low + high) / 2);
      if ((await this.#probe(middle)) < cluster) low = middle + 1;
      else high = middle;
    }
    this.#cursor = low;
    this.#cursorCluster = cluster;
    if (low < this.entryCount) await this.#load(low);
  }

  /** The number of entries in the chunk below `cluster`, searching from entry `from` of the chunk. */
  #findInChunk(cluster: number, from: number): number {
    let low = from;
    let high = this.#chunkCount();
    while (low < high) {
      const middle = (low + high) >>> 1;
      if (entryIndex(this.#chunk, middle * this.entryBytes) < cluster) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  #chunkCount(): number {
    return this.#chunk.length / this.entryBytes;
  }

  #indexAt(entry: number): number {
    return entryIndex(this.#chunk, (entry - this.#chunkStart) * this.entryBytes);
  }

  async #load(entry: number): Promise<void> {
    if (entry >= this.#chunkStart && entry < this.#chunkStart + this.#chunkCount()) return;
    const count = Math.min(this.#entriesPerChunk, this.entryCount - entry);
    const offset = SUMS_HEADER_BYTES + entry * this.entryBytes;
    const data = await this.#read(offset, count * this.entryBytes);
    this.#checkOrder(data, -1);
    this.#chunk = data;
    this.#chunkStart = entry;
  }

  async #probe(entry: number): Promise<number> {
    if (entry >= this.#chunkStart && entry < this.#chunkStart + this.#chunkCount())
      return this.#indexAt(entry);
    const offset = SUMS_HEADER_BYTES + entry * this.entryBytes;
    return entryIndex(await this.#read(offset, ENTRY_INDEX_BYTES), 0);
  }

  #checkOrder(data: Buffer, last: number): number {
    return checkEntryOrder(data, {
      entryBytes: this.entryBytes,
      last,
      limit: this.#clusterLimit,
      file: this.#name,
    });
  }

  #read(offset: number, length: number): Promise<Buffer> {
    return readExactly(this.#file, { name: this.#name, offset, length });
  }
}

async function openRegular(name: string): Promise<FileHandle> {
  let file: FileHandle;
  try {
    file = await open(name, constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK);
  } catch (error) {
    if (errnoOf(error) !== 'ENOENT') throw toStorageError(error, 'opening a sums file');
    throw new AppError('LAYER_NOT_FOUND', 'the sums file of a layer is missing', {
      cause: error,
      details: { file: name },
    });
  }
  if ((await file.stat()).isFile()) return file;
  await file.close();
  throw corruptSums(name, 'it is not a regular file');
}

async function readExactly(
  file: FileHandle,
  range: { name: string; offset: number; length: number },
): Promise<Buffer> {
  const data = Buffer.allocUnsafe(range.length);
  let done = 0;
  while (done < range.length) {
    try {
      const { bytesRead } = await file.read(data, done, range.length - done, range.offset + done);
      if (bytesRead === 0) break;
      done += bytesRead;
    } catch (error) {
      throw toStorageError(error, 'reading a sums file');
    }
  }
  if (done !== range.length) throw corruptSums(range.name, 'it was cut short');
  return data;
}
