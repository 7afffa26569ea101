import path from 'node:path';
import { GIB, KIB, MIB, TIB } from '../lib/units.js';
import type { Schemas } from './client.js';
import { usageFailure } from './failure.js';
import { safeText } from './text.js';

const UNITS: Record<string, number> = { '': 1, B: 1, KIB: KIB, MIB: MIB, GIB: GIB, TIB: TIB };

/** `100MiB` as bytes. Only binary units, so that nobody has to guess. */
export function parseBytes(text: string, what: string): number {
  const match = /^(\d{1,15})\s*([KMGT]iB|B)?$/i.exec(text);
  const bytes = Number(match?.[1]) * (UNITS[(match?.[2] ?? '').toUpperCase()] ?? NaN);
  if (!Number.isSafeInteger(bytes)) {
    throw usageFailure(`${what} ${safeText(text)} is not a size; write it like 100MiB`);
  }
  return bytes;
}

export function parseCount(text: string, what: string): number {
  const value = /^\d{1,9}$/.test(text) ? Number(text) : 0;
  if (value < 1) throw usageFailure(`${what} ${safeText(text)} is not a number from 1`);
  return value;
}

const SECONDS: Record<string, number> = { s: 1, m: 60, h: 3600, d: 86_400 };

/** `90s`, `30m`, `1h` or `7d` as seconds; `0` for none. */
export function parseDuration(text: string, what: string): number {
  if (text === '0') return 0;
  const match = /^(\d{1,9})([smhd])$/.exec(text);
  const seconds = Number(match?.[1]) * (SECONDS[match?.[2] ?? ''] ?? NaN);
  if (!Number.isSafeInteger(seconds)) {
    throw usageFailure(`${what} ${safeText(text)} is not a time; write it like 30m, 1h or 7d`);
  }
  return seconds;
}

/**
 * `key=value,key=value`. Only the given keys begin a new part, so a comma inside a value is kept
 * unless one of the keys and `=` come right after it.
 */
export function parsePairs(text: string, keys: readonly string[], what: string): Map<string, string> {
  const pairs = new Map<string, string>();
  let current = '';
  for (const part of text.split(',')) {
    const key = part.split('=', 1)[0] ?? '';
    if (part.includes('=') && keys.includes(key)) {
      if (pairs.has(key)) throw usageFailure(`${what}: ${key} is given twice`);
      current = key;
      pairs.set(key, part.slice(key.length + 1));
    } else if (current === '') {
      throw usageFailure(`${what}: ${safeText(part)} is none of ${keys.join(', ')}`);
    } else {
      pairs.set(current, `${pairs.get(current) ?? ''},${part}`);
    }
  }
  return pairs;
}

/** The value, which must be one of those allowed. */
export function oneOf<T extends string>(value: string, allowed: readonly T[], what: string): T {
  const found = allowed.find((candidate) => candidate === value);
  if (found === undefined) {
    throw usageFailure(`${what} ${safeText(value)} is none of ${allowed.join(', ')}`);
  }
  return found;
}

const NBD_URI = /^nbds?(\+unix|\+vsock)?:\/\//i;
const DISK_KEYS = [
  'name',
  'source',
  'size',
  'format',
  'tracking',
  'tls-psk-file',
  'tls-username',
  'tls-certificates',
] as const;
type DiskKey = (typeof DISK_KEYS)[number];
type NewDisk = Schemas['NewVm']['disks'][number];
const VOLUME = /^volume:(.+)$/s;

/** The value of `--disk` of `vm add`. A volume is there as it was named; see `findVolume`. */
export function parseDisk(text: string): NewDisk {
  const what = '--disk';
  const pairs = parsePairs(text, DISK_KEYS, what);
  const need = (key: DiskKey): string => {
    const value = pairs.get(key);
    if (value === undefined || value === '') throw usageFailure(`${what}: ${key}= is missing`);
    return value;
  };
  const name = need('name');
  const where = need('source');
  if (where === 'push') return { name, source: parsePushed(pairs, need('size')) };
  if (pairs.has('size')) throw usageFailure(`${what}: size= is for source=push alone`);
  const changeTracking = oneOf(
    pairs.get('tracking') ?? 'auto',
    ['auto', 'bitmap', 'compare'],
    `${what}: tracking`,
  );
  const tls = parseTls(pairs);
  if (NBD_URI.test(where)) {
    if (pairs.has('format')) throw usageFailure(`${what}: format= is for files, not for an NBD export`);
    return { name, source: { kind: 'nbd', uri: where, changeTracking, ...(tls === null ? {} : { tls }) } };
  }
  if (tls !== null) throw usageFailure(`${what}: tls-… is for an NBD export`);
  const volume = VOLUME.exec(where)?.[1];
  if (volume !== undefined) {
    if (pairs.has('format')) throw usageFailure(`${what}: a volume has no format`);
    return { name, source: { kind: 'volume', volumeId: volume, changeTracking } };
  }
  if (!path.isAbsolute(where)) {
    throw usageFailure(`${what}: source= must be an NBD URI, an absolute path, volume:VOLUME or push`);
  }
  const format = oneOf(need('format'), ['raw', 'qcow2'], `${what}: format`);
  return { name, source: { kind: 'image', path: where, format, changeTracking } };
}

