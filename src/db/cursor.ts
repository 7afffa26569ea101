import type { Knex } from 'knex';
import { z } from 'zod';
import { AppError } from '../lib/errors.js';
import type { RowPage } from './database.js';

const MAX_CURSOR_LENGTH = 512;
const cursorSchema = z.tuple([z.string(), z.array(z.string().max(64)).min(1).max(2)]);

/** The sort key of the last row of a page, with the list's name so that no other list takes it. */
function encodeCursor(list: string, key: string[]): string {
  return Buffer.from(JSON.stringify([list, key])).toString('base64url');
}

/** INVALID_INPUT unless it is a cursor of this list with a key of this many parts. */
export function decodeCursor(list: string, cursor: string, parts: number): string[] {
  const parsed = cursorSchema.safeParse(parseCursor(cursor));
  if (!parsed.success || parsed.data[0] !== list || parsed.data[1].length !== parts) {
    throw new AppError('INVALID_INPUT', 'the cursor is not one of this list', {
      details: { field: 'cursor' },
    });
  }
  return parsed.data[1];
}

function parseCursor(cursor: string): unknown {
  if (cursor.length > MAX_CURSOR_LENGTH) return undefined;
  try {
    return JSON.parse(Buffer.from(cursor, 'base64url').toString('utf8'));
  } catch (error) {
    if (error instanceof SyntaxError) return undefined;
    throw error;
  }
}

/** Cuts a query's answer of up to limit + 1 rows into a page. */
export function toPage<T>(
  rows: T[],
  options: { list: string; limit: number; key: (row: T) => string[] },
): RowPage<T> {
  const page = rows.slice(0, options.limit);
  const last = page.at(-1);
  const hasMore = rows.length > options.limit && last !== undefined;
  return { rows: page, nextCursor: hasMore ? encodeCursor(options.list, options.key(last)) : null };
}

/** Rows after the cursor in descending order of (timeColumn, id). The first condition alone gives the index range. */
export function whereBefore(query: Knex.QueryBuilder, timeColumn: string, [time, id]: string[]): void {
  if (time === undefined || id === undefined) throw new RangeError('the key needs a time and an id');
  void query
    .where(timeColumn, '<=', time)
    .where((either) => void either.where(timeColumn, '<', time).orWhere('id', '<', id));
}
