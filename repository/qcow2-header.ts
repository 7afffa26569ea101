import { AppError } from '../src/lib/errors.js';

/**
 * The header of a QCOW2 file (qemu docs/interop/qcow2.txt), every field checked against the file
 * before it is used: layers may come from a hostile directory.
 */
export interface Qcow2Header {
  version: 2 | 3;
  clusterBits: number;
  clusterBytes: number;
  virtualBytes: number;
  backingFile: string | null;
  /** The format the header states for the backing file; null when it states none. */
  backingFormat: string | null;
  l1Entries: number;
  l1Offset: number;
}

/** What the header parser needs: the first cluster is always enough. */
export const MAX_HEADER_BYTES = 2 ** 21;

const MAGIC = 0x514649fb;
const V2_HEADER_BYTES = 72;
const V3_HEADER_BYTES = 104;
const EXTENSION_END = 0;
const EXTENSION_BACKING_FORMAT = 0xe2792aca;
const MAX_BACKING_NAME = 1023;
const MAX_L1_BYTES = 32 * 1024 * 1024;

const INCOMPATIBLE = {
  dirty: 1n,
  corrupt: 2n,
  externalData: 4n,
  compressionType: 8n,
  extendedL2: 16n,
} as const;

/** Throws LAYER_CORRUPT for anything that is no sound QCOW2 header or needs a feature layers never have. */
export function parseQcow2Header(data: Buffer, fileBytes: number, file: string): Qcow2Header {
  const bad = (problem: string): AppError => qcow2Problem(file, problem);
  if (data.length < V2_HEADER_BYTES || data.readUInt32BE(0) !== MAGIC) throw bad('it is not a QCOW2 file');
  const version = data.readUInt32BE(4);
  if (version !== 2 && version !== 3) throw bad('its QCOW2 version is unknown');
  if (version === 3 && data.length < V3_HEADER_BYTES) throw bad('its header is cut short');
  const clusterBits = data.readUInt32BE(20);
  if (clusterBits < 9 || clusterBits > 21) throw bad('its cluster size is out of range');
  const clusterBytes = 2 ** clusterBits;
  const virtualBytes = safeNumber(data.readBigUInt64BE(24));
  if (virtualBytes === undefined) throw bad('its disk size is out of range');
  if (data.readUInt32BE(32) !== 0) throw bad('it is encrypted');
  const headerBytes = version === 2 ? V2_HEADER_BYTES : data.readUInt32BE(100);
  if (headerBytes < V2_HEADER_BYTES || (version === 3 && headerBytes < V3_HEADER_BYTES)) {
    throw bad('its header length is out of range');
  }
  if (version === 3) requireKnownFeatures(data.readBigUInt64BE(72), bad);
  const l1 = parseL1(data, { clusterBytes, virtualBytes, fileBytes, bad });
  const backing = parseBacking(data, { headerBytes, clusterBytes, bad });
  return { version, clusterBits, clusterBytes, virtualBytes, ...l1, ...backing };
}

type Bad = (problem: string) => AppError;

function requireKnownFeatures(bits: bigint, bad: Bad): void {
  if ((bits & INCOMPATIBLE.dirty) !== 0n) throw bad('it was not closed cleanly (dirty bit)');
  if ((bits & INCOMPATIBLE.corrupt) !== 0n) throw bad('QEMU has marked it corrupt');
  if ((bits & INCOMPATIBLE.externalData) !== 0n) throw bad('its data lies in another file');
  if ((bits & INCOMPATIBLE.extendedL2) !== 0n) throw bad('it has extended L2 entries');
  const known =
    INCOMPATIBLE.dirty | INCOMPATIBLE.corrupt | INCOMPATIBLE.externalData | INCOMPATIBLE.extendedL2;
  if ((bits & ~(known | INCOMPATIBLE.compressionType)) !== 0n)
    throw bad('it needs a QCOW2 feature that is unknown');
  if ((bits & INCOMPATIBLE.compressionType) !== 0n) throw bad('it has another compression than the default');
}

function parseL1(
  data: Buffer,
  facts: { clusterBytes: number; virtualBytes: number; fileBytes: number; bad: Bad },
): { l1Entries: number; l1Offset: number } {
  const { clusterBytes, virtualBytes, fileBytes, bad } = facts;
  const l1Offset = safeNumber(data.readBigUInt64BE(40));
  const stated = data.readUInt32BE(36);
  const needed = Math.ceil(virtualBytes / (clusterBytes * (clusterBytes / 8)));
  if (needed * 8 > MAX_L1_BYTES || stated * 8 > MAX_L1_BYTES) throw bad('its L1 table is out of range');
  if (stated < needed) throw bad('its L1 table is smaller than its disk');
  if (l1Offset === undefined || l1Offset % clusterBytes !== 0 || l1Offset + needed * 8 > fileBytes) {
    throw bad('its L1 table lies outside the file');
  }
  return { l1Entries: needed, l1Offset };
}

function parseBacking(
  data: Buffer,
  facts: { headerBytes: number; clusterBytes: number; bad: Bad },
): { backingFile: string | null; backingFormat: string | null } {
  const { headerBytes, clusterBytes, bad } = facts;
  const nameOffset = safeNumber(data.readBigUInt64BE(8));
  const nameBytes = data.readUInt32BE(16);
  const limit = Math.min(clusterBytes, data.length);
  if (nameOffset === undefined) throw bad('its backing file name lies outside the header');
  const hasName = nameOffset !== 0;
  if (hasName) {
    const isInside = nameOffset >= headerBytes && nameOffset + nameBytes <= limit;
    if (!isInside || nameBytes === 0 || nameBytes > MAX_BACKING_NAME) {
      throw bad('its backing file name lies outside the header');
    }
  }
  const extensions = { start: headerBytes, end: hasName ? nameOffset : limit, bad };
  return {
    backingFile: hasName ? data.toString('utf8', nameOffset, nameOffset + nameBytes) : null,
    backingFormat: readBackingFormat(data, extensions),
  };
}

function readBackingFormat(data: Buffer, facts: { start: number; end: number; bad: Bad }): string | null {
  let offset = facts.start;
  while (offset + 8 <= facts.end) {
    const type = data.readUInt32BE(offset);
    const length = data.readUInt32BE(offset + 4);
    if (type === EXTENSION_END) return null;
    const dataStart = offset + 8;
    if (dataStart + length > facts.end) throw facts.bad('a header extension is longer than the header');
    if (type === EXTENSION_BACKING_FORMAT) return data.toString('utf8', dataStart, dataStart + length);
    offset = dataStart + Math.ceil(length / 8) * 8;
  }
  return null;
}

function safeNumber(value: bigint): number | undefined {
  return value <= BigInt(Number.MAX_SAFE_INTEGER) ? Number(value) : undefined;
}

export function qcow2Problem(file: string, problem: string, details: Record<string, unknown> = {}): AppError {
  return new AppError('LAYER_CORRUPT', `a layer file cannot be used: ${problem}`, {
    details: { file, problem, ...details },
  });
}
