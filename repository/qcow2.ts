import { constants } from 'node:fs';
import { open, type FileHandle } from 'node:fs/promises';
import { AppError, errnoOf } from '../src/lib/errors.js';
import { toStorageError } from './backend.js';
import { parseQcow2Header, qcow2Problem, type Qcow2Header } from './qcow2-header.js';

export const CLUSTER_UNALLOCATED = 0;
export const CLUSTER_ZERO = 1;
export const CLUSTER_DATA = 2;

/** Where the clusters of a window stand in one layer's own file; backing files are not looked at. */
export interface AllocationWindow {
  /** CLUSTER_* of each cluster. */
  kinds: Uint8Array;
  /** Byte position in the file of each data cluster, else 0. */
  hostOffsets: Float64Array;
}

// Bits 9–55 hold an offset in L1 and standard L2 entries; the entry is read as two 32-bit halves.
const HIGH_OFFSET_MASK = 0x00ff_ffff;
const LOW_OFFSET_MASK = 0xffff_fe00;
const HIGH_WORD = 0x1_0000_0000;
const COMPRESSED_BIT = 0x4000_0000;
const ZERO_BIT = 1;
const HEADER_READ_BYTES = 65536;
const CACHED_TABLES = 4;

/**
 * Read-only view of one QCOW2 file: its header and where its own clusters are. Memory is the L1 table
 * (8 bytes for each 512 MiB of disk) and a few L2 tables. One call at a time. The owner closes it.
 */
export class Qcow2File implements AsyncDisposable {
  readonly header: Qcow2Header;
  readonly fileBytes: number;
  readonly clusterCount: number;
  readonly #file: FileHandle;
  readonly #name: string;
  readonly #entriesPerTable: number;
  readonly #l2Offsets: Float64Array;
  readonly #tables = new Map<number, Buffer>();

  private constructor(
    file: FileHandle,
    name: string,
    facts: { header: Qcow2Header; fileBytes: number; l2Offsets: Float64Array },
  ) {
    this.#file = file;
    this.#name = name;
    this.header = facts.header;
    this.fileBytes = facts.fileBytes;
    this.#l2Offsets = facts.l2Offsets;
    this.clusterCount = Math.ceil(facts.header.virtualBytes / facts.header.clusterBytes);
    this.#entriesPerTable = facts.header.clusterBytes / 8;
  }

  /** LAYER_NOT_FOUND when the file is not there, LAYER_CORRUPT when it is no QCOW2 file a layer can be. */
  static async open(name: string): Promise<Qcow2File> {
    const file = await openLayer(name);
    try {
      const facts = await file.stat();
      if (!facts.isFile()) throw qcow2Problem(name, 'it is not a regular file');
      const start = await readAt(file, { name, offset: 0, length: Math.min(HEADER_READ_BYTES, facts.size) });
      const header = parseQcow2Header(start, facts.size, name);
      const l1 = await readAt(file, { name, offset: header.l1Offset, length: header.l1Entries * 8 });
      const l2Offsets = new Float64Array(header.l1Entries);
      for (let i = 0; i < header.l1Entries; i += 1) {
        const offset = entryOffset(l1, i * 8);
        if (offset % header.clusterBytes !== 0 || offset + header.clusterBytes > facts.size) {
          throw qcow2Problem(name, 'an L2 table lies outside the file', { l1Index: i });
        }
        l2Offsets[i] = offset;
      }
      return new Qcow2File(file, name, { header, fileBytes: facts.size, l2Offsets });
    } catch (error) {
      await file.close();
      throw toStorageError(error, 'reading a layer file');
    }
  }

