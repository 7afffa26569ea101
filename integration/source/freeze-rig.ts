import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { pollUntil } from '../../src/lib/deadline.js';
import { takeFrozen, type FreezableGuest } from '../../src/source/guest-freeze.js';
import type { ConsistencyWish, SourceNote } from '../../src/source/source.js';
import type { GuestConsole } from '../lab/guest.js';

export const signal = new AbortController().signal;

export const sleep = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));

export function makeOptions(wish: ConsistencyWish, limitMs = 20_000) {
  const notes: SourceNote[] = [];
  const codes = () => notes.map(({ code }) => code);
  return { wish, limitMs, note: (note: SourceNote) => notes.push(note), signal, notes, codes };
}

/** Until the workload has written on: it cannot while its filesystems are frozen. */
export async function writesGoOn(console: GuestConsole, timeoutMs = 20_000): Promise<void> {
  const before = await console.lastRecord();
  await pollUntil(async () => ((await console.lastRecord()) > before ? true : undefined), {
    timeoutMs,
    intervalMs: 100,
    what: 'the guest writing on',
  });
}

/** How many records the workload tells of in a while, when what was under way has come through. */
export async function recordsWritten(console: GuestConsole): Promise<number> {
  await sleep(500);
  const before = await console.lastRecord();
  await sleep(1500);
  return (await console.lastRecord()) - before;
}

/** Freezes in a process of its own, which is killed when `whileFrozen` is through. */
export async function dieFrozen(args: readonly string[], whileFrozen: () => Promise<void>): Promise<void> {
  const root = new URL('../..', import.meta.url).pathname;
  const script = new URL('freeze-holder.ts', import.meta.url).pathname;
  const holder = spawn(process.execPath, ['--import', 'tsx', script, ...args], {
    cwd: root,
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  const ended = once(holder, 'exit');
  try {
    await once(holder.stdout, 'data');
    await whileFrozen();
  } finally {
    holder.kill('SIGKILL');
    await ended;
  }
}

/** From the beginning of the freeze to the end of the thaw, with nothing to do in between. */
export async function frozenMs(guest: FreezableGuest): Promise<number> {
  let [started, ended] = [0, 0];
  const timed: FreezableGuest = {
    ...guest,
    freeze: (control) => {
      started = performance.now();
      return guest.freeze(control);
    },
    thaw: async (control) => {
      const count = await guest.thaw(control);
      ended = performance.now();
      return count;
    },
  };
  await takeFrozen(timed, makeOptions('require'), () => Promise.resolve());
  return ended - started;
}

export function median(values: number[]): number {
  return values.toSorted((a, b) => a - b)[values.length >> 1]!;
}
