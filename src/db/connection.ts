import { closeSync, mkdirSync, openSync } from 'node:fs';
import path from 'node:path';
import knexPackage, { type Knex } from 'knex';
import { AppError } from '../lib/errors.js';
import type { Logger } from '../lib/log.js';

const { knex } = knexPackage;

export type Engine = 'sqlite' | 'mysql';

export interface DatabaseOptions {
  kind: Engine;
  /** sqlite: the file; made with its directory when absent. */
  file?: string | null;
  /** mysql: mysql://user:password@host:port/database, with ?tls=required to encrypt. */
  url?: string | null;
  /** mysql: connect here in place of the URL's host and port. */
  socketPath?: string | null;
  /** mysql: connections at the most. Default 10. */
  connections?: number;
  /** A statement that takes longer fails. Default 30 s. */
  queryTimeoutMs?: number;
  /** Limit for getting a connection, free or new. Default 10 s. */
  connectTimeoutMs?: number;
}

const DEFAULTS = { connections: 10, queryTimeoutMs: 30_000, connectTimeoutMs: 10_000 };
/** SQLite waits in the event loop's thread; longer waits are repeated by Session, which does not block. */
const SQLITE_BUSY_MS = 50;
/** The one connection is busy while the index of a large repository is replaced. */
const SQLITE_TURN_MS = 60_000;
const LOCK_WAIT_SECONDS = 10;
const DEFAULT_MYSQL_PORT = 3306;

/** A pool of connections. Nothing is connected yet, except that a SQLite file is made. */
export function connect(options: DatabaseOptions, logger: Logger): Knex {
  const limits = { ...DEFAULTS, ...options };
  const db = knex({
    ...(options.kind === 'sqlite' ? sqliteConfig(options) : mysqlConfig(options, limits)),
    acquireConnectionTimeout:
      options.kind === 'sqlite' ? Math.max(SQLITE_TURN_MS, limits.connectTimeoutMs) : limits.connectTimeoutMs,
    log: {
      warn: (message: unknown) => {
        logger.warn({ detail: String(message) }, 'database library warning');
      },
      error: (message: unknown) => {
        logger.error({ detail: String(message) }, 'database library error');
      },
      deprecate: (message: unknown) => {
        logger.debug({ detail: String(message) }, 'database library deprecation');
      },
      debug: () => undefined,
    },
  });
  // Every statement passes here, those of transactions and migrations too, so that none lacks a deadline.
  // Schema builders have none to set; only knex' own two migration tables are made by them.
  db.on('start', (builder: object) => {
    if (hasTimeout(builder)) builder.timeout(limits.queryTimeoutMs);
  });
  return db;
}

function hasTimeout(builder: object): builder is { timeout: (ms: number) => unknown } {
  return 'timeout' in builder && typeof builder.timeout === 'function';
}

function sqliteConfig({ file }: DatabaseOptions): Knex.Config {
  if (file === undefined || file === null) {
    throw new AppError('CONFIG_INVALID', 'database.file is missing', { details: { key: 'database.file' } });
  }
  createPrivateFile(file);
  return {
    client: 'better-sqlite3',
    connection: { filename: file },
    useNullAsDefault: true,
    pool: {
      // One connection: SQLite has one writer, and its calls block this thread anyway.
      min: 1,
      max: 1,
      afterCreate: (connection: SqliteConnection, done: (error: Error | null) => void) => {
        connection.pragma(`busy_timeout = ${SQLITE_BUSY_MS}`);
        connection.pragma('journal_mode = WAL');
        connection.pragma('foreign_keys = ON');
        // FULL: a committed transaction survives a power cut, not only a crash of the process.
        connection.pragma('synchronous = FULL');
        done(null);
      },
    },
  };
}

interface SqliteConnection {
  pragma(text: string): unknown;
}

/** The file holds hashes of tokens and paths of the host: nobody else reads it. */
function createPrivateFile(file: string): void {
  try {
    mkdirSync(path.dirname(file), { recursive: true, mode: 0o700 });
    closeSync(openSync(file, 'a', 0o600));
  } catch (error) {
    throw new AppError('DATABASE_UNAVAILABLE', `the database file ${file} cannot be made or opened`, {
      cause: error,
      details: { file },
    });
  }
}

function mysqlConfig(options: DatabaseOptions, limits: typeof DEFAULTS): Knex.Config {
  const url = parseMysqlUrl(options.url ?? '');
  const { socketPath } = options;
  return {
    client: 'mysql2',
    connection: {
      ...(socketPath === undefined || socketPath === null
        ? { host: url.host, port: url.port }
        : { socketPath }),
      user: url.user,
      password: url.password,
      database: url.database,
      charset: 'utf8mb4',
      connectTimeout: limits.connectTimeoutMs,
      ...(url.isTls ? { ssl: { rejectUnauthorized: true } } : {}),
    },
    pool: {
      min: 0,
      // A migration holds its lock on one connection and works on another.
      max: Math.max(2, limits.connections),
      afterCreate: prepareMysqlSession,
    },
  };
}

interface MysqlConnection {
  query(sql: string, done: (error: Error | null) => void): void;
}

/**
 * The same behaviour whatever the server's configuration: strict types, statements that see what is
 * committed (fewer gap locks than the default), and no endless wait for a row lock.
 */
function prepareMysqlSession(connection: MysqlConnection, done: (error: Error | null) => void): void {
  connection.query(
    `SET SESSION sql_mode = 'STRICT_ALL_TABLES,NO_ZERO_DATE,NO_ENGINE_SUBSTITUTION',
      SESSION innodb_lock_wait_timeout = ${LOCK_WAIT_SECONDS}`,
    (error) => {
      if (error !== null) done(error);
      else connection.query('SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED', done);
    },
  );
}

interface MysqlUrl {
  host: string;
  port: number;
  user: string;
  password: string;
  database: string;
  isTls: boolean;
}

/** The URL is a secret: errors name what is wrong, never the text. */
export function parseMysqlUrl(text: string): MysqlUrl {
  if (!URL.canParse(text)) throw urlInvalid('is not a URL');
  const url = new URL(text);
  if (!['mysql:', 'mariadb:'].includes(url.protocol)) throw urlInvalid('must begin with mysql://');
  const database = decodeURIComponent(url.pathname.slice(1));
  if (database === '' || database.includes('/')) throw urlInvalid('must end in /database');
  const unknown = [...url.searchParams.keys()].find((key) => key !== 'tls');
  if (unknown !== undefined) throw urlInvalid(`has an unknown parameter ${unknown}`);
  const tls = url.searchParams.get('tls') ?? 'off';
  if (!['off', 'required'].includes(tls)) throw urlInvalid('has a parameter tls that is not off or required');
  return {
    host: url.hostname,
    port: url.port === '' ? DEFAULT_MYSQL_PORT : Number(url.port),
    user: decodeURIComponent(url.username),
    password: decodeURIComponent(url.password),
    database,
    isTls: tls === 'required',
  };
}

function urlInvalid(problem: string): AppError {
  return new AppError('CONFIG_INVALID', `database.url ${problem}`, { details: { key: 'database.url' } });
}
