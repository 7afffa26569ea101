import { setTimeout as delay } from 'node:timers/promises';
import { AppError } from './errors.js';

/** The reason a signal aborts with when somebody asked for the work to stop. */
export function cancelled(message = 'cancelled on request'): AppError {
  return new AppError('CANCELLED', message);
}

/** Throws the signal's reason as an AppError when it is aborted. */
export function throwIfAborted(signal: AbortSignal | undefined): void {
  if (signal?.aborted) throw abortReason(signal);
}

export function abortReason(signal: AbortSignal): AppError {
  return signal.reason instanceof AppError ? signal.reason : cancelled();
}

/**
 * Settles like `work`, or rejects with TIMEOUT after `timeoutMs`, or with the signal's reason.
 * The work itself is not stopped: hand it the same signal where it can stop.
 */
export async function withDeadline<T>(
  work: Promise<T>,
  options: { timeoutMs: number; what: string; signal?: AbortSignal | undefined },
): Promise<T> {
  const { timeoutMs, what, signal } = options;
  let timer: NodeJS.Timeout | undefined;
  let onAbort: (() => void) | undefined;
  const limit = new Promise<never>((_resolve, reject) => {
    timer = setTimeout(() => {
      reject(new AppError('TIMEOUT', `${what} did not end within ${timeoutMs} ms`));
    }, timeoutMs);
    if (signal !== undefined) {
      onAbort = (): void => {
        reject(abortReason(signal));
      };
      if (signal.aborted) onAbort();
      else signal.addEventListener('abort', onAbort, { once: true });
    }
  });
  try {
    return await Promise.race([work, limit]);
  } finally {
    clearTimeout(timer);
    if (onAbort !== undefined) signal?.removeEventListener('abort', onAbort);
  }
}

/** Waits `ms`, or rejects with the signal's reason. */
export async function pause(ms: number, signal?: AbortSignal): Promise<void> {
  try {
    await delay(ms, undefined, signal === undefined ? {} : { signal });
  } catch (error) {
    throwIfAborted(signal);
    throw error;
  }
}

/**
 * Asks `probe` until it answers something other than undefined, and returns that. Rejects with
 * TIMEOUT after `timeoutMs`. An error from the probe ends the wait at once. The only polling loop.
 */
export async function pollUntil<T>(
  probe: () => Promise<T | undefined> | T | undefined,
  options: { timeoutMs: number; what: string; intervalMs?: number; signal?: AbortSignal | undefined },
): Promise<T> {
  const endMs = performance.now() + options.timeoutMs;
  for (;;) {
    throwIfAborted(options.signal);
    const answer = await probe();
    if (answer !== undefined) return answer;
    if (performance.now() >= endMs) {
      throw new AppError('TIMEOUT', `${options.what} did not happen within ${options.timeoutMs} ms`);
    }
    await pause(options.intervalMs ?? 10, options.signal);
  }
}