  /** The clusters of a window. Clusters beyond the end of this file's disk are unallocated. */
  async window(startCluster: number, clusterCount: number): Promise<AllocationWindow> {
    const kinds = new Uint8Array(clusterCount);
    const hostOffsets = new Float64Array(clusterCount);
    const end = Math.min(startCluster + clusterCount, this.clusterCount);
    let cluster = startCluster;
    while (cluster < end) {
      const l1Index = Math.floor(cluster / this.#entriesPerTable);
      const tableEnd = Math.min(end, (l1Index + 1) * this.#entriesPerTable);
      if (this.#l2Offsets[l1Index] !== 0) {
        const table = await this.#table(l1Index);
        this.#decode(table, { from: cluster, to: tableEnd, windowStart: startCluster, kinds, hostOffsets });
      }
      cluster = tableEnd;
    }
    return { kinds, hostOffsets };
  }

  /** The first cluster at or after `cluster` (and before `limit`) that may be allocated; Infinity when none. Reads no L2 table. */
  nextPossible(cluster: number, limit: number): number {
    const last = Math.min(limit, this.clusterCount);
    let l1Index = Math.floor(cluster / this.#entriesPerTable);
    for (; l1Index * this.#entriesPerTable < last; l1Index += 1) {
      if (this.#l2Offsets[l1Index] !== 0) return Math.max(cluster, l1Index * this.#entriesPerTable);
    }
    return Infinity;
  }

  /** The first cluster in [start, end) that is allocated, or undefined. */
  async firstAllocated(start: number, end: number): Promise<number | undefined> {
    for (let at = this.nextPossible(start, end); at < end;) {
      const tableEnd = Math.min(end, (Math.floor(at / this.#entriesPerTable) + 1) * this.#entriesPerTable);
      const { kinds } = await this.window(at, tableEnd - at);
      const found = kinds.findIndex((kind) => kind !== CLUSTER_UNALLOCATED);
      if (found !== -1) return at + found;
      at = this.nextPossible(tableEnd, end);
    }
    return undefined;
  }

  /** Bytes of the file itself, e.g. the tail of a cluster. Fewer where the file ends. */
  readBytes(offset: number, length: number): Promise<Buffer> {
    return readAt(this.#file, {
      name: this.#name,
      offset,
      length: Math.max(0, Math.min(length, this.fileBytes - offset)),
    });
  }

  close(): Promise<void> {
    return this.#file.close();
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  #decode(
    table: Buffer,
    span: { from: number; to: number; windowStart: number; kinds: Uint8Array; hostOffsets: Float64Array },
  ): void {
    const { clusterBytes, version } = this.header;
    for (let cluster = span.from; cluster < span.to; cluster += 1) {
      const at = (cluster % this.#entriesPerTable) * 8;
      const high = table.readUInt32BE(at);
      const low = table.readUInt32BE(at + 4);
      if (high === 0 && low === 0) continue;
      const slot = cluster - span.windowStart;
      if ((high & COMPRESSED_BIT) !== 0) throw this.#badCluster(cluster, 'a cluster is compressed');
      if ((low & ZERO_BIT) !== 0 && version === 3) {
        span.kinds[slot] = CLUSTER_ZERO;
        continue;
      }
      const offset = (high & HIGH_OFFSET_MASK) * HIGH_WORD + ((low & LOW_OFFSET_MASK) >>> 0);
      if (offset === 0) continue;
      if (offset % clusterBytes !== 0 || offset >= this.fileBytes) {
        throw this.#badCluster(cluster, 'a cluster lies outside the file');
      }
      span.kinds[slot] = CLUSTER_DATA;
      span.hostOffsets[slot] = offset;
    }
  }

  #badCluster(cluster: number, problem: string): AppError {
    return qcow2Problem(this.#name, problem, { offset: cluster * this.header.clusterBytes });
  }

  async #table(l1Index: number): Promise<Buffer> {
    const cached = this.#tables.get(l1Index);
    if (cached !== undefined) return cached;
    const offset = this.#l2Offsets[l1Index] ?? 0;
    const table = await readAt(this.#file, { name: this.#name, offset, length: this.header.clusterBytes });
    if (this.#tables.size >= CACHED_TABLES) {
      const oldest = this.#tables.keys().next();
      if (oldest.done !== true) this.#tables.delete(oldest.value);
    }
    this.#tables.set(l1Index, table);
    return table;
  }
}

function entryOffset(table: Buffer, at: number): number {
  const high = table.readUInt32BE(at) & HIGH_OFFSET_MASK;
  return high * HIGH_WORD + ((table.readUInt32BE(at + 4) & LOW_OFFSET_MASK) >>> 0);
}

async function openLayer(name: string): Promise<FileHandle> {
  try {
    return await open(name, constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK);
  } catch (error) {
    if (errnoOf(error) === 'ELOOP') throw qcow2Problem(name, 'it is a symbolic link');
    if (errnoOf(error) !== 'ENOENT') throw toStorageError(error, 'opening a layer file');
    throw new AppError('LAYER_NOT_FOUND', 'a layer file is missing', {
      cause: error,
      details: { file: name },
    });
  }
}

async function readAt(
  file: FileHandle,
  range: { name: string; offset: number; length: number },
): Promise<Buffer> {
  const data = Buffer.allocUnsafe(range.length);
  let done = 0;
  while (done < range.length) {
    const { bytesRead } = await file.read(data, done, range.length - done, range.offset + done);
    if (bytesRead === 0) throw qcow2Problem(range.name, 'it was cut short');
    done += bytesRead;
  }
  return data;
}
