import type { NbdErrorCode } from './types.js';

/** What the addon rejects with; the texts are libnbd's or ours, and name no secret. */
export interface RawFailure {
  code: NbdErrorCode;
  op: string;
  message: string;
  errno: number;
  offset?: number;
}

/** Every failure of the addon. `errno` is 0 where the system gave none; `details.offset` is a disk offset. */
export class NbdError extends Error {
  override readonly name = 'NbdError';
  readonly code: NbdErrorCode;
  /** The call that failed, by libnbd's name without `nbd_`, or a step of the copy. */
  readonly op: string;
  readonly errno: number;
  readonly details: { offset?: number };

  constructor(failure: RawFailure) {
    super(failure.message);
    this.code = failure.code;
    this.op = failure.op;
    this.errno = failure.errno;
    this.details = failure.offset === undefined ? {} : { offset: failure.offset };
  }
}

/** Awaits a call of the addon and turns what it rejects with into an NbdError with a useful stack. */
export async function settled<T>(call: Promise<T>): Promise<T> {
  try {
    return await call;
  } catch (error) {
    throw isRawFailure(error) ? new NbdError(error) : error;
  }
}

function isRawFailure(value: unknown): value is RawFailure {
  return (
    typeof value === 'object' &&
    value !== null &&
    !(value instanceof Error) &&
    'code' in value &&
    'op' in value &&
    'errno' in value
  );
}
