import { createHash } from 'node:crypto';
import { AppError } from '../lib/errors.js';

/** What every NBD client and server here can handle, and a file name with room for an ending. */
export const MAX_EXPORT_NAME = 63;
const EXPORT_NAME = /^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$/;
/** The end is anchored and the first group greedy: what stands in the machine's part cannot be taken for the rest. */
const BACKUP_NAME = /^backup-(.+)-disk(0|[1-9]\d{0,5})-(full|incr)-(\d{8}T\d{6}Z)-([0-9a-hjkmnp-tv-z]{8})$/;
const MAX_DISK_NUMBER = 999_999;
const ID_CHARACTERS = 8;
const HASH_CHARACTERS = 6;

export interface BackupExportParts {
  /** The machine's name as far as an export name can hold it. */
  vm: string;
  /** Fixed when the disk was recorded; not a position in a list. */
  diskNumber: number;
  type: 'full' | 'incr';
  /** When the layer was taken, in whole seconds. */
  createdAtMs: number;
  /** From the end of the layer's ULID, in lower case. */
  id: string;
}

/** True for names that an export can have: 1 to 63 letters, digits, `.`, `_` and `-`, beginning with a letter or digit. */
export function isExportName(text: string): boolean {
  return EXPORT_NAME.test(text);
}

/**
 * The name of a backup's export, `backup-<vm>-disk<N>-<full|incr>-<YYYYMMDDTHHMMSSZ>-<id>`, at most 63
 * characters. A machine name that is too long or has other characters is cut and given a hash of itself.
 */
export function makeBackupExportName(options: {
  vmName: string;
  diskNumber: number;
  type: 'full' | 'incr';
  createdAtMs: number;
  layerId: string;
}): string {
  const { vmName, diskNumber, type, createdAtMs, layerId } = options;
  if (!Number.isInteger(diskNumber) || diskNumber < 0 || diskNumber > MAX_DISK_NUMBER) {
    throw new AppError('INVALID_INPUT', `${diskNumber} is not the number of a disk`);
  }
  const id = layerId.slice(-ID_CHARACTERS).toLowerCase();
  const tail = `-disk${diskNumber}-${type}-${compactTime(createdAtMs)}-${id}`;
  const head = 'backup-';
  return head + fitVmName(vmName, MAX_EXPORT_NAME - head.length - tail.length) + tail;
}

/** The parts of a name that `makeBackupExportName` made, or null for any other name. */
export function parseBackupExportName(name: string): BackupExportParts | null {
  const match = isExportName(name) ? BACKUP_NAME.exec(name) : null;
  if (match === null) return null;
  const [, vm = '', diskNumber = '', type, time = '', id = ''] = match;
  const createdAtMs = parseCompactTime(time);
  if (createdAtMs === null) return null;
  return { vm, diskNumber: Number(diskNumber), type: type === 'full' ? 'full' : 'incr', createdAtMs, id };
}

function fitVmName(name: string, limit: number): string {
  const plain = name.replace(/[^A-Za-z0-9._-]+/g, '_');
  if (plain === name && plain !== '' && plain.length <= limit) return plain;
  const hash = createHash('sha256').update(name).digest('hex').slice(0, HASH_CHARACTERS);
  return `${plain.slice(0, limit - HASH_CHARACTERS - 1)}-${hash}`;
}

/** ISO 8601 in its basic format, whole seconds, UTC. */
function compactTime(ms: number): string {
  const text = new Date(ms).toISOString();
  if (text.length !== 24)
    throw new AppError('INVALID_INPUT', `the year of ${text} does not have four digits`);
  return `${text.slice(0, 19).replaceAll(/[-:]/g, '')}Z`;
}

function parseCompactTime(text: string): number | null {
  const iso = text.replace(/^(....)(..)(..T..)(..)(..Z)$/, '$1-$2-$3:$4:$5');
  const ms = Date.parse(iso);
  // Date.parse takes 31 February for a day in March.
  return !Number.isNaN(ms) && compactTime(ms) === text ? ms : null;
}
