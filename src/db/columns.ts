import { createHash } from 'node:crypto';
import { AppError } from '../lib/errors.js';

/** Limits of the columns, in characters; MariaDB enforces them, SQLite does not. */
export const MAX_NAME_LENGTH = 255;
export const MAX_ROOT_LENGTH = 1024;
export const MAX_EXPORT_NAME_LENGTH = 64;
export const MAX_IDENTITY_LENGTH = 1024;
export const MAX_DEVICE_PATH_LENGTH = 4096;

/** JSON columns are text on both engines; undefined becomes null. */
export function toJson(value: unknown): string {
  return JSON.stringify(value ?? null);
}

export function fromJson(text: string): unknown {
  return JSON.parse(text);
}

/**
 * What a unique name is compared by: exact on both engines, where MariaDB's own comparison ignores
 * trailing spaces and its indexes end before a long path does.
 */
export function uniqueKey(text: string): string {
  return createHash('sha256').update(text, 'utf8').digest('hex');
}

export function checkLength(text: string, maxLength: number, field: string): void {
  if (text.length === 0 || text.length > maxLength) {
    throw new AppError('INVALID_INPUT', `${field} must have 1 to ${maxLength} characters`, {
      details: { field },
    });
  }
}

/** Splits for statements with a bounded number of rows: packets and SQLite's 500 selects of one insert are limited. */
export function* chunks<T>(items: readonly T[], size: number): Generator<T[]> {
  for (let start = 0; start < items.length; start += size) yield items.slice(start, start + size);
}

/** Rows of a statement at the most. */
export const CHUNK_ROWS = 100;
