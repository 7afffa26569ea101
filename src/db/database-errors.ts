import { AppError, errnoOf, type ErrorDetails } from '../lib/errors.js';

/** Somebody else held a lock, or this transaction was the victim of a deadlock. All of it was undone: do it again. */
const CONTENTION = new Set(['ER_LOCK_DEADLOCK', 'ER_LOCK_WAIT_TIMEOUT']);
const UNIQUE = new Set(['SQLITE_CONSTRAINT_UNIQUE', 'SQLITE_CONSTRAINT_PRIMARYKEY', 'ER_DUP_ENTRY']);
/** SQLite has one code for both directions; what was tried decides. */
const FOREIGN_KEY = new Set([
  'SQLITE_CONSTRAINT_FOREIGNKEY',
  'SQLITE_CONSTRAINT_TRIGGER',
  'ER_NO_REFERENCED_ROW',
  'ER_NO_REFERENCED_ROW_2',
  'ER_ROW_IS_REFERENCED',
  'ER_ROW_IS_REFERENCED_2',
]);
const TOO_LONG = new Set(['ER_DATA_TOO_LONG', 'ER_TRUNCATED_WRONG_VALUE_FOR_FIELD', 'SQLITE_TOOBIG']);
/** Waiting does not help: somebody has to change the settings or the server. */
const REFUSED = new Set([
  'ER_ACCESS_DENIED_ERROR',
  'ER_DBACCESS_DENIED_ERROR',
  'ER_BAD_DB_ERROR',
  'ER_NOT_SUPPORTED_AUTH_MODE',
  'HANDSHAKE_NO_SSL_SUPPORT',
]);
const UNREACHABLE = new Set([
  'ECONNREFUSED',
  'ECONNRESET',
  'ENOENT',
  'EPIPE',
  'ETIMEDOUT',
  'EHOSTUNREACH',
  'ENETUNREACH',
  'ENOTFOUND',
  'EAI_AGAIN',
  'PROTOCOL_CONNECTION_LOST',
  'PROTOCOL_SEQUENCE_TIMEOUT',
  'ER_SERVER_SHUTDOWN',
  'ER_NORMAL_SHUTDOWN',
  'ER_CON_COUNT_ERROR',
  'ER_TOO_MANY_USER_CONNECTIONS',
  'ER_CONNECTION_KILLED',
  'ER_QUERY_INTERRUPTED',
  'ER_OPTION_PREVENTS_STATEMENT',
  'ER_DISK_FULL',
  'ER_RECORD_FILE_FULL',
]);
/** The file under SQLite is full, unreadable, read-only or damaged. */
const SQLITE_STORAGE = [
  'SQLITE_IOERR',
  'SQLITE_CANTOPEN',
  'SQLITE_FULL',
  'SQLITE_READONLY',
  'SQLITE_CORRUPT',
];
const SQLITE_NOT_A_DATABASE = 'SQLITE_NOTADB';

export function isContention(error: unknown): boolean {
  const code = errnoOf(error) ?? '';
  return CONTENTION.has(code) || code.startsWith('SQLITE_BUSY') || code.startsWith('SQLITE_LOCKED');
}

export function isUniqueViolation(error: unknown): boolean {
  return UNIQUE.has(errnoOf(error) ?? '');
}

/** What a violated constraint means for one statement. */
export interface ConstraintMeaning {
  unique?: { message: string; details: ErrorDetails };
  foreignKey?: { code: 'NOT_FOUND' | 'CONFLICT'; message: string; details: ErrorDetails };
}

/** A driver's error in our terms. What is none of the known ones stays INTERNAL, with the driver's error as its cause. */
export function toDatabaseError(error: unknown, what: string, meaning: ConstraintMeaning = {}): AppError {
  if (error instanceof AppError) return error;
  const code = errnoOf(error) ?? '';
  if (UNIQUE.has(code)) {
    const { message, details } = meaning.unique ?? { message: `${what}: the row exists`, details: {} };
    return new AppError('CONFLICT', message, { cause: error, details });
  }
  if (FOREIGN_KEY.has(code)) return foreignKeyError(error, what, meaning);
  if (TOO_LONG.has(code)) {
    return new AppError('INVALID_INPUT', `${what}: a value is too long`, { cause: error });
  }
  return toServerError(error, what, code);
}

function foreignKeyError(error: unknown, what: string, meaning: ConstraintMeaning): AppError {
  const { code, message, details } = meaning.foreignKey ?? {
    code: 'NOT_FOUND' as const,
    message: `${what}: something it refers to does not exist`,
    details: {},
  };
  return new AppError(code, message, { cause: error, details });
}

function toServerError(error: unknown, what: string, code: string): AppError {
  if (REFUSED.has(code)) {
    return new AppError('DATABASE_UNAVAILABLE', `${what}: the database refuses the connection (${code})`, {
      cause: error,
      retryable: false,
    });
  }
  if (isUnreachable(error, code)) {
    const reason = code === '' ? 'no answer in time' : code;
    return new AppError('DATABASE_UNAVAILABLE', `${what}: the database cannot be reached (${reason})`, {
      cause: error,
    });
  }
  return new AppError('INTERNAL', `${what}: the database refused the statement (${code})`, { cause: error });
}

function isUnreachable(error: unknown, code: string): boolean {
  if (UNREACHABLE.has(code) || code === SQLITE_NOT_A_DATABASE) return true;
  if (SQLITE_STORAGE.some((prefix) => code.startsWith(prefix))) return true;
  if (!(error instanceof Error)) return false;
  // knex found no connection, or no answer, in time. mysql2 marks errors that end the connection.
  return error.name === 'KnexTimeoutError' || ('fatal' in error && error.fatal === true);
}
