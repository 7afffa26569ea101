import { displayWidth, padEnd, padStart, safeText } from './text.js';

export interface Column<Row> {
  title: string;
  /** Foreign text may be given as it is; the table makes it safe. */
  value: (row: Row) => string;
  align?: 'left' | 'right';
}

/** A plain table: a header line and one line for each row, columns two spaces apart. */
export function formatTable<Row>(rows: readonly Row[], columns: readonly Column<Row>[]): string {
  const cells = rows.map((row) => columns.map((column) => safeText(column.value(row))));
  const lines = [columns.map((column) => column.title), ...cells];
  const widths = columns.map((_column, index) =>
    Math.max(...lines.map((line) => displayWidth(line[index] ?? ''))),
  );
  return lines
    .map((line) =>
      line
        .map((cell, index) => {
          const pad = columns[index]?.align === 'right' ? padStart : padEnd;
          return pad(cell, widths[index] ?? 0);
        })
        .join('  ')
        .trimEnd(),
    )
    .map((line) => `${line}\n`)
    .join('');
}

/** Names and values of one thing, one a line. Values may be foreign text. */
export function formatFields(fields: readonly (readonly [string, string])[]): string {
  const width = Math.max(...fields.map(([name]) => name.length));
  return fields.map(([name, value]) => `${padEnd(name, width)}  ${safeText(value)}\n`).join('');
}
