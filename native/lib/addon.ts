import { createRequire } from 'node:module';
import type {
  BlockStatus,
  CopyProgress,
  ExportInfo,
  HashAlgorithm,
  ListedExport,
  WindowResult,
} from './types.js';

/** Options as the C++ side reads them: every field present and checked. */
export interface RawConnect {
  uri: string;
  /** Host name to look up first, '' for addresses and Unix sockets. */
  host: string;
  metaContexts: string[];
  certificates: string;
  pskFile: string;
  username: string;
  connectTimeoutMs: number;
}

export interface RawNbdHandle {
  open(): Promise<ExportInfo>;
  listExports(): Promise<ListedExport[]>;
  pread(offset: number, length: number): Promise<Buffer>;
  pwrite(offset: number, data: Buffer, flags: number): Promise<void>;
  zero(offset: number, length: number, flags: number): Promise<void>;
  trim(offset: number, length: number, flags: number): Promise<void>;
  cache(offset: number, length: number): Promise<void>;
  flush(): Promise<void>;
  blockStatus(offset: number, length: number): Promise<BlockStatus>;
  close(): Promise<void>;
}

export interface RawSessionOptions {
  source: (RawConnect & { kind: 'nbd'; connections: number }) | { kind: 'files'; paths: string[] };
  sink:
    | (RawConnect & { kind: 'nbd'; connections: number })
    | { kind: 'file'; path: string; isZeroed: boolean }
    | { kind: 'append'; path: string; startOffset: number }
    | { kind: 'null' };
  diskBytes: number;
  clusterBytes: number;
  requestBytes: number;
  hash: HashAlgorithm;
  requestsInFlight: number;
  rateLimitBytesPerSecond: number;
  stallTimeoutMs: number;
}

export interface RawWindow {
  rows: Float64Array;
  zeroPolicy: string;
  emitEntries: boolean;
  expectPolicy: string;
  expect: Buffer;
  collectMismatches: boolean;
}

export interface RawCopySession {
  open(): Promise<{ source?: ExportInfo; sink?: ExportInfo }>;
  /** Throws RangeError for a plan that cannot be executed. */
  submit(window: RawWindow): Promise<WindowResult>;
  blockStatus(offset: number, length: number): Promise<BlockStatus>;
  reserve(bytes: number): number;
  progress(): CopyProgress;
  setRateLimit(bytesPerSecond: number): void;
  flush(): Promise<void>;
  cancel(): void;
  close(): Promise<void>;
}

interface Addon {
  RawNbdHandle: new (options: RawConnect & { requestTimeoutMs: number }) => RawNbdHandle;
  RawCopySession: new (options: RawSessionOptions) => RawCopySession;
  hashBlock(algorithm: HashAlgorithm, data: Buffer): Buffer;
  libnbdVersion(): string;
}

/** By the package's name, so that the same line works from the sources and from dist/. */
export const addon = createRequire(import.meta.url)(
  '@holdfast/native/build/Release/holdfast_native.node',
) as Addon;
