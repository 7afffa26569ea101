import { createHash } from 'node:crypto';
import { describe, expect, it } from 'vitest';
import { NOTHING_COPIED } from '../../src/nbd/copy-windows.js';
import type { CopySession, WindowResult } from '../../src/nbd/index.js';
import { Flusher, SafeWindows, type DiskWindow } from '../../src/capture/safe-windows.js';

/** A session whose flushes end when the test says so. */
function sessionOf(flushes: { resolve: () => void; reject: (error: Error) => void }[]): CopySession {
  const flush = (): Promise<void> =>
    new Promise((resolve, reject) => {
      flushes.push({ resolve, reject });
    });
  return { flush } as unknown as CopySession;
}

const window = (end: number): DiskWindow => ({
  rows: new Float64Array(),
  zeroPolicy: 'skip',
  emitEntries: true,
  end,
  copyBytes: 10,
});
const result = (text: string): WindowResult => ({
  entries: Buffer.from(text),
  ...NOTHING_COPIED,
  bytesRead: 10,
  mismatches: new Float64Array(),
  places: new Float64Array(),
});
const digestOf = (text: string): string => createHash('sha256').update(text).digest('hex');
const later = (): Promise<void> => new Promise((resolve) => setImmediate(resolve));

describe('windows of a disk', () => {
  it('are safe when a flush that began after them has succeeded, and not before', async () => {
    const flushes: Parameters<typeof sessionOf>[0] = [];
    const safe = new SafeWindows();
    const options = { fromBytes: 0, flushBytes: 20, onSafe: safe.add.bind(safe) };
    const flusher = new Flusher(sessionOf(flushes), options);
    await flusher.settled(result('a'), window(100));
    expect(flushes).toHaveLength(0);
    await flusher.settled(result('b'), window(200));
    await flusher.settled(result('c'), window(300));
    expect([flushes.length, safe.end, safe.totals.bytesRead]).toEqual([1, 0, 0]);
    flushes[0]!.resolve();
    await later();
    // The third settled after the flush began.
    expect([safe.end, safe.totals.bytesRead]).toEqual([200, 20]);
    const finishing = flusher.finish();
    await later();
    flushes[1]!.resolve();
    await finishing;
    expect([safe.end, safe.totals.bytesRead]).toEqual([300, 30]);
    expect(safe.digest()).toBe(digestOf('abc'));
  });

  it('of a lost connection are forgotten and come again, once in the digest', async () => {
    const flushes: Parameters<typeof sessionOf>[0] = [];
    const safe = new SafeWindows();
    const options = { flushBytes: 10, onSafe: safe.add.bind(safe) };
    const first = new Flusher(sessionOf(flushes), { ...options, fromBytes: 0 });
    await first.settled(result('a'), window(100));
    flushes[0]!.resolve();
    await later();
    await first.settled(result('b'), window(200));
    flushes[1]!.reject(new Error('gone'));
    await expect(first.settled(result('c'), window(300))).rejects.toThrow('gone');
    await first.stop();
    expect(safe.end).toBe(100);

    const second = new Flusher(sessionOf(flushes), { ...options, fromBytes: safe.end });
    await second.settled(result('B'), window(200));
    flushes[2]!.resolve();
    const finishing = second.finish();
    await later();
    flushes[3]!.resolve();
    await finishing;
    expect([safe.end, safe.totals.bytesRead]).toEqual([200, 20]);
    expect(safe.digest()).toBe(digestOf('aB'));
  });

  it('a flush at the end without windows leaves the place where it is', async () => {
    const flushes: Parameters<typeof sessionOf>[0] = [];
    const safe = new SafeWindows();
    const options = { fromBytes: 0, flushBytes: 10, onSafe: safe.add.bind(safe) };
    const finishing = new Flusher(sessionOf(flushes), options).finish();
    await later();
    flushes[0]!.resolve();
    await finishing;
    expect([safe.end, safe.digest()]).toEqual([0, digestOf('')]);
  });
});
