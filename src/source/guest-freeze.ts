import { abortReason, pause, throwIfAborted } from '../lib/deadline.js';
import { AppError, isErrorCode, toAppError } from '../lib/errors.js';
import type { ConsistencyWish, SourceNote } from './source.js';

/** A guest whose filesystems can be frozen, through whatever reaches its agent. */
export interface FreezableGuest {
  /** Resolves when its agent answers, rejects soon when there is none. Changes nothing. */
  ping(control: { signal: AbortSignal }): Promise<void>;
  /** Answers how many filesystems were frozen. Rejects when the agent says no, or the time is up. */
  freeze(control: { timeoutMs: number; signal: AbortSignal }): Promise<number>;
  /** Answers how many were thawed: 0 when none was frozen (any more). */
  thaw(control: { timeoutMs: number }): Promise<number>;
  /**
   * Arms what thaws the guest `limitMs` from now, or as soon as this process dies. Resolves when it
   * stands; nothing is frozen before. Rejects when it should stand and does not.
   */
  guard(limitMs: number): Promise<ThawGuard>;
}

/** Thaws the guest unless it is disarmed in time. */
export interface ThawGuard {
  /** process: a watchdog of its own on this host; guest: a timer inside the guest; none: nothing could be armed. */
  readonly kind: 'process' | 'guest' | 'none';
  /** Why nothing could be armed, and what that means; null where something stands. */
  readonly reason: string | null;
  /** To be called after the thaw, and only then. */
  disarm(): Promise<void>;
}

export interface FrozenOptions {
  wish: ConsistencyWish;
  limitMs: number;
  note: (note: SourceNote) => void;
  signal: AbortSignal;
}

/** The guard acts later than we do: its part is that we cannot. */
const GUARD_MARGIN_MS = 1000;
const THAW_ATTEMPT_MS = 10_000;
const THAW_PATIENCE_MS = 60_000;
const THAW_PAUSE_MS = 500;

/**
 * Runs `take` (which fixes the instant) between freeze and thaw. `prefer` goes on without a freeze that
 * is not to be had and notes why; `require` rejects with FREEZE_FAILED then, also when that turns out only
 * after `take`, whose work is then the caller's to undo. The guest is thawed on every path. `application`
 * is answered only when a freeze succeeded, `take` ended within the limit and the thaw still found frozen
 * filesystems: else somebody had thawed before, and the instant is `crash`. With it goes the note
 * GUEST_FROZEN: `frozenMs` counts from the command to freeze to the answer to the one to thaw.
 */
export async function takeFrozen<T>(
  guest: FreezableGuest,
  options: FrozenOptions,
  take: () => Promise<T>,
): Promise<{ value: T; consistency: 'application' | 'crash' }> {
  throwIfAborted(options.signal);
  const frozen = options.wish === 'never' ? null : await freeze(guest, options);
  if (frozen === null) return { value: await take(), consistency: 'crash' };
  let value: T;
  let flaw: string | null;
  try {
    value = await take();
  } finally {
    flaw = await frozen.end();
  }
  if (flaw === null) return { value, consistency: 'application' };
  giveUp(options, { code: 'FREEZE_UNDONE', message: flaw });
  return { value, consistency: 'crash' };
}

interface Frozen {
  /** Thaws. Answers null when all was frozen until now, else what was wrong, a sentence. Never rejects. */
  end(): Promise<string | null>;
}

