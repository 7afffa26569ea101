import type { AppError } from './errors.js';

/** The beginning of a QCOW2 file (docs/interop/qcow2.txt of QEMU): what it stands on, and what it needs of its reader. */
export interface Qcow2Start {
  version: 2 | 3;
  clusterBytes: number;
  virtualBytes: number;
  /** Bits of features that a reader must know; 0 in version 2. */
  incompatible: bigint;
  backingFile: string | null;
  /** The format that is stated for the backing file; null when none is. */
  backingFormat: string | null;
}

/** The bit in `incompatible` of a file whose data lies in another one. */
export const QCOW2_EXTERNAL_DATA = 4n;

const MAGIC = 0x514649fb;
const V2_HEADER_BYTES = 72;
const V3_HEADER_BYTES = 104;
const EXTENSION_END = 0;
const EXTENSION_BACKING_FORMAT = 0xe2792aca;
const MAX_BACKING_NAME = 1023;

type Bad = (problem: string) => AppError;

export function hasQcow2Magic(data: Buffer): boolean {
  return data.length >= 4 && data.readUInt32BE(0) === MAGIC;
}

/**
 * Reads the start of a QCOW2 file, which may be hostile; the first cluster is always enough, the backing name
 * must lie in `data`. Throws what `bad` makes of the problem.
 */
export function parseQcow2Start(data: Buffer, bad: Bad): Qcow2Start {
  if (data.length < V2_HEADER_BYTES || !hasQcow2Magic(data)) throw bad('it is not a QCOW2 file');
  const version = data.readUInt32BE(4);
  if (version !== 2 && version !== 3) throw bad('its QCOW2 version is unknown');
  const leastBytes = version === 2 ? V2_HEADER_BYTES : V3_HEADER_BYTES;
  if (data.length < leastBytes) throw bad('its header is cut short');
  const clusterBits = data.readUInt32BE(20);
  if (clusterBits < 9 || clusterBits > 21) throw bad('its cluster size is out of range');
  const clusterBytes = 2 ** clusterBits;
  const virtualBytes = Number(data.readBigUInt64BE(24));
  if (!Number.isSafeInteger(virtualBytes)) throw bad('its disk size is out of range');
  const headerBytes = version === 2 ? V2_HEADER_BYTES : data.readUInt32BE(100);
  if (headerBytes < leastBytes) throw bad('its header length is out of range');
  const incompatible = version === 2 ? 0n : data.readBigUInt64BE(72);
  const backing = parseBacking(data.subarray(0, clusterBytes), headerBytes, bad);
  return { version, clusterBytes, virtualBytes, incompatible, ...backing };
}

/** `data` ends with the first cluster. */
function parseBacking(
  data: Buffer,
  headerBytes: number,
  bad: Bad,
): Pick<Qcow2Start, 'backingFile' | 'backingFormat'> {
  const nameOffset = Number(data.readBigUInt64BE(8));
  if (nameOffset === 0) {
    return { backingFile: null, backingFormat: readBackingFormat(data, { start: headerBytes, bad }) };
  }
  const nameBytes = data.readUInt32BE(16);
  const nameEnd = nameOffset + nameBytes;
  if (nameOffset < headerBytes || nameEnd > data.length || nameBytes === 0 || nameBytes > MAX_BACKING_NAME) {
    throw bad('its backing file name lies outside the header');
  }
  return {
    backingFile: data.toString('utf8', nameOffset, nameEnd),
    backingFormat: readBackingFormat(data.subarray(0, nameOffset), { start: headerBytes, bad }),
  };
}

/** Of the header's extensions, which end where `data` does. */
function readBackingFormat(data: Buffer, { start, bad }: { start: number; bad: Bad }): string | null {
  for (let offset = start; offset + 8 <= data.length;) {
    const type = data.readUInt32BE(offset);
    const dataStart = offset + 8;
    const dataEnd = dataStart + data.readUInt32BE(offset + 4);
    if (type === EXTENSION_END) return null;
    if (dataEnd > data.length) throw bad('a header extension is longer than the header');
    if (type === EXTENSION_BACKING_FORMAT) return data.toString('utf8', dataStart, dataEnd);
    offset = dataStart + Math.ceil((dataEnd - dataStart) / 8) * 8;
  }
  return null;
}
