import path from 'node:path';
import type { SourceSpec } from '../capture/source.js';
import { DIRTY_BITMAP_PREFIX } from '../nbd/extents.js';
import { parseNbdUri } from '../nbd/uri.js';
import type { TlsOptions } from '../nbd/index.js';
import type { Schemas } from './client.js';
import { usageFailure } from './failure.js';
import { oneOf, parseBytes, parseCount, parseIdentity } from './parse.js';
import { safeText } from './text.js';

export interface CaptureOptions {
  vm: string;
  repository: string;
  disk: string[];
  changeId: string[];
  type: string;
  dirtyContext?: string[];
  format?: string;
  consistency?: string;
  connect?: string;
  pskUser?: string;
  x509Name?: string;
  tlsCertificates?: string;
  tlsPskFile?: string;
  tlsUsername?: string;
  workers: string;
  rate?: string;
  retrySeconds: string;
}

export interface CaptureRequest {
  disks: DiskRequest[];
  type: Schemas['BackupRequest']['type'];
  consistency: Schemas['Consistency'];
  identity: Schemas['PskIdentity'] | Schemas['X509Identity'] | null;
  /** In place of the address in the exports' URIs. */
  address: string | null;
  tls: TlsOptions;
  connections: number;
  bytesPerSecond: number;
  retryMs: number;
}

export interface DiskRequest {
  /** Name or id. */
  disk: string;
  source: SourceSpec;
  changeId: string;
  /** The context that has the changes since a change id, where the user has told. */
  dirty: { context: string; since: string } | null;
}

const NBD_URI = /^nbds?(\+unix)?:\/\//i;
/** Of the copy engine. */
const MOST_WORKERS = 16;
const MOST_RETRY_SECONDS = 86_400;

/** Everything the command line says; what is wrong in it is told before anything begins. */
export function parseCapture(options: CaptureOptions): CaptureRequest {
  const places = splitAll(options.disk, '--disk', 'DISK=SOURCE');
  const changeIds = changeIdsOf(options.changeId, [...places.keys()]);
  const dirty = dirtyContextsOf(options.dirtyContext ?? [], places);
  const disks = [...places].map(([disk, where]) => {
    const changeId = changeIds.get(disk);
    if (changeId === undefined) throw usageFailure(`--change-id for disk ${safeText(disk)} is missing`);
    const told = dirty.get(disk) ?? null;
    return { disk, changeId, dirty: told, source: sourceOf(where, options.format, told?.context ?? null) };
  });
  const isOffline = disks.every(({ source }) => source.kind === 'image');
  const identity = parseIdentity(options);
  const connections = parseCount(options.workers, '--workers');
  if (connections > MOST_WORKERS) throw usageFailure(`--workers is at most ${MOST_WORKERS}`);
  const retrySeconds = options.retrySeconds === '0' ? 0 : parseCount(options.retrySeconds, '--retry-seconds');
  if (retrySeconds > MOST_RETRY_SECONDS)
    throw usageFailure(`--retry-seconds is at most ${MOST_RETRY_SECONDS}`);
  return {
    disks,
    type: oneOf(options.type, ['auto', 'full', 'incremental'], '--type'),
    consistency: oneOf(
      options.consistency ?? (isOffline ? 'offline' : 'crash'),
      ['application', 'crash', 'offline'],
      '--consistency',
    ),
    identity,
    address: options.connect === undefined ? null : checkAddress(options.connect),
    tls: tlsOf(options, identity),
    connections,
    bytesPerSecond: options.rate === undefined ? 0 : parseBytes(options.rate, '--rate'),
    retryMs: retrySeconds * 1000,
  };
}

/** `KEY=VALUE` of an option that is given several times, by key. */
function splitAll(texts: readonly string[], option: string, form: string): Map<string, string> {
  const found = new Map<string, string>();
  for (const text of texts) {
    const split = text.indexOf('=');
    const key = text.slice(0, Math.max(split, 0));
    const value = text.slice(split + 1);
    if (key === '' || value === '') throw usageFailure(`${option} ${safeText(text)} is not ${form}`);
    if (found.has(key)) throw usageFailure(`${option}: ${safeText(key)} is given twice`);
    found.set(key, value);
  }
  return found;
}

