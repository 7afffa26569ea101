import { AppError } from '../src/lib/errors.js';
import { parseQcow2Start, QCOW2_EXTERNAL_DATA, type Qcow2Start } from '../src/lib/qcow2.js';

/**
 * The header of a QCOW2 file (qemu docs/interop/qcow2.txt), every field checked against the file
 * before it is used: layers may come from a hostile directory.
 */
export interface Qcow2Header extends Omit<Qcow2Start, 'incompatible'> {
  l1Entries: number;
  l1Offset: number;
}

const MAX_L1_BYTES = 32 * 1024 * 1024;

const INCOMPATIBLE = {
  dirty: 1n,
  corrupt: 2n,
  externalData: QCOW2_EXTERNAL_DATA,
  compressionType: 8n,
  extendedL2: 16n,
} as const;

/** Throws LAYER_CORRUPT for anything that is no sound QCOW2 header or needs a feature layers never have. */
export function parseQcow2Header(data: Buffer, fileBytes: number, file: string): Qcow2Header {
  const bad = (problem: string): AppError => qcow2Problem(file, problem);
  const { incompatible, ...start } = parseQcow2Start(data, bad);
  if (data.readUInt32BE(32) !== 0) throw bad('it is encrypted');
  requireKnownFeatures(incompatible, bad);
  return { ...start, ...parseL1(data, { ...start, fileBytes, bad }) };
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
  const l1Offset = Number(data.readBigUInt64BE(40));
  const stated = data.readUInt32BE(36);
  const needed = Math.ceil(virtualBytes / (clusterBytes * (clusterBytes / 8)));
  if (needed * 8 > MAX_L1_BYTES || stated * 8 > MAX_L1_BYTES) throw bad('its L1 table is out of range');
  if (stated < needed) throw bad('its L1 table is smaller than its disk');
  if (!Number.isSafeInteger(l1Offset) || l1Offset % clusterBytes !== 0 || l1Offset + needed * 8 > fileBytes) {
    throw bad('its L1 table lies outside the file');
  }
  return { l1Entries: needed, l1Offset };
}

export function qcow2Problem(file: string, problem: string, details: Record<string, unknown> = {}): AppError {
  return new AppError('LAYER_CORRUPT', `a layer file cannot be used: ${problem}`, {
    details: { file, problem, ...details },
  });
}
