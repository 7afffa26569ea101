import { constants } from 'node:fs';
import { open, readdir } from 'node:fs/promises';
import path from 'node:path';
import {
  digestExportFile,
  EXPORT_FILE_ENDING,
  MAX_EXPORT_FILE_BYTES,
  parseExportFile,
  type ExportDefinition,
} from '../exports/index.js';
import { AppError, errnoOf } from '../lib/errors.js';

/** An export file as it was found. */
export interface ScannedFile {
  /** Name in the directory. */
  file: string;
  /** Null when it could not be read. */
  digest: string | null;
  modifiedMs: number;
  /** What it says, or what is wrong with it. */
  content: ExportDefinition | AppError;
}

/**
 * Reads all export files of the directory, sorted by name. A bad one is an answer; it rejects only when the
 * directory cannot be listed, which is another thing than an empty one.
 */
export async function scanDirectory(directory: string): Promise<ScannedFile[]> {
  const names = await readdir(directory);
  const wanted = names.filter((name) => name.endsWith(EXPORT_FILE_ENDING) && !name.startsWith('.')).sort();
  const files = await Promise.all(wanted.map((file) => scanFile(directory, file)));
  return files.filter((file) => file !== null);
}

/** Null when it went away between listing and reading. */
async function scanFile(directory: string, file: string): Promise<ScannedFile | null> {
  let digest: string | null = null;
  let modifiedMs = 0;
  try {
    // Not to wait for the other end of a pipe that somebody put here.
    const handle = await open(path.join(directory, file), constants.O_RDONLY | constants.O_NONBLOCK);
    try {
      const facts = await handle.stat();
      modifiedMs = facts.mtimeMs;
      if (!facts.isFile()) throw new AppError('INVALID_INPUT', 'not a file');
      if (facts.size > MAX_EXPORT_FILE_BYTES) throw new AppError('INVALID_INPUT', 'larger than 64 KiB');
      const content = await handle.readFile();
      digest = digestExportFile(content);
      return { file, digest, modifiedMs, content: parseExportFile(content.toString('utf8')) };
    } finally {
      await handle.close();
    }
  } catch (error) {
    // A link that leads nowhere is there, and bad.
    if (errnoOf(error) === 'ENOENT' && !(await isListed(directory, file))) return null;
    const content =
      error instanceof AppError
        ? error
        : new AppError('INVALID_INPUT', `cannot be read: ${errnoOf(error) ?? 'unknown error'}`, {
            cause: error,
          });
    return { file, digest, modifiedMs, content };
  }
}

async function isListed(directory: string, file: string): Promise<boolean> {
  return (await readdir(directory)).includes(file);
}
