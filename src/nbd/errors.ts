import { NbdError } from '../../native/lib/index.js';
import { abortReason } from '../lib/deadline.js';
import { AppError, type ErrorCode } from '../lib/errors.js';

/** What the sink of a copy is, for the sentence an administrator reads when it is full or fails. */
export type SinkRole = 'layer' | 'target';

export interface ErrorContext {
  signal?: AbortSignal | undefined;
  sinkRole?: SinkRole | undefined;
}

const ENOSPC = 28;
const EDQUOT = 122;
const SINK_OPS = new Set(['openSink', 'pwrite', 'zero', 'flush']);

/**
 * An error of the addon as an AppError with the addon's own as its cause. CANCELLED becomes the signal's
 * reason. A full or failing sink is the repository's or the target's fault, as `sinkRole` says; failing
 * local files that are read are layers. Anything that is no NbdError is returned as it is.
 */
export function fromNbdError(error: unknown, context: ErrorContext = {}): unknown {
  if (!(error instanceof NbdError)) return error;
  if (error.code === 'CANCELLED' && context.signal?.aborted === true) return abortReason(context.signal);
  const details = { op: error.op, errno: error.errno, ...error.details };
  return new AppError(codeOf(error, context.sinkRole), error.message, { cause: error, details });
}

function codeOf(error: NbdError, sinkRole: SinkRole | undefined): ErrorCode {
  const isFull = error.errno === ENOSPC || error.errno === EDQUOT;
  switch (error.code) {
    case 'HASH_MISMATCH':
      return 'LAYER_CORRUPT';
    case 'FILE_IO':
      if (!SINK_OPS.has(error.op)) return 'REPOSITORY_IO';
      if (sinkRole === 'layer') return isFull ? 'REPOSITORY_FULL' : 'REPOSITORY_IO';
      return isFull ? 'TARGET_FULL' : 'TARGET_IO';
    case 'NBD_REQUEST':
      // A server that has no room says so in its answer to a write.
      if (isFull && sinkRole !== undefined && SINK_OPS.has(error.op)) {
        return sinkRole === 'layer' ? 'REPOSITORY_FULL' : 'TARGET_FULL';
      }
      // Opening a session holds the ends against the size of the disk.
      if (isFull && error.op === 'open') {
        return sinkRole === 'target' ? 'TARGET_TOO_SMALL' : 'SOURCE_SIZE_MISMATCH';
      }
      return 'NBD_REQUEST';
    default:
      return error.code;
  }
}
