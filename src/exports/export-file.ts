import { createHash } from 'node:crypto';
import path from 'node:path';
import { AppError } from '../lib/errors.js';
import { isExportName } from './export-name.js';
import { formatIniSection, parseIniSection } from './ini.js';

/** What files of exports end with; other files in the directory are nobody's exports. */
export const EXPORT_FILE_ENDING = '.conf';
export const MAX_EXPORT_FILE_BYTES = 64 * 1024;
/** NBD's limit of a string is 4096 bytes, of up to 4 bytes for each character. */
const MAX_DESCRIPTION = 1000;

/** Whom an export is for, where it is not for everybody who reaches the daemon. */
export type ExportIdentity = { kind: 'psk'; user: string } | { kind: 'x509'; distinguishedName: string };

/** An export that only one identity may use is served at an address of its own, always with TLS. */
export interface OwnAddress {
  identity: ExportIdentity;
  at: { port: number } | { socket: string };
}

export interface ExportDefinition {
  name: string;
  /** Absolute. */
  imagePath: string;
  format: 'raw' | 'qcow2';
  isReadOnly: boolean;
  /** Exact size the disk must have; null when any is right. */
  sizeBytes: number | null;
  description: string | null;
  /** The image takes up what its backing files hold, while it is served, and stands alone then. */
  materialize: boolean;
  /** Null: served on the addresses that all exports share. */
  own: OwnAddress | null;
}

const OUR_KEYS = [
  ...['exportname', 'readonly', 'format', 'size', 'description', 'materialize'],
  ...['identity', 'port', 'socket', 'prerun'],
];
/** Keys of nbd-server that change how it serves, not what is served. */
const FOREIGN_KEYS = ['flush', 'fua', 'trim', 'rotational', 'sync'];
const KNOWN_KEYS = new Set([...OUR_KEYS, ...FOREIGN_KEYS]);

/**
 * A command that fails before nbd-server serves an export makes it refuse the client. It would serve the
 * bytes of a QCOW2 container, and an export of one identity to everybody.
 */
const KEEP_NBD_SERVER_OUT = '/bin/false';

function invalid(problem: string): AppError {
  return new AppError('INVALID_INPUT', problem);
}

/** Reads the text of an export file. INVALID_INPUT, in words for whoever wrote it, for anything not known. */
export function parseExportFile(text: string): ExportDefinition {
  const { name, values } = parseIniSection(text);
  if (!isExportName(name)) {
    throw invalid(
      name.length > 63
        ? `the name has ${name.length} characters, and an export name has at most 63`
        : 'the name has other characters than letters, digits, `.`, `_` and `-`, or does not begin with a letter or digit',
    );
  }
  const unknown = [...values.keys()].find((key) => !KNOWN_KEYS.has(key));
  if (unknown !== undefined) throw invalid(`the key ${unknown.slice(0, 40)} is not supported`);
  const prerun = values.get('prerun');
  if (prerun !== undefined && prerun !== KEEP_NBD_SERVER_OUT) {
    throw invalid(`prerun is supported only as ${KEEP_NBD_SERVER_OUT}, which keeps nbd-server out`);
  }
  const definition: ExportDefinition = {
    name,
    imagePath: readPath('exportname', required(values, 'exportname')),
    format: readFormat(required(values, 'format')),
    isReadOnly: readBoolean('readonly', required(values, 'readonly')),
    sizeBytes: readSize(values.get('size')),
    description: readDescription(values.get('description')),
    materialize: readBoolean('materialize', values.get('materialize') ?? 'false'),
    own: readOwnAddress(values),
  };
  if (definition.materialize && (definition.isReadOnly || definition.format !== 'qcow2')) {
    throw invalid('materialize is for a writable export of a qcow2 image');
  }
  return definition;
}

/** The text of an export file; what `parseExportFile` reads back. INVALID_INPUT when no file can say it. */
export function formatExportFile(definition: ExportDefinition): string {
  const { name, imagePath, format, isReadOnly, sizeBytes, description, materialize, own } = definition;
  const values = new Map([
    ['exportname', imagePath],
    ['readonly', String(isReadOnly)],
    ['format', format],
  ]);
  if (sizeBytes !== null) values.set('size', String(sizeBytes));
  if (description !== null) values.set('description', description);
  if (materialize) values.set('materialize', 'true');
  if (own !== null) {
    const { identity, at } = own;
    values.set(
      'identity',
      identity.kind === 'psk' ? `psk:${identity.user}` : `x509:${identity.distinguishedName}`,
    );
    if ('port' in at) values.set('port', String(at.port));
    else values.set('socket', at.socket);
  }
  if (format !== 'raw' || own !== null) values.set('prerun', KEEP_NBD_SERVER_OUT);
  const text = formatIniSection({ name, values });
  parseExportFile(text);
  return text;
}

/** By this digest a publisher knows that the daemon has read its version of a file: SHA-256, in hexadecimal. */
export function digestExportFile(content: Buffer | string): string {
  return createHash('sha256').update(content).digest('hex');
}

function required(values: Map<string, string>, key: string): string {
  const value = values.get(key);
  if (value === undefined) throw invalid(`${key} must be stated`);
  return value;
}

function readPath(key: string, value: string): string {
  if (!path.isAbsolute(value) || value.includes('\0')) throw invalid(`${key} must be an absolute path`);
  return value;
}

function readFormat(value: string): 'raw' | 'qcow2' {
  if (value !== 'raw' && value !== 'qcow2') throw invalid('format must be raw or qcow2');
  return value;
}

/** The words that GKeyFile takes for a boolean. */
function readBoolean(key: string, value: string): boolean {
  if (value === 'true' || value === '1') return true;
  if (value === 'false' || value === '0') return false;
  throw invalid(`${key} must be true or false`);
}

function readSize(value: string | undefined): number | null {
  if (value === undefined) return null;
  const size = /^\d{1,16}$/.test(value) ? Number(value) : NaN;
  if (!Number.isSafeInteger(size) || size === 0) throw invalid('size must be a number of bytes');
  return size;
}

function readDescription(value: string | undefined): string | null {
  if (value === undefined) return null;
  if (value.length > MAX_DESCRIPTION || value.includes('\0')) {
    throw invalid(`description must have at most ${MAX_DESCRIPTION} characters`);
  }
  return value;
}

function readOwnAddress(values: Map<string, string>): OwnAddress | null {
  const identity = values.get('identity');
  const port = values.get('port');
  const socket = values.get('socket');
  if (identity === undefined) {
    if (port === undefined && socket === undefined) return null;
    throw invalid('port and socket are for an export with an identity');
  }
  if ((port === undefined) === (socket === undefined)) {
    throw invalid('an export with an identity needs either a port or a socket of its own');
  }
  return {
    identity: readIdentity(identity),
    at: socket === undefined ? { port: readPort(port ?? '') } : { socket: readPath('socket', socket) },
  };
}

function readIdentity(value: string): ExportIdentity {
  const [, kind, who = ''] = /^(psk|x509):(\P{Cc}{1,255})$/u.exec(value) ?? [];
  if (kind === 'x509') return { kind, distinguishedName: who };
  if (kind === 'psk' && /^[A-Za-z0-9][A-Za-z0-9._-]*$/.test(who)) return { kind, user: who };
  throw invalid('identity must be psk:<user> or x509:<distinguished name>');
}

function readPort(value: string): number {
  const port = /^\d{1,5}$/.test(value) ? Number(value) : 0;
  if (port < 1 || port > 65_535) throw invalid('port must be a number from 1 to 65535');
  return port;
}