/** One id for all disks, or `DISK=ID` for each. */
function changeIdsOf(texts: readonly string[], disks: readonly string[]): Map<string, string> {
  const [only] = texts;
  if (texts.length === 1 && only !== undefined && only !== '' && !only.includes('=')) {
    return new Map(disks.map((disk) => [disk, only]));
  }
  const found = splitAll(texts, '--change-id', 'DISK=ID, nor one id for all disks');
  requireKnown([...found.keys()], disks, '--change-id');
  return found;
}

function dirtyContextsOf(
  texts: readonly string[],
  places: ReadonlyMap<string, string>,
): Map<string, { context: string; since: string }> {
  const found = splitAll(texts, '--dirty-context', 'DISK=CONTEXT[@CHANGE-ID]');
  requireKnown([...found.keys()], [...places.keys()], '--dirty-context');
  return new Map([...found].map(([disk, text]) => [disk, dirtyOf(text)]));
}

/** Without a change id, the bitmap's name is it. */
function dirtyOf(text: string): { context: string; since: string } {
  const at = text.lastIndexOf('@');
  const context = at === -1 ? text : text.slice(0, at);
  const bitmap = context.startsWith(DIRTY_BITMAP_PREFIX) ? context.slice(DIRTY_BITMAP_PREFIX.length) : '';
  const since = at === -1 ? bitmap : text.slice(at + 1);
  if (context === '' || since === '') {
    throw usageFailure(`--dirty-context ${safeText(text)} names no change id; write CONTEXT@CHANGE-ID`);
  }
  return { context, since };
}

function requireKnown(given: readonly string[], disks: readonly string[], option: string): void {
  const unknown = given.find((disk) => !disks.includes(disk));
  if (unknown !== undefined) throw usageFailure(`${option}: there is no --disk ${safeText(unknown)}`);
}

function sourceOf(where: string, format: string | undefined, context: string | null): SourceSpec {
  if (NBD_URI.test(where)) return { kind: 'nbd', uri: parseNbdUri(where).text };
  if (!path.isAbsolute(where)) {
    throw usageFailure(
      `--disk: ${safeText(where)} must be an NBD URI, or the absolute path of a file or device`,
    );
  }
  if (format === undefined) throw usageFailure('--format raw or qcow2 must be stated for a file or device');
  if (context !== null && !context.startsWith(DIRTY_BITMAP_PREFIX)) {
    throw usageFailure(`--dirty-context: a file has contexts of the form ${DIRTY_BITMAP_PREFIX}NAME`);
  }
  const bitmap = context === null ? null : context.slice(DIRTY_BITMAP_PREFIX.length);
  return { kind: 'image', path: where, format: oneOf(format, ['raw', 'qcow2'], '--format'), bitmap };
}

function checkAddress(text: string): string {
  if (parseNbdUri(text).exportName !== '')
    throw usageFailure('--connect is an address, without an export name');
  return text;
}

function tlsOf(options: CaptureOptions, identity: CaptureRequest['identity']): TlsOptions {
  const { tlsCertificates: certificates, tlsPskFile: pskFile } = options;
  const username = options.tlsUsername ?? (identity?.kind === 'psk' ? identity.user : undefined);
  if (certificates !== undefined && pskFile !== undefined) {
    throw usageFailure('give either --tls-certificates or --tls-psk-file');
  }
  if (certificates !== undefined) return { certificates: absolute(certificates, '--tls-certificates') };
  if (pskFile === undefined) {
    if (options.tlsUsername !== undefined) throw usageFailure('--tls-username goes with --tls-psk-file');
    return {};
  }
  if (username === undefined) throw usageFailure('--tls-psk-file needs --tls-username');
  return { pskFile: absolute(pskFile, '--tls-psk-file'), username };
}

function absolute(file: string, option: string): string {
  if (!path.isAbsolute(file)) throw usageFailure(`${option} must be an absolute path`);
  return file;
}
