import type { Command } from 'commander';
import { parseCount } from './parse.js';
import type { Session } from './session.js';
import { formatTable, type Column } from './table.js';

export interface PagingOptions {
  limit: string;
  cursor?: string;
}

/** The options of every list that is answered in pages. */
export function addPaging(command: Command): Command {
  return command
    .option('--limit <number>', 'entries at the most, up to 1000', '50')
    .option('--cursor <text>', 'go on where an earlier list ended');
}

export function pageQuery(options: PagingOptions): { limit: number; cursor?: string } {
  const limit = parseCount(options.limit, '--limit');
  return options.cursor === undefined ? { limit } : { limit, cursor: options.cursor };
}

/** Prints one page; people learn on standard error how to get the next one. */
export function printPage<Row>(
  session: Session,
  page: { items: Row[]; nextCursor: string | null },
  columns: readonly Column<Row>[],
): void {
  session.print(page, () => formatTable(page.items, columns));
  if (page.nextCursor !== null && !session.isJson) {
    session.note(`There is more: --cursor ${page.nextCursor}`);
  }
}
