import { realpath } from 'node:fs/promises';
import path from 'node:path';
import type { ExportRow } from '../db/database.js';
import {
  exportFileName,
  exportUris,
  isExportDaemonAlive,
  readExportStatus,
  reloadExportDaemon,
  removeExportFile,
  requireExportDaemon,
  type ExportFileStatus,
  type ExportListenerStatus,
  type ExportStatus,
  type ExportDefinition,
  type WrittenExportFile,
} from '../exports/index.js';
import { pollUntil } from '../lib/deadline.js';
import { AppError, errnoOf, isErrorCode, toAppError } from '../lib/errors.js';
import { alignUp, SECTOR_BYTES } from '../lib/units.js';
import { connectNbd, type TlsOptions } from '../nbd/index.js';
import type { EngineContext } from './context.js';
import { definitionOf, factsOf } from './export-record.js';

/** As `reloadExportDaemon`, of the daemon that is configured. */
export function reloadDaemon(context: EngineContext, signal?: AbortSignal): Promise<ExportStatus> {
  const { publishTimeoutMs: timeoutMs } = context.settings.exports;
  return reloadExportDaemon(context.settings.exports, { timeoutMs, signal });
}

/**
 * Has the daemon let go of what is no longer in its directory. Resolves also when none runs: its storage daemons
 * end with it. EXPORT_DAEMON_UNAVAILABLE when one lives and does not answer.
 */
export async function reloadDaemonIfAlive(context: EngineContext): Promise<void> {
  const status = await readExportStatus(context.settings.exports.statusFile);
  // The pid file is not asked: without it, a daemon that lives would count as none.
  if (status !== null && (await isExportDaemonAlive(status))) await reloadDaemon(context);
}

/** The daemon's last words, and why nothing can be published through it. */
export async function lookAtDaemon(
  context: EngineContext,
): Promise<{ status: ExportStatus | null; problem: AppError | null }> {
  const { exports } = context.settings;
  try {
    const status = await requireExportDaemon(exports);
    return { status, problem: await otherDirectory(context, status) };
  } catch (error) {
    const problem = toAppError(error);
    const isAway = problem.code === 'EXPORT_DAEMON_UNAVAILABLE';
    return { status: isAway ? await lastWords(exports.statusFile) : null, problem };
  }
}

/** Of a daemon that is not there; null also for a file that is no status of one. */
async function lastWords(statusFile: string): Promise<ExportStatus | null> {
  try {
    return await readExportStatus(statusFile);
  } catch (error) {
    if (isErrorCode(error, 'EXPORT_DAEMON_UNAVAILABLE')) return null;
    throw error;
  }
}

async function otherDirectory(
  context: EngineContext,
  { exportsDirectory }: ExportStatus,
): Promise<AppError | null> {
  const { directory } = context.settings.exports;
  if ((await resolveDirectory(exportsDirectory)) === (await resolveDirectory(directory))) return null;
  return new AppError(
    'EXPORT_DAEMON_UNAVAILABLE',
    `the export daemon reads ${exportsDirectory}, and exports.directory is ${directory}`,
    { details: { exportsDirectory, directory } },
  );
}

/** Two names may lead to one directory; of one that is not there the name must do. */
async function resolveDirectory(directory: string): Promise<string> {
  try {
    return await realpath(directory);
  } catch (error) {
    if (errnoOf(error) === 'ENOENT') return path.resolve(directory);
    throw error;
  }
}

/**
 * Writes the file of an export. Of this and a removal, whichever writes last looks for the other, so that no file
 * outlives its row: NOT_FOUND when the export was removed meanwhile, and nothing of the file is left.
 */
export async function writeExportFile(
  context: EngineContext,
  row: ExportRow,
  write: (directory: string, definition: ExportDefinition) => Promise<WrittenExportFile>,
): Promise<WrittenExportFile> {
  const { directory } = context.settings.exports;
  const written = await write(directory, definitionOf(row));
  if ((await context.db.exports.get(row.id))?.state === row.state) return written;
  await removeExportFile(directory, row.name);
  throw new AppError('NOT_FOUND', `the export ${row.name} was removed meanwhile`);
}

export function entryOf(status: ExportStatus, row: Pick<ExportRow, 'name'>): ExportFileStatus | undefined {
  return status.files.find(({ file }) => file === exportFileName(row.name));
}

