import { afterEach, describe, expect, it, vi } from 'vitest';
import { cancelled } from '../../src/lib/deadline.js';
import { AppError } from '../../src/lib/errors.js';
import { takeFrozen, type FreezableGuest, type ThawGuard } from '../../src/source/guest-freeze.js';
import type { ConsistencyWish, SourceNote } from '../../src/source/source.js';

const LIMIT_MS = 400;

/** A guest of two filesystems that writes down what is done to it; a test gives what it does differently. */
function makeGuest(different: Partial<FreezableGuest> = {}, guardKind: ThawGuard['kind'] = 'process') {
  const calls: string[] = [];
  let frozen = 0;
  const guest: FreezableGuest = {
    ping: async () => undefined,
    freeze: async () => (frozen = 2),
    thaw: async () => {
      const thawed = frozen;
      frozen = 0;
      return thawed;
    },
    guard: async () => ({
      kind: guardKind,
      reason: guardKind === 'none' ? 'nothing watches' : null,
      disarm: async () => {
        calls.push('disarm');
      },
    }),
    ...different,
  };
  const recorded: FreezableGuest = {
    ping: (control) => (calls.push('ping'), guest.ping(control)),
    freeze: (control) => (calls.push('freeze'), guest.freeze(control)),
    thaw: (control) => (calls.push('thaw'), guest.thaw(control)),
    guard: (limitMs) => (calls.push('guard'), guest.guard(limitMs)),
  };
  return { guest: recorded, calls, somebodyThaws: () => (frozen = 0) };
}

function makeOptions(wish: ConsistencyWish) {
  const notes: SourceNote[] = [];
  const control = new AbortController();
  const options = {
    wish,
    limitMs: LIMIT_MS,
    note: (note: SourceNote) => notes.push(note),
    signal: control.signal,
  };
  return {
    options,
    notes,
    codes: () => notes.map(({ code }) => code),
    abort: () => control.abort(cancelled()),
  };
}

const refuse = (message: string) => () => Promise.reject(new AppError('SOURCE_REFUSED', message));
const sleep = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));

afterEach(() => {
  vi.restoreAllMocks();
});

