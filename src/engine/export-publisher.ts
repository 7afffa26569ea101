import type { ExportRow } from '../db/database.js';
import {
  createExportFile,
  readExportFile,
  removeExportFile,
  type ExportIdentity,
  type WrittenExportFile,
} from '../exports/index.js';
import { CleanupStack } from '../lib/cleanup.js';
import { toTimestamp } from '../lib/clock.js';
import { throwIfAborted } from '../lib/deadline.js';
import { AppError, isErrorCode } from '../lib/errors.js';
import { newId, type DiskId, type ExportId, type LayerId, type PointId } from '../lib/id.js';
import type { RunId, VolumeId } from '../lib/id.js';
import { alignUp, SECTOR_BYTES } from '../lib/units.js';
import type { EngineContext } from './context.js';
import { choosePort } from './export-identities.js';
import { makeOverlay, removeOverlay } from './export-overlay.js';
import { factsOf, type ExportFacts } from './export-record.js';
import {
  lookAtDaemon,
  reloadDaemon,
  reloadDaemonIfAlive,
  requireServed,
  writeExportFile,
} from './export-serving.js';

/** An export that is to be. The caller knows that the image may be served. */
export interface ExportSpec {
  kind: ExportRow['kind'];
  pointId: PointId | null;
  diskId: DiskId | null;
  /** Of a push: the run whose layer it is. The export goes when the run is no longer active. */
  runId: RunId | null;
  volumeId: VolumeId | null;
  /** Of the layer that is served; null for a volume. */
  layerId: LayerId | null;
  /** `makeBackupExportName`, or `migration-vol-<id in lower case>`. */
  name: string;
  /** Absolute. With an overlay, the file that is made. */
  imagePath: string;
  format: 'raw' | 'qcow2';
  isReadOnly: boolean;
  /** Exact size of the disk; clients see whole sectors. */
  sizeBytes: number;
  /** For clients that ask; at most 1000 characters. */
  description: string | null;
  /** Served at a port of its own to this client alone; null: on the addresses of all. */
  identity: ExportIdentity | null;
  /** RFC 3339; null: until it is removed. */
  expiresAt: string | null;
  /**
   * `imagePath` is made anew, as a QCOW2 file on this QCOW2 file, and removed with the export (unless it was
   * materialized).
   */
  overlay: { backingPath: string } | null;
  /**
   * Asked when the row is there and nothing else: rejects when the image may not be served after all. Whoever
   * would take it away writes a row of its own first, and then looks for exports.
   */
  confirm?: () => Promise<void>;
}

export interface PublishedExport {
  row: ExportRow;
  /** TCP first. For an address with TLS the client adds its credentials. */
  uris: string[];
  /** What clients see: whole sectors. */
  sizeBytes: number;
}

/** As `publishAll`, of one. */
export async function publishExport(
  context: EngineContext,
  spec: ExportSpec,
  signal?: AbortSignal,
): Promise<PublishedExport> {
  const [published] = await publishAll(context, [spec], signal);
  if (published === undefined) throw new AppError('INTERNAL', `${spec.name} was not published`);
  return published;
}

/**
 * Publishes several exports with one reload, all or none, and answers in the order of the specs when the NBD
 * server offers each with the right size. On a failure nothing of them is left; what could not be removed is
 * removed by the reaper. Rejects with CONFLICT and `details.exportId` when the name is taken,
 * EXPORT_DAEMON_UNAVAILABLE, EXPORT_REFUSED with the daemon's reason, codes of targets for an overlay that cannot be
 * made, or what `confirm` rejects with.
 */
export async function publishAll(
  context: EngineContext,
  specs: readonly ExportSpec[],
  signal?: AbortSignal,
): Promise<PublishedExport[]> {
  const { problem } = await lookAtDaemon(context);
  if (problem !== null) throw problem;
  const rows: ExportRow[] = [];
  await using undo = new CleanupStack();
  undo.defer(() => takeBack(context, rows));
  for (const spec of specs) rows.push(await record(context, spec));
  for (const { confirm } of specs) await confirm?.();
  for (const row of rows) row.facts = await makeOverlay(context, row);
  throwIfAborted(signal);
  const written: WrittenExportFile[] = [];
  for (const row of rows) {
    written.push(await writeExportFile(context, row, createExportFile));
  }
  await reloadDaemon(context, signal);
  const published: PublishedExport[] = [];
  for (const [index, row] of rows.entries()) {
    const file = written[index];
    if (file === undefined) throw new AppError('INTERNAL', `${row.name} was not written`);
    const uris = await requireServed(context, row, { written: file, signal });
    published.push({ row, uris, sizeBytes: alignUp(factsOf(row).sizeBytes, SECTOR_BYTES) });
  }
  for (const row of rows) {
    await context.db.exports.update(row.id, { state: 'published' });
    row.state = 'published';
  }
  undo.release();
  return published;
}