/** Where clients find it, TCP first, as `exports.advertisedHost` says. */
export function urisOf(context: EngineContext, status: ExportStatus, entry: ExportFileStatus): string[] {
  const { advertisedHost } = context.settings.exports;
  const listeners = status.listeners.map((listener): ExportListenerStatus => {
    const { address } = listener;
    if (address.kind !== 'tcp' || advertisedHost === null) return listener;
    return { ...listener, address: { ...address, host: advertisedHost } };
  });
  const isTcp = (listener: ExportListenerStatus): number => Number(listener.address.kind === 'tcp');
  listeners.sort((a, b) => isTcp(b) - isTcp(a));
  return exportUris({ ...status, listeners }, entry);
}

/**
 * Waits until the daemon serves the file as it was written, and the NBD server has been asked; answers the URIs.
 * EXPORT_REFUSED with the daemon's reason, or when the server offers another size.
 */
export async function requireServed(
  context: EngineContext,
  row: ExportRow,
  { written, signal }: { written: WrittenExportFile; signal?: AbortSignal | undefined },
): Promise<string[]> {
  const { status, entry } = await pollUntil(
    async () => {
      const now = await requireExportDaemon(context.settings.exports);
      const found = requireEntry(now, written);
      // Its storage daemon may be about to start again.
      return found.listeners.length === 0 ? undefined : { status: now, entry: found };
    },
    {
      timeoutMs: context.settings.exports.publishTimeoutMs,
      what: `the export daemon offering ${row.name}`,
      signal,
    },
  );
  await checkServer(context, row, { status, entry, signal });
  return urisOf(context, status, entry);
}

function requireEntry(status: ExportStatus, { file, digest }: WrittenExportFile): ExportFileStatus {
  const entry = status.files.find((known) => known.file === file && known.digest === digest);
  if (entry === undefined) {
    throw new AppError('EXPORT_REFUSED', `the export daemon does not see ${file} as it was written`);
  }
  if (entry.error !== null) throw refusal(entry);
  return entry;
}

export function refusal({ name, error }: ExportFileStatus): AppError {
  const { code = 'INTERNAL', message = 'no reason was given' } = error ?? {};
  return new AppError(
    'EXPORT_REFUSED',
    `the export daemon cannot serve ${name ?? 'the export'}: ${message}`,
    {
      details: { reason: { code, message } },
    },
  );
}

/** Asks one of the servers for the size; where we have no credentials, the daemon's word counts. */
async function checkServer(
  context: EngineContext,
  row: ExportRow,
  served: { status: ExportStatus; entry: ExportFileStatus; signal?: AbortSignal | undefined },
): Promise<void> {
  const wanted = alignUp(factsOf(row).sizeBytes, SECTOR_BYTES);
  const offered = (await askServer(context, row, served)) ?? served.entry.sizeBytes;
  if (offered === wanted) return;
  throw new AppError('EXPORT_REFUSED', `${row.name} is served with ${String(offered)} bytes, not ${wanted}`, {
    details: { offeredBytes: offered, wantedBytes: wanted },
  });
}

async function askServer(
  context: EngineContext,
  row: ExportRow,
  {
    status,
    entry,
    signal,
  }: { status: ExportStatus; entry: ExportFileStatus; signal?: AbortSignal | undefined },
): Promise<number | null> {
  const offering = status.listeners.filter(({ id }) => entry.listeners.includes(id));
  const open = offering.find(({ tls }) => tls === 'none');
  const tls = open === undefined ? credentialsOf(context, row) : undefined;
  const listener = open ?? (tls === undefined ? undefined : offering[0]);
  if (listener === undefined) return null;
  const [uri = ''] = exportUris(status, { ...entry, listeners: [listener.id] });
  const { connectTimeoutMs, requestTimeoutMs } = context.settings.nbd;
  await using handle = await connectNbd(
    { uri, connectTimeoutMs, requestTimeoutMs, ...(tls === undefined ? {} : { tls }) },
    { signal },
  );
  return handle.info.sizeBytes;
}

function credentialsOf(context: EngineContext, row: ExportRow): TlsOptions | undefined {
  const { identity } = factsOf(row);
  const { identitiesDirectory } = context.settings.exports;
  if (identity?.kind !== 'psk' || identitiesDirectory === null) return undefined;
  return { pskFile: path.join(identitiesDirectory, `${identity.user}.psk`), username: identity.user };
}