describe('takeFrozen', () => {
  it('takes between freeze and thaw, and disarms the guard last', async () => {
    const { guest, calls } = makeGuest();
    const { options, notes } = makeOptions('require');
    const take = async () => (calls.push('take'), 42);
    expect(await takeFrozen(guest, options, take)).toEqual({ value: 42, consistency: 'application' });
    expect(calls).toEqual(['ping', 'guard', 'freeze', 'take', 'thaw', 'disarm']);
    expect(notes).toMatchObject([{ level: 'info', code: 'GUEST_FROZEN' }]);
    expect(notes[0]!.details!['frozenMs']).toBeLessThan(LIMIT_MS);
  });

  it('arms the guard for longer than the limit and freezes for no longer than it', async () => {
    const guard = vi.fn(
      async () => ({ kind: 'process', reason: null, disarm: async () => undefined }) as const,
    );
    const freeze = vi.fn(async () => 1);
    const { guest } = makeGuest({ guard, freeze, thaw: async () => 1 });
    const { options } = makeOptions('require');
    await takeFrozen(guest, options, async () => 1);
    expect(guard).toHaveBeenCalledWith(LIMIT_MS + 1000);
    expect(freeze).toHaveBeenCalledWith({ timeoutMs: LIMIT_MS, signal: options.signal });
  });

  it('asks no agent when it is not wished', async () => {
    const { guest, calls } = makeGuest();
    const { options, notes } = makeOptions('never');
    expect(await takeFrozen(guest, options, async () => 'x')).toEqual({ value: 'x', consistency: 'crash' });
    expect(calls).toEqual([]);
    expect(notes).toEqual([]);
  });

  it('says so when nothing guards the freeze, and freezes all the same', async () => {
    const { guest } = makeGuest({}, 'none');
    const { options, notes } = makeOptions('require');
    expect((await takeFrozen(guest, options, async () => 1)).consistency).toBe('application');
    expect(notes).toEqual([
      { level: 'warning', code: 'FREEZE_UNGUARDED', message: 'nothing watches' },
      expect.objectContaining({ level: 'info', code: 'GUEST_FROZEN' }),
    ]);
  });

  describe.each<[string, Partial<FreezableGuest>, string, string[]]>([
    ['no agent answers', { ping: refuse('no agent') }, 'FREEZE_UNAVAILABLE', ['ping']],
    ['the guard does not stand', { guard: refuse('no sh') }, 'FREEZE_UNAVAILABLE', ['ping', 'guard']],
    [
      'the freeze fails half-way',
      { freeze: refuse('no agent') },
      'FREEZE_FAILED',
      ['ping', 'guard', 'freeze', 'thaw', 'disarm'],
    ],
  ])('when %s', (_name, different, code, expected) => {
    it('prefer goes on without, with a note', async () => {
      const { guest, calls } = makeGuest(different);
      const { options, codes } = makeOptions('prefer');
      const take = async () => (calls.push('take'), 1);
      expect(await takeFrozen(guest, options, take)).toEqual({ value: 1, consistency: 'crash' });
      expect(calls).toEqual([...expected, 'take']);
      expect(codes()).toEqual([code]);
    });

    it('require ends before anything is taken', async () => {
      const { guest, calls } = makeGuest(different);
      const { options } = makeOptions('require');
      const take = vi.fn(async () => 1);
      await expect(takeFrozen(guest, options, take)).rejects.toMatchObject({
        code: 'FREEZE_FAILED',
        cause: { code: 'SOURCE_REFUSED' },
      });
      expect(calls).toEqual(expected);
      expect(take).not.toHaveBeenCalled();
    });
  });

  it('does not insist on a thaw that is refused like the freeze, and leaves that to the guard', async () => {
    const { guest, calls } = makeGuest({ freeze: refuse('disabled'), thaw: refuse('disabled') });
    const { options, codes } = makeOptions('prefer');
    expect((await takeFrozen(guest, options, async () => 1)).consistency).toBe('crash');
    expect(calls).toEqual(['ping', 'guard', 'freeze', 'thaw']);
    expect(codes()).toEqual(['THAW_FAILED', 'FREEZE_FAILED']);
  });

  it('insists on the thaw when it is not known what became of the freeze', async () => {
    const answers = [refuse('not responding'), async () => 2];
    const { guest, calls } = makeGuest({
      freeze: () => Promise.reject(new AppError('TIMEOUT', 'no answer')),
      thaw: () => answers.shift()!(),
    });
    const { options, codes } = makeOptions('prefer');
    expect((await takeFrozen(guest, options, async () => 1)).consistency).toBe('crash');
    expect(calls).toEqual(['ping', 'guard', 'freeze', 'thaw', 'thaw', 'disarm']);
    expect(codes()).toEqual(['THAW_FAILED', 'FREEZE_FAILED']);
  });

  it('thaws at the limit while the instant is still being taken', async () => {
    const { guest, calls } = makeGuest();
    const { options, codes } = makeOptions('prefer');
    const take = async () => {
      await sleep(LIMIT_MS + 200);
      calls.push('taken');
      return 1;
    };
    expect((await takeFrozen(guest, options, take)).consistency).toBe('crash');
    expect(calls).toEqual(['ping', 'guard', 'freeze', 'thaw', 'disarm', 'taken']);
    expect(codes()).toEqual(['FREEZE_UNDONE']);
  });

  it('counts the time of the freeze itself', async () => {
    const { guest } = makeGuest({ freeze: async () => (await sleep(300), 1), thaw: async () => 1 });
    const { options } = makeOptions('require');
    const taking = takeFrozen(guest, options, () => sleep(300));
    await expect(taking).rejects.toMatchObject({ code: 'FREEZE_FAILED' });
  });

  it('believes the clock when the timer could not run', async () => {
    const { guest } = makeGuest();
    const { options, codes } = makeOptions('prefer');
    const take = async () => {
      const end = performance.now() + LIMIT_MS + 50;
      while (performance.now() < end);
      return 1;
    };
    expect((await takeFrozen(guest, options, take)).consistency).toBe('crash');
    expect(codes()).toEqual(['FREEZE_UNDONE']);
  });

  it.each<[ConsistencyWish, string]>([
    ['prefer', 'crash'],
    ['require', 'FREEZE_FAILED'],
  ])('does not call it frozen when somebody thawed before (%s)', async (wish, outcome) => {
    const { guest, calls, somebodyThaws } = makeGuest();
    const { options } = makeOptions(wish);
    const result = takeFrozen(guest, options, async () => somebodyThaws());
    if (wish === 'prefer') expect((await result).consistency).toBe(outcome);
    else await expect(result).rejects.toMatchObject({ code: outcome });
    expect(calls.slice(-2)).toEqual(['thaw', 'disarm']);
  });

  it('thaws when the taking fails, and hands that error on', async () => {
    const { guest, calls } = makeGuest();
    const { options } = makeOptions('require');
    const error = new AppError('SOURCE_BUSY', 'a job runs');
    await expect(takeFrozen(guest, options, () => Promise.reject(error))).rejects.toBe(error);
    expect(calls).toEqual(['ping', 'guard', 'freeze', 'thaw', 'disarm']);
  });

  it('tries the thaw again when it fails, loudly, and the instant still counts', async () => {
    const answers = [refuse('busy'), async () => 2];
    const { guest, calls } = makeGuest({ thaw: () => answers.shift()!() });
    const { options, notes } = makeOptions('require');
    expect((await takeFrozen(guest, options, async () => 1)).consistency).toBe('application');
    expect(calls.slice(-3)).toEqual(['thaw', 'thaw', 'disarm']);
    expect(notes.map(({ code }) => code)).toEqual(['THAW_FAILED', 'GUEST_FROZEN']);
    expect(notes[0]).toMatchObject({ level: 'warning', code: 'THAW_FAILED' });
    expect(notes[0]!.message).toContain('MAY STILL BE FROZEN');
  });

  it('gives the thaw up after a minute and leaves the guard armed', async () => {
    let skippedMs = 0;
    const real = performance.now.bind(performance);
    vi.spyOn(performance, 'now').mockImplementation(() => real() + skippedMs);
    const { guest, calls } = makeGuest({
      thaw: () => {
        skippedMs += 35_000;
        return Promise.reject(new AppError('SOURCE_UNREACHABLE', 'gone'));
      },
    });
    const { options, codes, notes } = makeOptions('prefer');
    expect((await takeFrozen(guest, options, async () => 1)).consistency).toBe('crash');
    expect(calls).not.toContain('disarm');
    expect(codes()).toEqual(['THAW_FAILED', 'THAW_FAILED', 'FREEZE_UNDONE']);
    expect(notes[1]!.message).toContain('virsh domfsthaw');
  });

  it('keeps what was taken when the guard cannot be disarmed', async () => {
    const guard = async () => ({ kind: 'guest', reason: null, disarm: refuse('no such process') }) as const;
    const { guest } = makeGuest({ guard });
    const { options, codes } = makeOptions('require');
    expect(await takeFrozen(guest, options, async () => 7)).toEqual({ value: 7, consistency: 'application' });
    expect(codes()).toEqual(['GUARD_LEFT', 'GUEST_FROZEN']);
  });

  it.each<ConsistencyWish>(['prefer', 'require'])(
    'ends as cancelled when aborted in the freeze (%s)',
    async (wish) => {
      const { options, abort, notes } = makeOptions(wish);
      const { guest, calls } = makeGuest({
        freeze: ({ signal }) => {
          abort();
          return Promise.reject(signal.reason as AppError);
        },
      });
      const take = vi.fn(async () => 1);
      await expect(takeFrozen(guest, options, take)).rejects.toMatchObject({ code: 'CANCELLED' });
      expect(calls).toEqual(['ping', 'guard', 'freeze', 'thaw', 'disarm']);
      expect(take).not.toHaveBeenCalled();
      expect(notes).toEqual([]);
    },
  );

  it('does nothing when aborted before', async () => {
    const { options, abort } = makeOptions('prefer');
    const { guest, calls } = makeGuest();
    abort();
    await expect(takeFrozen(guest, options, async () => 1)).rejects.toMatchObject({ code: 'CANCELLED' });
    expect(calls).toEqual([]);
  });
});