/** A disk that an agent pushes in has a size and nothing else. */
function parsePushed(pairs: Map<string, string>, size: string): Schemas['PushDiskSource'] {
  const other = DISK_KEYS.find((key) => !['name', 'source', 'size'].includes(key) && pairs.has(key));
  if (other !== undefined) throw usageFailure(`--disk: ${other}= does not go with source=push`);
  return { kind: 'push', sizeBytes: parseBytes(size, '--disk: size') };
}

function parseTls(pairs: Map<string, string>): Schemas['TlsFiles'] | null {
  const certificates = pairs.get('tls-certificates');
  const pskFile = pairs.get('tls-psk-file');
  const username = pairs.get('tls-username');
  if (certificates === undefined && pskFile === undefined && username === undefined) return null;
  return {
    ...(certificates === undefined ? {} : { certificates }),
    ...(pskFile === undefined ? {} : { pskFile }),
    ...(username === undefined ? {} : { username }),
  };
}

/** The value of an option that is a JSON object; what is in it is for the daemon to check. */
export function parseJsonObject(text: string, what: string): object {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch {
    throw usageFailure(`${what} is not JSON`);
  }
  if (typeof value !== 'object' || value === null || Array.isArray(value)) {
    throw usageFailure(`${what} is not a JSON object`);
  }
  return value;
}

/** `NAME=WHERE` of `restore run --disk`: the disk's name and the target, a volume as it was named. */
export function parseRestoreDisk(text: string): { disk: string; target: Schemas['TargetSpec'] } {
  const what = '--disk';
  const split = text.indexOf('=');
  const disk = text.slice(0, Math.max(split, 0));
  const where = text.slice(split + 1);
  if (disk === '' || where === '') throw usageFailure(`${what} must be NAME=TARGET`);
  if (NBD_URI.test(where)) return { disk, target: { kind: 'nbd', uri: where } };
  const volume = VOLUME.exec(where)?.[1];
  if (volume !== undefined) return { disk, target: { kind: 'volume', volumeId: volume } };
  const { file, format } = splitFormat(where);
  if (!path.isAbsolute(file)) {
    throw usageFailure(
      `${what}: ${safeText(file)} must be an absolute path, a device, a volume or an NBD URI`,
    );
  }
  if (file.startsWith('/dev/') && !file.startsWith('/dev/shm/')) {
    if (format !== null) throw usageFailure(`${what}: a device has no format`);
    return { disk, target: { kind: 'device', path: file } };
  }
  const fallback = file.endsWith('.qcow2') ? 'qcow2' : 'raw';
  return {
    disk,
    target: { kind: 'file', path: file, format: oneOf(format ?? fallback, ['raw', 'qcow2'], 'format') },
  };
}

function splitFormat(where: string): { file: string; format: string | null } {
  const match = /^(.*),format=([^,]*)$/s.exec(where);
  return match === null ? { file: where, format: null } : { file: match[1] ?? '', format: match[2] ?? '' };
}

/** `DISK=BITMAP@POINT` of `--bitmap`. */
export function parseBitmap(text: string): { disk: string; name: string; sincePointId: string } {
  const split = text.indexOf('=');
  const at = text.lastIndexOf('@');
  const parts = {
    disk: text.slice(0, Math.max(split, 0)),
    name: text.slice(split + 1, at),
    sincePointId: text.slice(at + 1),
  };
  if (split < 1 || at < split + 2 || parts.sincePointId === '') {
    throw usageFailure('--bitmap must be DISK=BITMAP@POINT');
  }
  return parts;
}

/** `--psk-user` or `--x509-name`: whom an export is for. */
export function parseIdentity(options: {
  pskUser?: string;
  x509Name?: string;
}): Schemas['PskIdentity'] | Schemas['X509Identity'] | null {
  const { pskUser, x509Name } = options;
  if (pskUser !== undefined && x509Name !== undefined) {
    throw usageFailure('--psk-user and --x509-name: an export is for one of them');
  }
  if (pskUser !== undefined) return { kind: 'psk', user: pskUser };
  return x509Name === undefined ? null : { kind: 'x509', distinguishedName: x509Name };
}
