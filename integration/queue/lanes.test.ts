import { once } from 'node:events';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { RunExecutor, RunLane, RunQueue } from '../../src/engine/run-queue.js';
import { AppError } from '../../src/lib/errors.js';
import { labRun as run, startQueueLab, until, type QueueLab } from './queue-lab.js';

let lab: QueueLab;
let queue: RunQueue;

beforeEach(async () => {
  lab = await startQueueLab();
  ({ queue } = lab);
});
afterEach(() => lab[Symbol.asyncDispose]());

const attended = () => run(1, 'attended');

describe('the lanes', () => {
  /** Runs that last until they are released, or told to stop. */
  function holding() {
    const release = new AbortController();
    const begun: string[] = [];
    const execute: RunExecutor = async (runId, signal) => {
      begun.push(runId);
      const either = AbortSignal.any([release.signal, signal]);
      if (!either.aborted) await once(either, 'abort');
      return 'done';
    };
    return { begun, execute, release };
  }

  it.each([
    { full: 'work', free: 'attended' },
    { full: 'attended', free: 'work' },
  ] as const)('a run of $free goes on while all slots of $full are taken', async ({ full, free }) => {
    const { begun, execute, release } = holding();
    const [held, waiting, other] = [run(1, full), run(1, full), run(1, free)];
    await queue.add(held);
    await queue.add(waiting);
    lab.work(execute);
    await until('the slot to be taken', () => begun.includes(held.runId));
    await queue.add(other);
    await until('the run of the other lane', () => begun.includes(other.runId), 5000);
    expect(begun).toEqual([held.runId, other.runId]);
    release.abort();
    await until('the run that waited', () => begun.includes(waiting.runId), 5000);
  });

  it('hold many attended runs at once, without a word of a leak', async () => {
    const { begun, execute, release } = holding();
    const warnings: Error[] = [];
    const onWarning = (warning: Error) => void warnings.push(warning);
    process.on('warning', onWarning);
    try {
      lab.work(execute, { attended: 64 });
      const runs = Array.from({ length: 64 }, attended);
      await Promise.all(runs.map((one) => queue.add(one)));
      await until('all of them', () => begun.length === runs.length);
      expect(new Set(begun)).toEqual(new Set(runs.map(({ runId }) => runId)));
      release.abort();
      await lab.drained();
      expect(warnings).toEqual([]);
    } finally {
      process.off('warning', onWarning);
    }
  });

  it('are both cleared, of jobs that wait, that are delayed and that a lost worker holds', async () => {
    const { begun, execute } = holding();
    const lanes: RunLane[] = ['work', 'attended'];
    const held = lanes.map((lane) => run(1, lane));
    for (const one of held) await queue.add(one);
    lab.work(execute, { isLockLong: true });
    await until('the lost worker', () => begun.length === 2);
    for (const lane of lanes) {
      await queue.add(run(1, lane));
      await queue.add(run(2, lane), { delayMs: 60_000 });
    }
    expect(await lab.jobKeys()).toHaveLength(6);
    await queue.clear();
    expect(await lab.jobKeys()).toEqual([]);
    for (const one of held) await queue.add(one);
    const executed: string[] = [];
    lab.work(async (runId) => {
      executed.push(runId);
      return 'done';
    });
    await until('both runs again', () => executed.length === 2, 5000);
    expect(new Set(executed)).toEqual(new Set(held.map(({ runId }) => runId)));
  });

  it('deliver a run later, or again, in its own lane', { timeout: 20_000 }, async () => {
    const { begun, execute, release } = holding();
    const blocker = run();
    const [later, rejected] = [attended(), attended()];
    const deliveries: string[] = [];
    await queue.add(blocker);
    lab.work(async (runId, signal) => {
      if (runId === blocker.runId) return execute(runId, signal);
      deliveries.push(runId);
      const isFirst = deliveries.filter((id) => id === runId).length === 1;
      if (isFirst && runId === rejected.runId) throw new AppError('DATABASE_UNAVAILABLE', 'away');
      return isFirst ? 'later' : 'done';
    });
    await until('the slot to be taken', () => begun.length === 1);
    for (const one of [later, rejected]) await queue.add(one);
    await until('both twice', () => deliveries.length === 4);
    expect([...deliveries].sort()).toEqual([later, later, rejected, rejected].map((r) => r.runId).sort());
    expect(begun).toEqual([blocker.runId]);
    release.abort();
  });

  it('are both stopped: runs end, and nothing more of either is taken', async () => {
    const events: string[] = [];
    const worker = lab.work(async (runId, signal) => {
      events.push(`begin ${runId}`);
      if (!signal.aborted) await once(signal, 'abort');
      await queue.ping(1000);
      events.push(`${(signal.reason as AppError).code} ${runId}`);
      return 'done';
    });
    const [worked, watched] = [run(), attended()];
    for (const one of [worked, watched, run(), attended()]) await queue.add(one);
    await until('a run of each lane', () => events.length === 2);
    await worker.stop(5000);
    expect([...events].sort()).toEqual(
      [worked, watched].flatMap(({ runId }) => [`begin ${runId}`, `INTERRUPTED ${runId}`]).sort(),
    );
    expect(await lab.jobKeys()).toHaveLength(2);
    await expect(worker.stop(5000)).resolves.toBeUndefined();
  });

  it('are each stopped in full when a run of the other does not end', async () => {
    const events: string[] = [];
    const never = new Promise<'done'>(() => undefined);
    const [hanging, ending] = [run(), attended()];
    const worker = lab.work(async (runId, signal) => {
      events.push('begin');
      if (runId === hanging.runId) return never;
      if (!signal.aborted) await once(signal, 'abort');
      await queue.ping(1000);
      events.push('ended');
      return 'done';
    });
    for (const one of [hanging, ending]) await queue.add(one);
    await until('both runs', () => events.length === 2);
    await expect(worker.stop(700)).rejects.toMatchObject({ code: 'TIMEOUT' });
    expect(events).toEqual(['begin', 'begin', 'ended']);
    expect(await lab.jobKeys()).toHaveLength(1);
  });
});
