import { reloadExportDaemon, removeExportFile, replaceExportFile } from '../exports/index.js';
import type { ExportRow } from '../db/database.js';
import { isErrorCode } from '../lib/errors.js';
import type { VolumeId } from '../lib/id.js';
import type { EngineContext } from './context.js';
import { definitionOf } from './export-record.js';

/**
 * The device of a volume with an export came back. What the export daemon could not open it serves now. When it was
 * another appearance of the device that it opened (`isOtherDevice`), it must open the new one: until then its clients
 * have had nothing but errors.
 */
export async function refreshVolumeExports(
  context: EngineContext,
  volumeId: VolumeId,
  { isOtherDevice }: { isOtherDevice: boolean },
): Promise<void> {
  const rows = (await context.db.exports.listAll({ volumeId })).filter(({ state }) => state === 'published');
  if (rows.length === 0) return;
  if (isOtherDevice) {
    // The daemon opens an image again when its file says something else.
    for (const row of rows) await rewrite(context, row, 'the device of this volume is opened again');
    await reload(context, volumeId);
    for (const row of rows) await rewrite(context, row, definitionOf(row).description);
  }
  await reload(context, volumeId);
}

async function reload({ settings, logger }: EngineContext, volumeId: VolumeId): Promise<void> {
  try {
    await reloadExportDaemon(settings.exports, { timeoutMs: settings.exports.publishTimeoutMs });
  } catch (error) {
    // It reads its directory when it starts.
    if (!isErrorCode(error, 'EXPORT_DAEMON_UNAVAILABLE')) throw error;
    logger.warn({ err: error, volumeId }, 'the export daemon was not told that a volume is back');
  }
}

/** An export that was removed meanwhile stays removed: no file is without a row. */
async function rewrite(
  { db, settings }: EngineContext,
  row: ExportRow,
  description: string | null,
): Promise<void> {
  const { directory } = settings.exports;
  try {
    await replaceExportFile(directory, { ...definitionOf(row), description });
  } catch (error) {
    if (!isErrorCode(error, 'NOT_FOUND')) throw error;
  }
  if ((await db.exports.get(row.id))?.state !== 'published') await removeExportFile(directory, row.name);
}
