import { constants } from 'node:fs';
import { access, link, open, rename, rm } from 'node:fs/promises';
import path from 'node:path';
import { AppError, errnoOf, isErrorCode } from '../lib/errors.js';
import { newUlid } from '../lib/id.js';
import {
  digestExportFile,
  EXPORT_FILE_ENDING,
  formatExportFile,
  MAX_EXPORT_FILE_BYTES,
  parseExportFile,
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
  try {
    return await placeFile(directory, definition, link);
  } catch (error) {
    if (errnoOf(error) !== 'EEXIST') throw error;
    throw new AppError('CONFLICT', `there is an export ${definition.name} already`, { cause: error });
  }
}

/** Writes another text into the file of an export, at once and synced. NOT_FOUND when it has none. */
export async function replaceExportFile(
  directory: string,
  definition: ExportDefinition,
): Promise<WrittenExportFile> {
  try {
    await access(path.join(directory, exportFileName(definition.name)));
  } catch (error) {
    if (errnoOf(error) !== 'ENOENT') throw error;
    throw new AppError('NOT_FOUND', `there is no export file of ${definition.name}`, { cause: error });
  }
  return placeFile(directory, definition, rename);
}

/** What the file of this name says; null when there is none, or it is not one that can be understood. */
export async function readExportFile(
  directory: string,
  exportName: string,
): Promise<ExportDefinition | null> {
  try {
    // Not to wait for the other end of a pipe that somebody put here.
    const handle = await open(
      path.join(directory, exportFileName(exportName)),
      constants.O_RDONLY | constants.O_NONBLOCK,
    );
    try {
      const facts = await handle.stat();
      if (!facts.isFile() || facts.size > MAX_EXPORT_FILE_BYTES) return null;
      return parseExportFile(await handle.readFile('utf8'));
    } finally {
      await handle.close();
    }
  } catch (error) {
    if (errnoOf(error) === 'ENOENT' || isErrorCode(error, 'INVALID_INPUT')) return null;
    throw error;
  }
}

/** Removes the file of an export; none there is fine. The daemon stops serving it at its next SIGHUP. */
export async function removeExportFile(directory: string, exportName: string): Promise<void> {
  await rm(path.join(directory, exportFileName(exportName)), { force: true });
  await syncDirectory(directory);
}

async function placeFile(
  directory: string,
  definition: ExportDefinition,
  place: (partial: string, file: string) => Promise<void>,
): Promise<WrittenExportFile> {
  const text = formatExportFile(definition);
  const file = exportFileName(definition.name);
  // The ending is not that of an export file: nobody reads it before it is complete.
  const partial = path.join(directory, `.${newUlid()}.partial`);
  try {
    await writeSynced(partial, text);
    await place(partial, path.join(directory, file));
    await syncDirectory(directory);
  } finally {
    await rm(partial, { force: true });
  }
  return { file, digest: digestExportFile(text) };
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
