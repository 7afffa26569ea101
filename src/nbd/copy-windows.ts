import { AppError } from '../lib/errors.js';
import { SECTOR_BYTES } from '../lib/units.js';
import type { CopySession, CopyWindow, WindowResult } from './index.js';

/** Windows submitted and not settled: enough that the pipeline never drains. */
const WINDOWS_IN_FLIGHT = 3;

export type CopyTotals = Pick<WindowResult, 'bytesRead' | 'bytesWritten' | 'bytesZeroed' | 'bytesSkipped'>;

export const NOTHING_COPIED: CopyTotals = { bytesRead: 0, bytesWritten: 0, bytesZeroed: 0, bytesSkipped: 0 };

export function addTotals(left: CopyTotals, right: CopyTotals): CopyTotals {
  return {
    bytesRead: left.bytesRead + right.bytesRead,
    bytesWritten: left.bytesWritten + right.bytesWritten,
    bytesZeroed: left.bytesZeroed + right.bytesZeroed,
    bytesSkipped: left.bytesSkipped + right.bytesSkipped,
  };
}

/**
 * Copies window after window, several in flight. `onSettled` gets the results in order, one at a time, and is
 * waited for. Nothing is flushed. The first failure, also of `windows` or `onSettled`, is the answer.
 */
export async function copyWindows<Window extends CopyWindow>(
  session: CopySession,
  windows: AsyncIterable<Window>,
  onSettled: (result: WindowResult, window: Window) => Promise<void>,
): Promise<void> {
  const waiting: { window: Window; result: Promise<WindowResult> }[] = [];
  const settle = async (): Promise<void> => {
    const first = waiting.shift();
    if (first !== undefined) await onSettled(await first.result, first.window);
  };
  for await (const window of windows) {
    const result = session.submit(window);
    // Handled when its turn comes; until then a failure must not count as unhandled.
    result.catch(() => undefined);
    waiting.push({ window, result });
    if (waiting.length >= WINDOWS_IN_FLIGHT) await settle();
  }
  while (waiting.length > 0) await settle();
}

/** SOURCE_SIZE_MISMATCH unless the session reads a disk of this size. */
export function requireSourceSize(session: CopySession, sizeBytes: number): void {
  const found = session.sourceInfo?.sizeBytes;
  if (found === undefined || !isServedSize(found, sizeBytes)) {
    throw new AppError(
      'SOURCE_SIZE_MISMATCH',
      `the source has ${found ?? 0} bytes where ${sizeBytes} were found before`,
    );
  }
}

/** Servers show a disk of odd size with the last sector filled up; nothing else may differ. */
export function isServedSize(servedBytes: number, sizeBytes: number): boolean {
  return servedBytes >= sizeBytes && servedBytes < sizeBytes + SECTOR_BYTES;
}
