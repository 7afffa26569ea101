import { constants } from 'node:fs';
import { open, type FileHandle } from 'node:fs/promises';
import { AppError } from '../src/lib/errors.js';
import { toStorageError } from './backend.js';
import { parseQcow2Header, qcow2Problem } from './qcow2-header.js';
import { entryIndex, entryIsZero } from './sums-format.js';

/** Takes whole clusters at the end of the file for so many bytes; answers their position. */
export type Reserve = (bytes: number) => number;

/** Clusters that lie in the file now (native `WindowResult`), ascending from call to call. */
export interface PlacedClusters {
  /** Packed entries of a sums file. */
  entries: Buffer;
  /** The position of each one's bytes in the file; of no meaning for a zero cluster. */
  places: Float64Array;
}

const HEADER_READ_BYTES = 65536;
const REFCOUNT_TABLE_OFFSET_AT = 48;
const REFCOUNT_TABLE_CLUSTERS_AT = 56;
const REFCOUNT_ORDER_AT = 96;
/** Refcounts of 16 bits: what qemu-img makes. */
const REFCOUNT_ORDER = 4;
const REFCOUNT_BYTES = 2;
const ENTRY_BYTES = 8;
/** "The refcount is exactly 1". */
const COPIED_BIT = 1n << 63n;
const ZERO_ENTRY = 1n;

/** What stands in the empty file that `qemu-img create` made. */
interface Layout {
  clusterBytes: number;
  l1Entries: number;
  l1Offset: number;
  refcountTable: { offset: number; clusters: number };
  /** Positions of the refcount blocks, the first ones of the file. */
  refcountBlocks: number[];
}

/**
 * Writes the QCOW2 tables of a layer whose data somebody else appends to the same file, so that in the end
 * the file is what QEMU would have made. Everything from the end of the empty file on is taken in one piece,
 * by `reserve`; so every cluster is used once and the refcounts are all 1:
 *
 *     header  refcount table  refcount block  L1 | data … L2 … data … L2  refcount blocks
 *             as qemu-img create made them       | startOffset
 *
 * An L2 table is written when the clusters have gone past it; what the header leads to comes last. A file that
 * was not finished is useless. Memory: the L1 table and one L2 table. One call at a time. The owner closes it.
 */
export class LayerTables implements AsyncDisposable {
  /** Where the data begins. */
  readonly startOffset: number;
  readonly #file: FileHandle;
  readonly #layout: Layout;
  readonly #l1: Buffer;
  readonly #l2: Buffer;
  /** Which L2 table is being filled, -1 before the first. */
  #l1Index = -1;

  private constructor(file: FileHandle, layout: Layout, fileBytes: number) {
    this.#file = file;
    this.#layout = layout;
    this.#l1 = Buffer.alloc(layout.l1Entries * ENTRY_BYTES);
    this.#l2 = Buffer.alloc(layout.clusterBytes);
    this.startOffset = Math.ceil(fileBytes / layout.clusterBytes) * layout.clusterBytes;
  }

  /** For an empty QCOW2 file; LAYER_CORRUPT when it is something else. */
  static async open(name: string): Promise<LayerTables> {
    let file: FileHandle | undefined;
    try {
      file = await open(name, constants.O_RDWR | constants.O_NOFOLLOW);
      const { size } = await file.stat();
      return new LayerTables(file, await readLayout(file, { name, fileBytes: size }), size);
    } catch (error) {
      await file?.close();
      throw toStorageError(error, 'opening a layer under way');
    }
  }

