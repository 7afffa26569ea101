import { createHash, type Hash } from 'node:crypto';
import { constants } from 'node:fs';
import { open, type FileHandle } from 'node:fs/promises';
import { AppError } from '../src/lib/errors.js';
import { MIB } from '../src/lib/units.js';
import { toStorageError } from './backend.js';
import {
  checkEntryOrder,
  encodeSumsFooter,
  encodeSumsHeader,
  entryBytesOf,
  type SumsHeader,
} from './sums-format.js';

/** One cluster known to a `.sums` file. */
export interface SumsEntry {
  clusterIndex: number;
  isZero: boolean;
  /** Empty for a zero cluster. */
  hash: Buffer;
}

/** Appends packed entries (native `WindowResult.entries`) in ascending order; refuses anything else. */
export interface SumsWriter {
  append(entries: Buffer): Promise<void>;
  readonly entryCount: number;
}

const FLUSH_BYTES = MIB;

/**
 * Writes one `.sums` file front to back with bounded memory. `finish` writes the footer, flushes to
 * disk and answers the SHA-256 of the file; `close` gives up without it. Calls to `append` must not overlap.
 */
export class SumsFileWriter implements SumsWriter, AsyncDisposable {
  readonly #file: FileHandle;
  readonly #name: string;
  readonly #entryBytes: number;
  readonly #clusterLimit: number;
  readonly #digest: Hash = createHash('sha256');
  #waiting: Buffer[] = [];
  #waitingBytes = 0;
  #last = -1;
  #entryCount = 0;
  #sha256: string | undefined;
  #isClosed = false;

  private constructor(file: FileHandle, name: string, header: SumsHeader) {
    this.#file = file;
    this.#name = name;
    this.#entryBytes = entryBytesOf(header.hash);
    this.#clusterLimit = Math.ceil(header.diskBytes / header.clusterBytes);
    this.#push(encodeSumsHeader(header));
  }

  /** Creates the file (mode 0600), which must not exist. */
  static async create(name: string, header: SumsHeader): Promise<SumsFileWriter> {
    try {
      const flags = constants.O_WRONLY | constants.O_CREAT | constants.O_EXCL | constants.O_NOFOLLOW;
      return new SumsFileWriter(await open(name, flags, 0o600), name, header);
    } catch (error) {
      throw toStorageError(error, 'creating a sums file');
    }
  }

  get entryCount(): number {
    return this.#entryCount;
  }

  /** Rejects with INVALID_INPUT when the entries are no whole entries, not ascending, or beyond the disk. */
  async append(entries: Buffer): Promise<void> {
    if (this.#isClosed) throw new AppError('INTERNAL', 'entries came after the sums file was closed');
    if (entries.length % this.#entryBytes !== 0) {
      throw new AppError('INVALID_INPUT', 'packed entries of another size than this repository has');
    }
    this.#last = this.#checkOrder(entries);
    this.#entryCount += entries.length / this.#entryBytes;
    this.#push(Buffer.from(entries));
    if (this.#waitingBytes >= FLUSH_BYTES) await this.#flush();
  }

  /** Footer, fsync, close. Answers the SHA-256 of the whole file; idempotent. */
  async finish(): Promise<string> {
    if (this.#sha256 !== undefined) return this.#sha256;
    if (this.#isClosed) throw new AppError('INTERNAL', 'the sums file was given up before it was finished');
    this.#push(encodeSumsFooter(this.#entryCount));
    await this.#flush();
    try {
      await this.#file.sync();
    } catch (error) {
      throw toStorageError(error, 'flushing a sums file');
    }
    await this.close();
    this.#sha256 = this.#digest.digest('hex');
    return this.#sha256;
  }

  async close(): Promise<void> {
    if (this.#isClosed) return;
    this.#isClosed = true;
    await this.#file.close();
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  #checkOrder(entries: Buffer): number {
    try {
      const bounds = {
        entryBytes: this.#entryBytes,
        last: this.#last,
        limit: this.#clusterLimit,
        file: this.#name,
      };
      return checkEntryOrder(entries, bounds);
    } catch (error) {
      throw new AppError('INVALID_INPUT', 'hash entries did not come in ascending order within the disk', {
        cause: error,
      });
    }
  }

  #push(data: Buffer): void {
    this.#waiting.push(data);
    this.#waitingBytes += data.length;
  }

  async #flush(): Promise<void> {
    const data = Buffer.concat(this.#waiting);
    this.#waiting = [];
    this.#waitingBytes = 0;
    this.#digest.update(data);
    let done = 0;
    try {
      while (done < data.length) {
        const { bytesWritten } = await this.#file.write(data, done);
        done += bytesWritten;
      }
    } catch (error) {
      throw toStorageError(error, 'writing a sums file');
    }
  }
}
