import { link, open, rm } from 'node:fs/promises';
import path from 'node:path';
import { AppError, errnoOf } from '../lib/errors.js';
import { newUlid } from '../lib/id.js';
import {
  digestExportFile,
  EXPORT_FILE_ENDING,
  formatExportFile,
  type ExportDefinition,
} from './export-file.js';

/** A file as it was written; by its digest the daemon's word on it is recognised. */
export interface WrittenExportFile {
  /** Name in the directory. */
  file: string;
  digest: string;
}

export function exportFileName(exportName: string): string {
  return `${exportName}${EXPORT_FILE_ENDING}`;
}

/**
 * Writes the file of a new export: whole or not at all, synced. CONFLICT when there is one of this name,
 * and it stays as it is. The daemon reads it at its next SIGHUP.
 */
export async function createExportFile(
  directory: string,
  definition: ExportDefinition,
): Promise<WrittenExportFile> {
  const text = formatExportFile(definition);
  const file = exportFileName(definition.name);
  // The ending is not that of an export file: nobody reads it before it is complete.
  const partial = path.join(directory, `.${newUlid()}.partial`);
  try {
    await writeSynced(partial, text);
    await link(partial, path.join(directory, file));
  } catch (error) {
    if (errnoOf(error) !== 'EEXIST') throw error;
    throw new AppError('CONFLICT', `there is an export ${definition.name} already`, { cause: error });
  } finally {
    await rm(partial, { force: true });
  }
  await syncDirectory(directory);
  return { file, digest: digestExportFile(text) };
}

/** Removes the file of an export; none there is fine. The daemon stops serving it at its next SIGHUP. */
export async function removeExportFile(directory: string, exportName: string): Promise<void> {
  await rm(path.join(directory, exportFileName(exportName)), { force: true });
  await syncDirectory(directory);
}

async function writeSynced(file: string, text: string): Promise<void> {
  const handle = await open(file, 'wx', 0o644);
  try {
    await handle.writeFile(text);
    await handle.sync();
  } finally {
    await handle.close();
  }
}

async function syncDirectory(directory: string): Promise<void> {
  const handle = await open(directory, 'r');
  try {
    await handle.sync();
  } finally {
    await handle.close();
  }
}
