import { constants } from 'node:fs';
import * as fs from 'node:fs/promises';
import path from 'node:path';
import { throwIfAborted } from '../src/lib/deadline.js';
import { AppError, errnoOf } from '../src/lib/errors.js';
import { newUlid } from '../src/lib/id.js';
import { MIB } from '../src/lib/units.js';
import {
  TEMPORARY_PREFIX,
  splitBackendPath,
  toStorageError,
  type Backend,
  type BackendEntry,
  type BackendStat,
  type WriteOptions,
} from './backend.js';

const DEFAULT_MAX_READ_BYTES = 64 * MIB;
const READ_FLAGS = constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK;

export interface LocalBackendOptions {
  /** Absolute path of an existing directory; it is never created here. */
  root: string;
  /**
   * A file directly in the root that proves that this is the repository and not the empty directory
   * it would be mounted on. While it is missing every "not there" becomes REPOSITORY_OFFLINE.
   */
  anchor?: string;
}

/** A directory of this host: a local disk or a mounted network file system with hard links. */
export class LocalBackend implements Backend {
  readonly #root: string;
  readonly #anchor: string | undefined;

  constructor(options: LocalBackendOptions) {
    if (!path.isAbsolute(options.root)) {
      throw new AppError('INVALID_INPUT', 'a repository root is an absolute path', {
        details: { root: options.root },
      });
    }
    this.#root = path.resolve(options.root);
    this.#anchor = options.anchor;
  }

  localPath(name: string): string {
    return path.join(this.#root, ...splitBackendPath(name));
  }

  async read(name: string, options: { maxBytes?: number } = {}): Promise<Buffer | undefined> {
    const maxBytes = options.maxBytes ?? DEFAULT_MAX_READ_BYTES;
    return this.#withFile(name, async (file, sizeBytes) => {
      if (sizeBytes > maxBytes) {
        throw new AppError('REPOSITORY_IO', `${name} is larger than such a file can be`, {
          details: { file: name, sizeBytes, maxBytes },
        });
      }
      const data = await readFully(file, 0, sizeBytes);
      if (data.length !== sizeBytes) {
        throw new AppError('REPOSITORY_IO', `${name} ended early while it was read`, {
          details: { file: name },
        });
      }
      return data;
    });
  }

  readRange(name: string, offset: number, length: number): Promise<Buffer | undefined> {
    return this.#withFile(name, (file, sizeBytes) =>
      readFully(file, offset, Math.max(0, Math.min(length, sizeBytes - offset))),
    );
  }

  async writeDurable(name: string, data: Buffer, options: WriteOptions = {}): Promise<void> {
    await this.#writeTemporary(name, { data, ...options }, async (temporary, target) => {
      await fs.rename(temporary, target);
      await syncPath(path.dirname(target));
      return true;
    });
  }

  createExclusive(name: string, data: Buffer, options: WriteOptions = {}): Promise<boolean> {
    return this.#writeTemporary(name, { data, ...options }, async (temporary, target) => {
      // link(2) fails when the name is taken, on NFS too, and the file appears with all its content.
      try {
        await fs.link(temporary, target);
      } catch (error) {
        if (errnoOf(error) === 'EEXIST') return false;
        throw error;
      }
      await fs.unlink(temporary);
      await syncPath(path.dirname(target));
      return true;
    });
  }

  async list(name: string): Promise<BackendEntry[] | undefined> {
    return this.#answer(`listing ${name === '' ? 'the root' : name}`, async () => {
      const directory = await this.#resolveDirectory(name);
      const entries = await fs.readdir(directory, { withFileTypes: true });
      return entries.map((entry) => ({
        name: entry.name,
        kind: entry.isFile() ? 'file' : entry.isDirectory() ? 'directory' : 'other',
      }));
    });
  }

  async rename(from: string, to: string): Promise<void> {
    await this.#demand(`renaming ${from}`, async () => {
      await fs.rename(await this.#resolve(from), await this.#resolve(to));
    });
  }

  async remove(name: string): Promise<boolean> {
    const answer = await this.#answer(`removing ${name}`, async () => {
      await fs.unlink(await this.#resolve(name));
      return true;
    });
    return answer ?? false;
  }

  async removeDirectory(name: string): Promise<boolean> {
    const answer = await this.#answer(`removing ${name}`, async () => {
      try {
        await fs.rmdir(await this.#resolve(name));
        return true;
      } catch (error) {
        if (errnoOf(error) === 'ENOTEMPTY') return false;
        throw error;
      }
    });
    return answer ?? false;
  }

  async makeDirectory(name: string): Promise<void> {
    const parts = splitBackendPath(name);
    await this.#demand(`creating ${name}`, async () => {
      let parent = await fs.realpath(this.#root);
      for (const part of parts) {
        const directory = path.join(parent, part);
        await makeOneDirectory(directory);
        parent = directory;
      }
    });
  }

  async stat(name: string): Promise<BackendStat | undefined> {
    return this.#answer(`looking at ${name}`, async () => {
      const facts = await fs.lstat(await this.#resolve(name));
      return {
        kind: facts.isFile() ? 'file' : facts.isDirectory() ? 'directory' : 'other',
        sizeBytes: facts.size,
        mode: facts.mode & 0o7777,
        modifiedMs: facts.mtimeMs,
      };
    });
  }

  async capacity(): Promise<{ totalBytes: number; freeBytes: number }> {
    return this.#demand('asking for the capacity', async () => {
      const facts = await fs.statfs(this.#root);
      return { totalBytes: facts.blocks * facts.bsize, freeBytes: facts.bavail * facts.bsize };
    });
  }

  async syncFile(name: string): Promise<void> {
    await this.#demand(`flushing ${name}`, async () => {
      await syncPath(await this.#resolve(name));
    });
  }

  async syncDirectory(name: string): Promise<void> {
    await this.#demand(`flushing ${name}`, async () => {
      await syncPath(await this.#resolveDirectory(name));
    });
  }

  async setReadOnly(name: string): Promise<void> {
    await this.#demand(`changing the mode of ${name}`, async () => {
      const file = await fs.open(await this.#resolve(name), READ_FLAGS);
      try {
        await file.chmod(0o440);
        await file.sync();
      } finally {
        await file.close();
      }
    });
  }

  /** The absolute path of a name whose directory really lies in the root (no symbolic link on the way). */
  async #resolve(name: string): Promise<string> {
    const parts = splitBackendPath(name);
    const last = parts.pop();
    if (last === undefined) return fs.realpath(this.#root);
    return path.join(await this.#resolveDirectory(parts.join('/')), last);
  }

  async #resolveDirectory(name: string): Promise<string> {
    const realRoot = await fs.realpath(this.#root);
    const expected = path.join(realRoot, ...splitBackendPath(name));
    if ((await fs.realpath(expected)) !== expected) {
      throw new AppError('REPOSITORY_IO', `${name} leads out of the repository through a symbolic link`, {
        details: { path: name },
      });
    }
    return expected;
  }

  async #withFile<T>(
    name: string,
    work: (file: fs.FileHandle, sizeBytes: number) => Promise<T>,
  ): Promise<T | undefined> {
    return this.#answer(`reading ${name}`, async () => {
      const file = await fs.open(await this.#resolve(name), READ_FLAGS);
      try {
        const facts = await file.stat();
        if (!facts.isFile()) {
          throw new AppError('REPOSITORY_IO', `${name} is not a regular file`, { details: { file: name } });
        }
        return await work(file, facts.size);
      } finally {
        await file.close();
      }
    });
  }

  async #writeTemporary(
    name: string,
    content: WriteOptions & { data: Buffer },
    publish: (temporary: string, target: string) => Promise<boolean>,
  ): Promise<boolean> {
    return this.#demand(`writing ${name}`, async () => {
      throwIfAborted(content.signal);
      const target = await this.#resolve(name);
      const temporary = path.join(path.dirname(target), `${TEMPORARY_PREFIX}${newUlid()}`);
      try {
        await writeNewFile(temporary, content.data, content.mode ?? 0o600);
        throwIfAborted(content.signal);
        return await publish(temporary, target);
      } finally {
        await fs.rm(temporary, { force: true });
      }
    });
  }

  /** Runs `work`; ENOENT becomes undefined, but only while the anchor proves that the repository is there. */
  async #answer<T>(what: string, work: () => Promise<T>): Promise<T | undefined> {
    try {
      return await work();
    } catch (error) {
      if (errnoOf(error) !== 'ENOENT') throw toStorageError(error, what);
      await this.#requireAnchor();
      return undefined;
    }
  }

  async #demand<T>(what: string, work: () => Promise<T>): Promise<T> {
    try {
      return await work();
    } catch (error) {
      if (errnoOf(error) === 'ENOENT') await this.#requireAnchor();
      throw toStorageError(error, what);
    }
  }

  async #requireAnchor(): Promise<void> {
    const anchor = this.#anchor === undefined ? this.#root : path.join(this.#root, this.#anchor);
    try {
      await fs.lstat(anchor);
    } catch (error) {
      if (errnoOf(error) !== 'ENOENT') throw toStorageError(error, 'looking for the repository');
      throw new AppError('REPOSITORY_OFFLINE', 'the repository directory is not there or not mounted', {
        cause: error,
        details: { root: this.#root },
      });
    }
  }
}

