import { AppError } from '../lib/errors.js';

/** As much of a QCOW2 header as opening a chain with every format stated needs (docs/interop/qcow2.txt of QEMU). */
export interface Qcow2Facts {
  virtualBytes: number;
  backing: { file: string; format: string } | null;
}

/** A header has at most one cluster, of 2 MiB; the backing name ends in it, and QEMU writes it near the start. */
export const HEADER_READ_BYTES = 64 * 1024;
const MAGIC = 0x514649fb;
const V2_HEADER_BYTES = 72;
const MAX_BACKING_NAME = 1023;
const EXTENSION_BACKING_FORMAT = 0xe2792aca;
const EXTERNAL_DATA_FILE = 1n << 2n;

export function hasQcow2Magic(data: Buffer): boolean {
  return data.length >= 4 && data.readUInt32BE(0) === MAGIC;
}

/**
 * Reads the start of a QCOW2 file. SOURCE_FORMAT when it is none, CHAIN_BROKEN when it has a backing file
 * without a format, or names another file for its data: nothing is opened by a guess or beside the chain.
 */
export function readQcow2Facts(data: Buffer, file: string): Qcow2Facts {
  const bad = (problem: string): AppError =>
    new AppError('SOURCE_FORMAT', `${file} cannot be read as qcow2: ${problem}`, { details: { file } });
  if (data.length < V2_HEADER_BYTES || !hasQcow2Magic(data)) throw bad('it does not begin as one');
  const version = data.readUInt32BE(4);
  if (version !== 2 && version !== 3) throw bad(`version ${version} is unknown`);
  const headerBytes = version === 2 ? V2_HEADER_BYTES : data.readUInt32BE(100);
  const virtualBytes = Number(data.readBigUInt64BE(24));
  if (!Number.isSafeInteger(virtualBytes)) throw bad('its size is out of range');
  if (version === 3 && (data.readBigUInt64BE(72) & EXTERNAL_DATA_FILE) !== 0n) {
    throw new AppError('CHAIN_BROKEN', `${file} keeps its data in another file`, { details: { file } });
  }
  const nameOffset = Number(data.readBigUInt64BE(8));
  if (nameOffset === 0) return { virtualBytes, backing: null };
  const nameBytes = data.readUInt32BE(16);
  const nameEnd = nameOffset + nameBytes;
  if (nameOffset < headerBytes || nameBytes === 0 || nameBytes > MAX_BACKING_NAME || nameEnd > data.length) {
    throw bad('its backing file name lies outside the header');
  }
  const format = readBackingFormat(data, { start: headerBytes, end: nameOffset, bad });
  if (format === null) {
    throw new AppError('CHAIN_BROKEN', `${file} does not state the format of its backing file`, {
      details: { file },
    });
  }
  return { virtualBytes, backing: { file: data.toString('utf8', nameOffset, nameEnd), format } };
}

function readBackingFormat(
  data: Buffer,
  { start, end, bad }: { start: number; end: number; bad: (problem: string) => AppError },
): string | null {
  for (let offset = start; offset + 8 <= end;) {
    const type = data.readUInt32BE(offset);
    const dataStart = offset + 8;
    const dataEnd = dataStart + data.readUInt32BE(offset + 4);
    if (type === 0) return null;
    if (dataEnd > end) throw bad('a header extension is longer than the header');
    if (type === EXTENSION_BACKING_FORMAT) return data.toString('utf8', dataStart, dataEnd);
    offset = dataStart + Math.ceil((dataEnd - dataStart) / 8) * 8;
  }
  return null;
}
