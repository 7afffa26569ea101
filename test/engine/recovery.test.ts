import { mkdtemp, rm } from 'node:fs/promises';
import os from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { Database, RunRow } from '../../src/db/index.js';
import { createRecovery, recoveryIntervalMs, type Recovery } from '../../src/engine/recovery.js';
import { toTimestamp, type Clock } from '../../src/lib/clock.js';
import type { RunId } from '../../src/lib/id.js';
import { runRow } from '../contract/database-fixture.js';
import { openEngineContext, SETTINGS } from './engine-context.js';

const ABANDONED_AFTER_MS = SETTINGS.runs.abandonedAfterMs;
const LONG_AGO_MS = 60_000;

describe('recovery of runs without a heartbeat', () => {
  let directory: string;
  let db: Database;
  let nowMs: number;
  let recovery: Recovery;
  const active = new Map<RunId, never>();
  const clock: Clock = { nowMs: () => nowMs, monotonicMs: () => nowMs };

  beforeEach(async () => {
    directory = await mkdtemp(path.join(os.tmpdir(), 'hf-recovery-'));
    nowMs = Date.UTC(2026, 10, 21);
    const context = await openEngineContext(directory, { clock });
    db = context.db;
    recovery = createRecovery(context, { get: (id) => active.get(id) }, { remove: () => Promise.resolve() });
  });
  afterEach(async () => {
    await db[Symbol.asyncDispose]();
    await rm(directory, { recursive: true });
  });

  async function insertRunning(heartbeatMs: number, workerId = 'another worker'): Promise<RunRow> {
    const row = runRow({ kind: 'check', state: 'running', workerId, heartbeatAt: toTimestamp(heartbeatMs) });
    await db.runs.insert(row, { turn: 'none' });
    return row;
  }
  const stateOf = async ({ id }: RunRow): Promise<string | undefined> => (await db.runs.get(id))?.state;

  it('ends a run whose heartbeat two looks in a row found the same', async () => {
    const run = await insertRunning(nowMs - LONG_AGO_MS);
    await recovery.recoverAbandoned();
    expect(await stateOf(run)).toBe('running');
    await recovery.recoverAbandoned();
    expect(await db.runs.get(run.id)).toMatchObject({
      state: 'interrupted',
      error: { code: 'INTERRUPTED' },
    });
  });

  it('leaves a run alone that sends heartbeats, although the clocks differ by more than a run may be silent', async () => {
    const run = await insertRunning(nowMs - LONG_AGO_MS);
    for (let look = 0; look < 4; look += 1) {
      await recovery.recoverAbandoned();
      nowMs += ABANDONED_AFTER_MS / 2;
      const heartbeatAt = toTimestamp(nowMs - LONG_AGO_MS);
      expect(await db.runs.update(run.id, 'another worker', { heartbeatAt })).toBe(true);
    }
    expect(await stateOf(run)).toBe('running');
  });

  it('ends the runs of workers that are dead for certain at once, and no others', async () => {
    const dead = await insertRunning(nowMs, 'dead worker');
    const silent = await insertRunning(nowMs - LONG_AGO_MS);
    await recovery.recoverDead(['dead worker']);
    expect([await stateOf(dead), await stateOf(silent)]).toEqual(['interrupted', 'running']);
  });
});

it.each([
  [30_000, 5000, 15_000],
  [2000, 300, 1000],
  [600_000, 5000, 15_000],
])(
  'looks often enough for a silence of %i ms and a heartbeat of %i ms',
  (abandonedAfterMs, heartbeatMs, interval) => {
    expect(
      recoveryIntervalMs({ ...SETTINGS, runs: { ...SETTINGS.runs, abandonedAfterMs, heartbeatMs } }),
    ).toBe(interval);
  },
);