async function readFully(file: fs.FileHandle, offset: number, length: number): Promise<Buffer> {
  const data = Buffer.allocUnsafe(length);
  let done = 0;
  while (done < length) {
    const { bytesRead } = await file.read(data, done, length - done, offset + done);
    if (bytesRead === 0) break;
    done += bytesRead;
  }
  return data.subarray(0, done);
}

async function writeNewFile(target: string, data: Buffer, mode: number): Promise<void> {
  const file = await fs.open(target, 'wx', 0o600);
  try {
    await file.writeFile(data);
    await file.chmod(mode);
    await file.sync();
    const { size } = await file.stat();
    if (size !== data.length) {
      throw new AppError('REPOSITORY_IO', 'a file has another length than what was written to it', {
        details: { wroteBytes: data.length, sizeBytes: size },
      });
    }
  } finally {
    await file.close();
  }
}

/** mkdir and fsync of its parent; an existing directory is fine, anything else of that name is not. */
async function makeOneDirectory(directory: string): Promise<void> {
  try {
    await fs.mkdir(directory, { mode: 0o700 });
  } catch (error) {
    if (errnoOf(error) !== 'EEXIST') throw error;
    const facts = await fs.lstat(directory);
    if (facts.isDirectory()) return;
    throw new AppError('REPOSITORY_IO', 'a directory of the repository is something else', {
      cause: error,
      details: { path: directory },
    });
  }
  await syncPath(path.dirname(directory));
}

async function syncPath(target: string): Promise<void> {
  const file = await fs.open(target, READ_FLAGS);
  try {
    await file.sync();
  } finally {
    await file.close();
  }
}
