import type { CopySessionOptions } from '../nbd/index.js';

/** Where one disk of a restore goes. */
export type TargetSpec =
  | { kind: 'file'; path: string; format: 'raw' | 'qcow2' }
  | { kind: 'nbd'; uri: string; tls?: { certificates?: string; pskFile?: string; username?: string } }
  | { kind: 'device'; path: string };

export interface TargetOpenOptions {
  /** Exact bytes of the disk. */
  sizeBytes: number;
  /** Existing content may be lost. A mounted or held device is refused all the same. */
  overwrite: boolean;
  signal: AbortSignal;
}

/**
 * Write side of an image restore. `check` refuses before anything is written; `open` prepares the
 * target and answers the sink; `complete` makes it what was asked for (exact size, renamed into
 * place); disposal without `complete` removes what was made (a new file), never what was there.
 */
export interface Target {
  /** The same text for the same place however it is spelled; what two disks must not share. Call after `check`. */
  identity(): Promise<string>;
  check(options: TargetOpenOptions): Promise<void>;
  open(options: TargetOpenOptions): Promise<OpenTarget>;
}

export interface OpenTarget extends AsyncDisposable {
  readonly sink: CopySessionOptions['sink'];
  /** What is not written reads as zero already; else the restore must write zeroes. */
  readonly isZeroed: boolean;
  /** Call after the copy session was flushed and closed. */
  complete(): Promise<void>;
}