  async append({ entries, places }: PlacedClusters, reserve: Reserve): Promise<void> {
    const perTable = this.#layout.clusterBytes / ENTRY_BYTES;
    const entryBytes = entries.length / Math.max(places.length, 1);
    for (let i = 0; i < places.length; i += 1) {
      const cluster = entryIndex(entries, i * entryBytes);
      const l1Index = Math.floor(cluster / perTable);
      if (l1Index !== this.#l1Index) await this.#turnTo(l1Index, reserve);
      const at = (cluster % perTable) * ENTRY_BYTES;
      const isZero = entryIsZero(entries, i * entryBytes);
      this.#l2.writeBigUInt64BE(isZero ? ZERO_ENTRY : BigInt(places[i] ?? 0) | COPIED_BIT, at);
    }
  }

  /** After the last cluster: the file is a QCOW2 image when this resolves, not flushed to the medium. */
  async finish(reserve: Reserve): Promise<void> {
    await this.#writeL2(reserve);
    await this.#writeRefcounts(reserve);
    await this.#write(this.#l1, this.#layout.l1Offset);
  }

  close(): Promise<void> {
    return this.#file.close();
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  async #turnTo(l1Index: number, reserve: Reserve): Promise<void> {
    if (l1Index < this.#l1Index || l1Index >= this.#layout.l1Entries) {
      throw new AppError(
        'INTERNAL',
        'the clusters of a layer did not come in ascending order within the disk',
      );
    }
    await this.#writeL2(reserve);
    this.#l2.fill(0);
    this.#l1Index = l1Index;
  }

  async #writeL2(reserve: Reserve): Promise<void> {
    if (this.#l1Index === -1) return;
    const position = reserve(this.#layout.clusterBytes);
    this.#l1.writeBigUInt64BE(BigInt(position) | COPIED_BIT, this.#l1Index * ENTRY_BYTES);
    await this.#write(this.#l2, position);
  }

  async #writeRefcounts(reserve: Reserve): Promise<void> {
    const { clusterBytes, refcountTable, refcountBlocks } = this.#layout;
    const { clusters, newBlocks, newTable } = neededRefcounts(reserve(0) / clusterBytes, this.#layout);
    let next = reserve((newBlocks + newTable) * clusterBytes);
    const table = Buffer.alloc((newTable || refcountTable.clusters) * clusterBytes);
    const isFree = (cluster: number): boolean =>
      newTable > 0 && isInside(cluster, refcountTable.offset / clusterBytes, refcountTable.clusters);
    for (let index = 0; index < refcountBlocks.length + newBlocks; index += 1) {
      const position = refcountBlocks[index] ?? next;
      if (position === next) next += clusterBytes;
      await this.#write(refcountBlock(clusterBytes, { index, clusters, isFree }), position);
      table.writeBigUInt64BE(BigInt(position), index * ENTRY_BYTES);
    }
    if (newTable === 0) return this.#write(table, refcountTable.offset);
    await this.#write(table, next);
    const header = Buffer.alloc(12);
    header.writeBigUInt64BE(BigInt(next), 0);
    header.writeUInt32BE(newTable, REFCOUNT_TABLE_CLUSTERS_AT - REFCOUNT_TABLE_OFFSET_AT);
    await this.#write(header, REFCOUNT_TABLE_OFFSET_AT);
  }

  async #write(data: Buffer, position: number): Promise<void> {
    try {
      let done = 0;
      while (done < data.length) {
        const { bytesWritten } = await this.#file.write(data, done, data.length - done, position + done);
        done += bytesWritten;
      }
    } catch (error) {
      throw toStorageError(error, 'writing the tables of a layer');
    }
  }
}

function isInside(cluster: number, first: number, count: number): boolean {
  return cluster >= first && cluster < first + count;
}

function refcountBlock(
  clusterBytes: number,
  block: { index: number; clusters: number; isFree: (cluster: number) => boolean },
): Buffer {
  const data = Buffer.alloc(clusterBytes);
  const first = block.index * (clusterBytes / REFCOUNT_BYTES);
  const end = Math.min(block.clusters, first + clusterBytes / REFCOUNT_BYTES);
  for (let cluster = first; cluster < end; cluster += 1) {
    if (!block.isFree(cluster)) data.writeUInt16BE(1, (cluster - first) * REFCOUNT_BYTES);
  }
  return data;
}

/** Refcount blocks, and a table when the one that is there is too small, are clusters that need refcounts themselves. */
function neededRefcounts(
  used: number,
  layout: Layout,
): { clusters: number; newBlocks: number; newTable: number } {
  const { clusterBytes, refcountTable, refcountBlocks } = layout;
  for (let clusters = used; ;) {
    const blocks = Math.max(refcountBlocks.length, Math.ceil((clusters * REFCOUNT_BYTES) / clusterBytes));
    const tableClusters = Math.ceil((blocks * ENTRY_BYTES) / clusterBytes);
    const newTable = tableClusters > refcountTable.clusters ? tableClusters : 0;
    const newBlocks = blocks - refcountBlocks.length;
    if (used + newBlocks + newTable === clusters) return { clusters, newBlocks, newTable };
    clusters = used + newBlocks + newTable;
  }
}

async function readLayout(
  file: FileHandle,
  { name, fileBytes }: { name: string; fileBytes: number },
): Promise<Layout> {
  const start = await readPart(file, 0, Math.min(HEADER_READ_BYTES, fileBytes));
  const { clusterBytes, l1Entries, l1Offset, version } = parseQcow2Header(start, fileBytes, name);
  if (version !== 3 || start.readUInt32BE(REFCOUNT_ORDER_AT) !== REFCOUNT_ORDER) {
    throw qcow2Problem(name, 'it is not an empty layer');
  }
  const refcountTable = {
    offset: Number(start.readBigUInt64BE(REFCOUNT_TABLE_OFFSET_AT)),
    clusters: start.readUInt32BE(REFCOUNT_TABLE_CLUSTERS_AT),
  };
  const table = await readPart(file, refcountTable.offset, refcountTable.clusters * clusterBytes);
  const refcountBlocks: number[] = [];
  for (let at = 0; at < table.length && table.readBigUInt64BE(at) !== 0n; at += ENTRY_BYTES) {
    refcountBlocks.push(Number(table.readBigUInt64BE(at)));
  }
  return { clusterBytes, l1Entries, l1Offset, refcountTable, refcountBlocks };
}

async function readPart(file: FileHandle, offset: number, length: number): Promise<Buffer> {
  const { buffer, bytesRead } = await file.read(Buffer.alloc(length), 0, length, offset);
  return buffer.subarray(0, bytesRead);
}
