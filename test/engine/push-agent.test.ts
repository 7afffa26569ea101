import { describe, expect, it } from 'vitest';
import type { PushDiskRow } from '../../src/db/database.js';
import { newId, type DiskId, type ExportId, type RunId } from '../../src/lib/id.js';
import { followAgent } from '../../src/engine/push-agent.js';
import type { PushView } from '../../src/engine/types.js';

const SILENCE_MS = 10_000;
const diskId = newId<DiskId>();
const runId = newId<RunId>();

const view: PushView = {
  exports: 'vda=nbd://here/x',
  hash: 'xxh3-128',
  clusterBytes: 65_536,
  silenceMs: SILENCE_MS,
  disks: [
    {
      ...{
        diskId,
        diskName: 'vda',
        number: 1,
        exportId: newId<ExportId>(),
        exportName: 'x',
        uris: ['nbd://here/x'],
      },
      ...{ sizeBytes: 1000, method: 'full', reason: { code: 'FIRST_POINT', sentence: 'It is the first.' } },
      ...{ changeIdFrom: null, parentSizeBytes: null, isCompleted: false, changeIdTo: null },
    },
  ],
};

const row = (change: Partial<PushDiskRow> = {}): PushDiskRow => ({
  ...{ runId, diskId, seenAt: 'at first', progress: null, completion: null },
  ...change,
});
const completion = {
  changeId: 'b1',
  sumsDigest: null,
  bytesRead: 5000,
  bytesWritten: 7,
  bytesZeroed: 0,
  bytesSkipped: 0,
};

/** Follows an agent that says this, one row at each look; each look takes its time on a clock of the test's. */
async function follow(looks: { row: PushDiskRow; takesMs?: number; thenMs?: number }[]) {
  let nowMs = 0;
  const shown: unknown[] = [];
  const queue = [...looks];
  const push = {
    context: {
      clock: { nowMs: () => 0, monotonicMs: () => nowMs },
      db: {
        pushDisks: {
          replace: () => Promise.resolve(),
          list: () => {
            const look = queue.length > 1 ? queue.shift() : queue[0];
            nowMs += look?.takesMs ?? 0;
            // While nobody looks.
            setTimeout(() => (nowMs += look?.thenMs ?? 0), 50);
            return Promise.resolve(look === undefined ? [] : [look.row]);
          },
        },
      },
    },
    run: {
      id: runId,
      signal: new AbortController().signal,
      insist: (work: () => Promise<unknown>) => work(),
      log: () => undefined,
      setPush: (said: PushView) => Promise.resolve(shown.push(said)),
      updateDisk: (_id: DiskId, change: unknown) => shown.push(change),
      abort: () => undefined,
    },
    repository: { requireSpace: () => Promise.resolve() },
    lease: { verify: () => Promise.resolve() },
  };
  const completions = await followAgent(push as unknown as Parameters<typeof followAgent>[0], view);
  return { completions, shown };
}

describe('followAgent', () => {
  it('answers what the agent completed, and shows no more bytes than the disk has', async () => {
    const { completions, shown } = await follow([{ row: row() }, { row: row({ completion }) }]);
    expect(completions.get(diskId)).toEqual(completion);
    expect(shown).toContainEqual({
      ...{ totalBytes: 1000, bytesRead: 1000, bytesWritten: 7, bytesZeroed: 0, bytesSkipped: 0 },
    });
    expect(shown.at(-1)).toMatchObject({ disks: [{ isCompleted: true, changeIdTo: 'b1' }] });
  });

  it('does not count the time in which the database could not be asked as silence', async () => {
    const { completions } = await follow([
      { row: row() },
      { row: row(), takesMs: 3 * SILENCE_MS },
      { row: row({ completion }) },
    ]);
    expect(completions.size).toBe(1);
  });

  it('counts the time between looks that found the same, by its own clock', async () => {
    const quiet = { row: row(), thenMs: 0.6 * SILENCE_MS };
    await expect(follow([quiet, quiet, quiet])).rejects.toMatchObject({ code: 'PUSH_SILENT' });
    const alive = { row: row({ seenAt: 'later' }), thenMs: 0.6 * SILENCE_MS };
    const { completions } = await follow([quiet, alive, { row: row({ completion }) }]);
    expect(completions.size).toBe(1);
  });
});