/** Null when the guest is not frozen and that is allowed; it is noted then. */
async function freeze(guest: FreezableGuest, options: FrozenOptions): Promise<Frozen | null> {
  const { limitMs, note, signal } = options;
  let guard: ThawGuard;
  try {
    await guest.ping({ signal });
    guard = await guest.guard(limitMs + GUARD_MARGIN_MS);
  } catch (error) {
    return giveUp(options, { code: 'FREEZE_UNAVAILABLE', message: notFrozen(error), cause: error });
  }
  if (guard.reason !== null) note({ level: 'warning', code: 'FREEZE_UNGUARDED', message: guard.reason });
  const startedMs = performance.now();
  try {
    await guest.freeze({ timeoutMs: limitMs, signal });
  } catch (error) {
    // It may have come half-way, or be on its way still. An agent that refused undid it, and may refuse the thaw too.
    const patienceMs = isErrorCode(error, 'SOURCE_REFUSED') ? 0 : THAW_PATIENCE_MS;
    await thaw(guest, guard, { note, patienceMs });
    return giveUp(options, { code: 'FREEZE_FAILED', message: notFrozen(error), cause: error });
  }
  let thawing: Promise<Thawed | null> | undefined;
  const thawOnce = (): Promise<Thawed | null> =>
    (thawing ??= thaw(guest, guard, { note, patienceMs: THAW_PATIENCE_MS }));
  const limit = setTimeout(() => void thawOnce(), limitMs - (performance.now() - startedMs));
  return {
    end: async () => {
      clearTimeout(limit);
      const isLate = thawing !== undefined || performance.now() - startedMs > limitMs;
      const thawed = await thawOnce();
      if (isLate) return `the freeze was undone, because it would have lasted longer than ${limitMs} ms`;
      if (thawed === null)
        return 'it is not known whether the guest was frozen all the time: the thaw failed';
      if (thawed.count === 0) {
        return 'the guest had no frozen filesystems at the end: somebody thawed it before';
      }
      const frozenMs = thawed.atMs - startedMs;
      const message = `the guest was frozen for ${frozenMs.toFixed(0)} ms at most`;
      note({ level: 'info', code: 'GUEST_FROZEN', message, details: { frozenMs } });
      return null;
    },
  };
}

function notFrozen(error: unknown): string {
  return `the guest was not frozen: ${toAppError(error).message}`;
}

/** Answers null where a snapshot without a freeze will do. */
function giveUp(options: FrozenOptions, why: { code: string; message: string; cause?: unknown }): null {
  if (options.signal.aborted) throw abortReason(options.signal);
  const { code, message, cause } = why;
  if (options.wish === 'require') throw new AppError('FREEZE_FAILED', message, { cause });
  options.note({ level: 'warning', code, message });
  return null;
}

interface ThawOptions {
  note: FrozenOptions['note'];
  /** Tried again for this long. */
  patienceMs: number;
}

interface Thawed {
  /** Of filesystems. */
  count: number;
  /** By `performance.now()`. */
  atMs: number;
}

/**
 * Thaws, however often that has to be tried, then disarms the guard. Answers how many filesystems were
 * thawed, or null when the patience was not enough: the guard is left armed then. Never rejects.
 */
async function thaw(guest: FreezableGuest, guard: ThawGuard, options: ThawOptions): Promise<Thawed | null> {
  const { note } = options;
  const count = await thawStubbornly(guest, options);
  if (count === null) return null;
  const atMs = performance.now();
  try {
    await guard.disarm();
  } catch (error) {
    const message = `what thaws the guest after a crash could not be disarmed: ${toAppError(error).message}`;
    note({ level: 'warning', code: 'GUARD_LEFT', message });
  }
  return { count, atMs };
}

async function thawStubbornly(
  guest: FreezableGuest,
  { note, patienceMs }: ThawOptions,
): Promise<number | null> {
  const endMs = performance.now() + patienceMs;
  for (let isFirst = true; ; isFirst = false) {
    try {
      return await guest.thaw({ timeoutMs: THAW_ATTEMPT_MS });
    } catch (error) {
      const isLast = performance.now() >= endMs;
      const next = isLast ? 'thaw it with `virsh domfsthaw` or in the guest' : 'it is tried again';
      const message = `THE GUEST MAY STILL BE FROZEN: ${toAppError(error).message}; ${next}`;
      if (isFirst || isLast) note({ level: 'warning', code: 'THAW_FAILED', message });
      if (isLast) return null;
    }
    await pause(THAW_PAUSE_MS);
  }
}
