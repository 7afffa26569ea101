import * as native from '../../native/lib/index.js';
import type {
  BlockStatus,
  ConnectOptions,
  CopySession,
  CopySessionOptions,
  ListedExport,
  NbdHandle,
} from '../../native/lib/index.js';
import { fromNbdError, type ErrorContext, type SinkRole } from './errors.js';

interface Control {
  signal?: AbortSignal | undefined;
}

/** Awaits a call of the addon; what it rejects with becomes an AppError. */
async function mapped<T>(call: Promise<T>, context: ErrorContext): Promise<T> {
  try {
    return await call;
  } catch (error) {
    throw fromNbdError(error, context);
  }
}

/** One connection to an export, as in native/lib, with AppErrors. Whoever opened it closes it. */
export async function connectNbd(options: ConnectOptions, control: Control = {}): Promise<NbdHandle> {
  const handle = await mapped(native.connectNbd(options, control), control);
  return {
    info: handle.info,
    blockStatus: (offset, length) => mapped(handle.blockStatus(offset, length), control),
    pread: (offset, length) => mapped(handle.pread(offset, length), control),
    pwrite: (offset, data, flags) => mapped(handle.pwrite(offset, data, flags), control),
    zero: (offset, length, flags) => mapped(handle.zero(offset, length, flags), control),
    trim: (offset, length, flags) => mapped(handle.trim(offset, length, flags), control),
    cache: (offset, length) => mapped(handle.cache(offset, length), control),
    flush: () => mapped(handle.flush(), control),
    close: () => mapped(handle.close(), control),
    [Symbol.asyncDispose]: () => mapped(handle.close(), control),
  };
}

/** The exports a server lists, with AppErrors. */
export async function listExports(options: ConnectOptions, control: Control = {}): Promise<ListedExport[]> {
  return mapped(native.listExports(options, control), control);
}

/**
 * The full names of the contexts an export grants out of those asked for; a query that ends in a colon
 * (`qemu:dirty-bitmap:`) stands for all names that begin so.
 */
export async function listMetaContexts(options: ConnectOptions, control: Control = {}): Promise<string[]> {
  await using handle = await connectNbd(options, control);
  return handle.info.metaContexts;
}

/**
 * Opens a copy session as in native/lib, with AppErrors. `sinkRole` says whether the sink is a layer of
 * a repository or the target of a restore, which decides the code of a full or failing sink. An abort of
 * the signal cancels the session at any time.
 */
export async function openCopySession(
  options: CopySessionOptions,
  control: Control & { sinkRole?: SinkRole | undefined } = {},
): Promise<CopySession> {
  const session = await mapped(native.openCopySession(options, { signal: control.signal }), control);
  const blockStatus = (offset: number, length: number): Promise<BlockStatus> =>
    mapped(session.blockStatus(offset, length), control);
  return {
    sourceInfo: session.sourceInfo,
    sinkInfo: session.sinkInfo,
    blockStatus,
    submit: (window) => mapped(session.submit(window), control),
    reserve: (bytes) => session.reserve(bytes),
    progress: () => session.progress(),
    setRateLimit: (bytesPerSecond) => {
      session.setRateLimit(bytesPerSecond);
    },
    flush: () => mapped(session.flush(), control),
    cancel: () => {
      session.cancel();
    },
    close: () => mapped(session.close(), control),
    [Symbol.asyncDispose]: () => mapped(session.close(), control),
  };
}
