import { AppError, errnoOf, type ErrorCode } from '../src/lib/errors.js';

export interface BackendEntry {
  name: string;
  /** `other` is anything that has no business in a repository: symbolic links, sockets, devices. */
  kind: 'file' | 'directory' | 'other';
}

export interface BackendStat {
  kind: BackendEntry['kind'];
  sizeBytes: number;
  mode: number;
  modifiedMs: number;
}

export interface WriteOptions {
  /** Permission bits of the file. Default 0600. */
  mode?: number;
  signal?: AbortSignal | undefined;
}

/**
 * The bytes below the repository format. Paths are relative to the root, separated by `/`, and never
 * leave it: an absolute path, an empty part, `.` or `..` rejects with INVALID_INPUT, and no symbolic
 * link is followed.
 *
 * "Not there" is an answer (`undefined` or `false`); "could not look" is an error: REPOSITORY_OFFLINE,
 * REPOSITORY_FULL, REPOSITORY_READ_ONLY or REPOSITORY_IO. Methods may be called concurrently. After a
 * method that promises durability has resolved, a power failure does not undo it.
 */
export interface Backend {
  /** The whole file, or undefined when it is not there. Rejects above `maxBytes` (default 64 MiB). */
  read(path: string, options?: { maxBytes?: number }): Promise<Buffer | undefined>;
  /** Bytes from `offset`; fewer than `length` only where the file ends. */
  readRange(path: string, offset: number, length: number): Promise<Buffer | undefined>;
  /** Creates or replaces the file in one step, durably: readers see the old content or the new. A failure or cancel leaves the old. */
  writeDurable(path: string, data: Buffer, options?: WriteOptions): Promise<void>;
  /** As `writeDurable`, but answers false and changes nothing when the name is taken. Of several writers exactly one wins. */
  createExclusive(path: string, data: Buffer, options?: WriteOptions): Promise<boolean>;
  /** Every entry of the directory in no order, or undefined when there is no such directory. Never a part as if it were all. */
  list(path: string): Promise<BackendEntry[] | undefined>;
  /** Moves a file within the repository, replacing the target. Durable after `syncDirectory` of both directories. */
  rename(from: string, to: string): Promise<void>;
  /** Unlinks a file. False when it was not there. */
  remove(path: string): Promise<boolean>;
  /** Removes an empty directory. False when it was not there or is not empty. */
  removeDirectory(path: string): Promise<boolean>;
  /** Creates the directory and missing parents below the root (mode 0700), each made durable. Idempotent. */
  makeDirectory(path: string): Promise<void>;
  stat(path: string): Promise<BackendStat | undefined>;
  capacity(): Promise<{ totalBytes: number; freeBytes: number }>;
  syncFile(path: string): Promise<void>;
  syncDirectory(path: string): Promise<void>;
  /** Mode 0440: nothing writes to the file any more. */
  setReadOnly(path: string): Promise<void>;
  /** The absolute path on this host, for tools that open files themselves. Checks the form only. */
  localPath(path: string): string;
}

/** Names of temporary files of a backend; what a crash leaves of them is garbage. */
export const TEMPORARY_PREFIX = '.tmp-';

const MAX_NAME_BYTES = 255;

/** Splits a backend path into its parts, or throws INVALID_INPUT. The empty path is the root. */
export function splitBackendPath(path: string): string[] {
  if (path === '') return [];
  const parts = path.split('/');
  for (const part of parts) {
    const isBad = part === '' || part === '.' || part === '..' || part.includes('\0');
    if (isBad || Buffer.byteLength(part) > MAX_NAME_BYTES) {
      throw new AppError('INVALID_INPUT', 'this is not a path inside a repository', { details: { path } });
    }
  }
  return parts;
}

const ERRNO_CODES: Record<string, ErrorCode> = {
  ENOSPC: 'REPOSITORY_FULL',
  EDQUOT: 'REPOSITORY_FULL',
  EROFS: 'REPOSITORY_READ_ONLY',
  EACCES: 'REPOSITORY_READ_ONLY',
  EPERM: 'REPOSITORY_READ_ONLY',
  // The mount went away or its server does not know us any more.
  ENODEV: 'REPOSITORY_OFFLINE',
  ESTALE: 'REPOSITORY_OFFLINE',
  ENOTCONN: 'REPOSITORY_OFFLINE',
  EHOSTDOWN: 'REPOSITORY_OFFLINE',
};

/** What a system error means for a repository. An AppError stays as it is. */
export function toStorageError(error: unknown, what: string): AppError {
  if (error instanceof AppError) return error;
  const errno = errnoOf(error);
  const code = (errno === undefined ? undefined : ERRNO_CODES[errno]) ?? 'REPOSITORY_IO';
  return new AppError(code, `${what} failed${errno === undefined ? '' : ` with ${errno}`}`, {
    cause: error,
    details: errno === undefined ? {} : { errno },
  });
}