/**
 * Removes an export: when this resolves the daemon has closed its image and cut off its clients, or no daemon
 * runs. The overlay goes, unless it was materialized. None there is fine; every step can be repeated. Rejects
 * with EXPORT_DAEMON_UNAVAILABLE when the daemon lives and does not answer: the reaper goes on then.
 */
export async function unpublishExport(context: EngineContext, id: ExportId): Promise<void> {
  const row = await context.db.exports.get(id);
  if (row !== null) await removeExports(context, [row]);
}

/** As `unpublishExport`, all that were published for a run. */
export async function unpublishRun(context: EngineContext, runId: RunId): Promise<void> {
  await removeExports(context, await context.db.exports.listAll({ runId }));
}

/** Of a failure, the first cause is what the caller is told; the reaper goes on with the rest. */
async function takeBack(context: EngineContext, rows: readonly ExportRow[]): Promise<void> {
  try {
    await removeExports(context, rows);
  } catch (error) {
    const names = rows.map(({ name }) => name);
    context.logger.warn({ err: error, names }, 'exports that were not published could not be removed yet');
  }
}

async function removeExports(context: EngineContext, rows: readonly ExportRow[]): Promise<void> {
  if (rows.length === 0) return;
  const { directory } = context.settings.exports;
  const removed: ExportRow[] = [];
  for (const known of rows) {
    const row = await markRemoving(context, known.id);
    // Whoever removed the row has removed the file: one of this name belongs to another export now.
    if (row !== null && (await isOurs(directory, row))) await removeExportFile(directory, row.name);
    removed.push(row ?? known);
  }
  await reloadDaemonIfAlive(context);
  for (const row of removed) {
    await removeOverlay(row);
    await context.db.exports.remove(row.id);
  }
}

async function markRemoving(context: EngineContext, id: ExportId): Promise<ExportRow | null> {
  try {
    await context.db.exports.update(id, { state: 'removing' });
  } catch (error) {
    if (!isErrorCode(error, 'NOT_FOUND')) throw error;
  }
  return context.db.exports.get(id);
}

/** A file of somebody else, who has had the name before us, serves another image. */
async function isOurs(directory: string, row: ExportRow): Promise<boolean> {
  const definition = await readExportFile(directory, row.name);
  return definition?.imagePath === factsOf(row).imagePath;
}

/** Rows are made one after another: of two that look for a port, the second must see the first. */
let recording: Promise<unknown> = Promise.resolve();

function record(context: EngineContext, spec: ExportSpec): Promise<ExportRow> {
  const next = recording.then(() => insertRow(context, spec));
  recording = next.catch(() => undefined);
  return next;
}

async function insertRow(context: EngineContext, spec: ExportSpec): Promise<ExportRow> {
  const { kind, name, pointId, diskId, runId, volumeId, expiresAt, identity, overlay } = spec;
  const { layerId, imagePath, format, isReadOnly, sizeBytes, description } = spec;
  const facts: ExportFacts = {
    ...{ layerId, imagePath, format, isReadOnly, sizeBytes, description, identity },
    at: identity === null ? null : await choosePort(context, identity),
    overlay: overlay === null ? null : { ...overlay, inode: null },
    materialization: null,
    workerId: context.workerId,
  };
  const nowMs = context.clock.nowMs();
  const row: ExportRow = {
    ...{ id: newId<ExportId>(nowMs), name, kind, state: 'publishing' },
    ...{ pointId, diskId, runId, volumeId, expiresAt, facts },
    createdAt: toTimestamp(nowMs),
  };
  await context.db.exports.insert(row);
  return row;
}
