import { describe, expect, test } from 'vitest';
import { NbdError, type NbdErrorCode } from '../../native/lib/index.js';
import { AppError } from '../../src/lib/errors.js';
import { fromNbdError, type SinkRole } from '../../src/nbd/errors.js';

const failure = (code: NbdErrorCode, op = 'pread', errno = 5): NbdError =>
  new NbdError({ code, op, message: 'words', errno, offset: 65_536 });

describe('an error of the addon as an AppError', () => {
  test.each<[NbdErrorCode, string, number, SinkRole | undefined, string]>([
    ['HASH_MISMATCH', 'verify', 0, undefined, 'LAYER_CORRUPT'],
    ['FILE_IO', 'pread', 5, undefined, 'REPOSITORY_IO'],
    ['FILE_IO', 'openSource', 2, 'target', 'REPOSITORY_IO'],
    ['FILE_IO', 'pwrite', 5, undefined, 'TARGET_IO'],
    ['FILE_IO', 'pwrite', 28, 'target', 'TARGET_FULL'],
    ['FILE_IO', 'pwrite', 122, 'layer', 'REPOSITORY_FULL'],
    ['FILE_IO', 'flush', 5, 'layer', 'REPOSITORY_IO'],
    ['NBD_REQUEST', 'pwrite', 28, 'layer', 'REPOSITORY_FULL'],
    ['NBD_REQUEST', 'pwrite', 28, 'target', 'TARGET_FULL'],
    ['NBD_REQUEST', 'pwrite', 28, undefined, 'NBD_REQUEST'],
    ['NBD_REQUEST', 'pread', 28, 'layer', 'NBD_REQUEST'],
    ['NBD_REQUEST', 'open', 28, 'layer', 'SOURCE_SIZE_MISMATCH'],
    ['NBD_REQUEST', 'open', 28, 'target', 'TARGET_TOO_SMALL'],
    ['NBD_REQUEST', 'open', 22, 'layer', 'NBD_REQUEST'],
    ['NBD_STALLED', 'copy', 110, 'layer', 'NBD_STALLED'],
    ['NBD_URI_INVALID', 'connect', 22, undefined, 'NBD_URI_INVALID'],
    ['CANCELLED', 'copy', 0, undefined, 'CANCELLED'],
  ])('%s of %s with errno %d and sink %s is %s', (code, op, errno, sinkRole, expected) => {
    const cause = failure(code, op, errno);
    const mapped = fromNbdError(cause, { sinkRole });
    expect(mapped).toBeInstanceOf(AppError);
    expect(mapped).toMatchObject({ code: expected, cause, details: { op, errno, offset: 65_536 } });
  });

  test('a cancel by the signal becomes the reason the signal was aborted with', () => {
    const reason = new AppError('TIMEOUT', 'too long');
    expect(fromNbdError(failure('CANCELLED'), { signal: AbortSignal.abort(reason) })).toBe(reason);
  });

  test('anything else is handed on as it is', () => {
    const other = new RangeError('no');
    expect(fromNbdError(other)).toBe(other);
  });
});
