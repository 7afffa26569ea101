import { AppError } from '../src/lib/errors.js';
import { isUlid, type LayerId } from '../src/lib/id.js';
import type { HashAlgorithm } from '../src/nbd/index.js';

/**
 * The bytes of a `.sums` file (FORMAT.md has the table): a header of 64 bytes, entries of one size,
 * a footer of 16 bytes with their number. All integers are little-endian.
 */
export const SUMS_HEADER_BYTES = 64;
export const SUMS_FOOTER_BYTES = 16;
export const SUMS_VERSION = 1;
/** Each entry starts with the cluster index, bit 63 set for a zero cluster. */
export const ENTRY_INDEX_BYTES = 8;

// The line feed and 0x1A catch text conversions of a transfer, as in PNG (RFC 2083, 12.11).
const HEADER_MAGIC = Buffer.from('HFSUMS\x1a\n', 'latin1');
const FOOTER_MAGIC = Buffer.from('HFSUMEND', 'latin1');
const ZERO_FLAG = 0x8000_0000;
const HIGH_WORD = 0x1_0000_0000;
const ULID_BYTES = 26;

const ALGORITHMS: readonly { id: number; name: HashAlgorithm; hashBytes: number }[] = [
  { id: 1, name: 'xxh3-128', hashBytes: 16 },
  { id: 2, name: 'sha-256', hashBytes: 32 },
];

export function hashBytesOf(algorithm: HashAlgorithm): number {
  return algorithm === 'xxh3-128' ? 16 : 32;
}

export interface SumsHeader {
  hash: HashAlgorithm;
  clusterBytes: number;
  layerId: LayerId;
  /** Exact disk size: the last cluster is hashed up to here. */
  diskBytes: number;
}

export function entryBytesOf(hash: HashAlgorithm): number {
  return ENTRY_INDEX_BYTES + hashBytesOf(hash);
}

export function encodeSumsHeader(header: SumsHeader): Buffer {
  const data = Buffer.alloc(SUMS_HEADER_BYTES);
  HEADER_MAGIC.copy(data, 0);
  data.writeUInt32LE(SUMS_VERSION, 8);
  data.writeUInt32LE(ALGORITHMS.find((item) => item.name === header.hash)?.id ?? 0, 12);
  data.writeUInt32LE(header.clusterBytes, 16);
  data.writeUInt32LE(entryBytesOf(header.hash), 20);
  data.writeBigUInt64LE(BigInt(header.diskBytes), 24);
  data.write(header.layerId, 32, ULID_BYTES, 'latin1');
  return data;
}

export function encodeSumsFooter(entryCount: number): Buffer {
  const data = Buffer.alloc(SUMS_FOOTER_BYTES);
  FOOTER_MAGIC.copy(data, 0);
  data.writeBigUInt64LE(BigInt(entryCount), 8);
  return data;
}

/** Throws LAYER_CORRUPT unless every field is what this version writes. */
export function decodeSumsHeader(data: Buffer, file: string): SumsHeader {
  if (data.length !== SUMS_HEADER_BYTES || !data.subarray(0, 8).equals(HEADER_MAGIC)) {
    throw corruptSums(file, 'it does not begin as a sums file');
  }
  if (data.readUInt32LE(8) !== SUMS_VERSION) throw corruptSums(file, 'it is of another version');
  const algorithm = ALGORITHMS.find((item) => item.id === data.readUInt32LE(12));
  if (algorithm === undefined) throw corruptSums(file, 'its hash algorithm is unknown');
  const clusterBytes = data.readUInt32LE(16);
  const diskBytes = Number(data.readBigUInt64LE(24));
  const layerId = data.toString('latin1', 32, 32 + ULID_BYTES);
  const isGood =
    clusterBytes >= 512 &&
    clusterBytes <= 2 ** 21 &&
    (clusterBytes & (clusterBytes - 1)) === 0 &&
    data.readUInt32LE(20) === ENTRY_INDEX_BYTES + algorithm.hashBytes &&
    Number.isSafeInteger(diskBytes) &&
    isUlid(layerId) &&
    data.subarray(32 + ULID_BYTES).every((byte) => byte === 0);
  if (!isGood) throw corruptSums(file, 'its header is damaged');
  return { hash: algorithm.name, clusterBytes, diskBytes, layerId: layerId as LayerId };
}

/** The number of entries, from the file's size and its footer, which must agree. */
export function decodeSumsFooter(
  data: Buffer,
  facts: { fileBytes: number; header: SumsHeader; file: string },
): number {
  const { fileBytes, header, file } = facts;
  const entriesBytes = fileBytes - SUMS_HEADER_BYTES - SUMS_FOOTER_BYTES;
  const count = entriesBytes / entryBytesOf(header.hash);
  const isGood =
    data.length === SUMS_FOOTER_BYTES &&
    data.subarray(0, 8).equals(FOOTER_MAGIC) &&
    Number.isInteger(count) &&
    data.readBigUInt64LE(8) === BigInt(count);
  if (!isGood) throw corruptSums(file, 'it was cut short or has a damaged end');
  return count;
}

/** The cluster index of the entry at `offset` (flag removed). */
export function entryIndex(data: Buffer, offset: number): number {
  return (data.readUInt32LE(offset + 4) & 0x7fff_ffff) * HIGH_WORD + data.readUInt32LE(offset);
}

export function entryIsZero(data: Buffer, offset: number): boolean {
  return data.readUInt32LE(offset + 4) >= ZERO_FLAG;
}

/**
 * Checks packed entries: strictly ascending after `last`, all below `limit`.
 * Returns the last index. Throws LAYER_CORRUPT naming the file.
 */
export function checkEntryOrder(
  data: Buffer,
  bounds: { entryBytes: number; last: number; limit: number; file: string },
): number {
  let last = bounds.last;
  for (let offset = 0; offset < data.length; offset += bounds.entryBytes) {
    const index = entryIndex(data, offset);
    if (index <= last || index >= bounds.limit) {
      throw corruptSums(bounds.file, 'its entries are not in ascending order within the disk');
    }
    last = index;
  }
  return last;
}

export function corruptSums(file: string, problem: string, details: Record<string, unknown> = {}): AppError {
  return new AppError('LAYER_CORRUPT', `the sums file of a layer cannot be used: ${problem}`, {
    details: { file, problem, ...details },
  });
}
