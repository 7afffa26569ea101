import type { Knex } from 'knex';
import type { Engine } from '../connection.js';

/** Column types of one engine, for the same meaning on both. */
export interface ColumnTypes {
  /** A ULID. */
  id: string;
  /** RFC 3339 in UTC, 24 characters; sorts by time. */
  time: string;
  /** A word of ours (state, code) or a hexadecimal hash: ASCII, exact. */
  word: (length: number) => string;
  /** Text of people, exact comparison. */
  text: (length: number) => string;
  /** Text of any length, JSON too. */
  long: string;
  integer: string;
  boolean: string;
  serial: string;
}

const MYSQL_ASCII = 'CHARACTER SET ascii COLLATE ascii_bin';
const MYSQL_UNICODE = 'CHARACTER SET utf8mb4 COLLATE utf8mb4_bin';

const TYPES: Record<Engine, ColumnTypes> = {
  sqlite: {
    id: 'TEXT',
    time: 'TEXT',
    word: () => 'TEXT',
    text: () => 'TEXT',
    long: 'TEXT',
    integer: 'INTEGER',
    boolean: 'INTEGER',
    serial: 'INTEGER PRIMARY KEY AUTOINCREMENT',
  },
  mysql: {
    id: `CHAR(26) ${MYSQL_ASCII}`,
    time: `VARCHAR(32) ${MYSQL_ASCII}`,
    word: (length) => `VARCHAR(${length}) ${MYSQL_ASCII}`,
    text: (length) => `VARCHAR(${length}) ${MYSQL_UNICODE}`,
    long: `LONGTEXT ${MYSQL_UNICODE}`,
    integer: 'BIGINT',
    boolean: 'TINYINT',
    serial: 'BIGINT NOT NULL AUTO_INCREMENT PRIMARY KEY',
  },
};

export interface TableDefinition {
  name: string;
  /** Columns and table constraints, in SQL that both engines read. */
  lines: (types: ColumnTypes) => string[];
  /** Columns of each index that is not unique. */
  indexes?: string[][];
}

/**
 * Creates a table with all its keys. MariaDB commits at every DDL statement, so there it is one
 * statement that can be repeated after a crash; SQLite takes its statements back as one.
 */
export async function createTable(
  db: Knex,
  engine: Engine,
  { name, lines, indexes = [] }: TableDefinition,
): Promise<void> {
  const body = lines(TYPES[engine]);
  const named = indexes.map((columns) => ({
    index: `${name}_${columns.join('_')}`,
    list: columns.join(', '),
  }));
  if (engine === 'mysql') {
    const keys = named.map(({ index, list }) => `INDEX ${index} (${list})`);
    const all = [...body, ...keys].join(',\n  ');
    await db.raw(`CREATE TABLE IF NOT EXISTS ${name} (\n  ${all}\n) ENGINE=InnoDB DEFAULT ${MYSQL_UNICODE}`);
    return;
  }
  await db.raw(`CREATE TABLE ${name} (\n  ${body.join(',\n  ')}\n) STRICT`);
  for (const { index, list } of named) await db.raw(`CREATE INDEX ${index} ON ${name} (${list})`);
}

export interface ColumnAddition {
  table: string;
  /** Types by name; every column may be null, as it is in the rows that are there. */
  columns: (types: ColumnTypes) => Record<string, string>;
  unique?: string[];
}

/** Adds the columns that are not there yet: MariaDB commits each statement, and a crash may come between. */
export async function addColumns(db: Knex, engine: Engine, addition: ColumnAddition): Promise<void> {
  const { table, columns, unique = [] } = addition;
  for (const [name, type] of Object.entries(columns(TYPES[engine]))) {
    if (await db.schema.hasColumn(table, name)) continue;
    if (engine === 'mysql') {
      const key = unique.includes(name) ? `, ADD UNIQUE ${table}_${name} (${name})` : '';
      await db.raw(`ALTER TABLE ${table} ADD COLUMN ${name} ${type}${key}`);
      continue;
    }
    await db.raw(`ALTER TABLE ${table} ADD COLUMN ${name} ${type}`);
    if (unique.includes(name)) await db.raw(`CREATE UNIQUE INDEX ${table}_${name} ON ${table} (${name})`);
  }
}
