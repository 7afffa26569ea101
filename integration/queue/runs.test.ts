import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { RunExecutor, RunQueue } from '../../src/engine/run-queue.js';
import { pollUntil } from '../../src/lib/deadline.js';
import { AppError } from '../../src/lib/errors.js';
import { silentLogger } from '../../src/lib/log.js';
import { openRunQueue, type RunWorkers } from '../../src/queue/index.js';
import type { LabRedis } from '../lab/redis.js';
import { COMMAND_TIMEOUT_MS, labRun as run, startQueueLab, until, type QueueLab } from './queue-lab.js';

let lab: QueueLab;
let redis: LabRedis;
let queue: RunQueue;

beforeEach(async () => {
  lab = await startQueueLab();
  ({ redis, queue } = lab);
});
afterEach(() => lab[Symbol.asyncDispose]());

const work = (execute: RunExecutor, concurrency = 1): RunWorkers => lab.work(execute, { work: concurrency });

describe('the queue of runs', () => {
  it('delivers each run once, in order, and forgets it', async () => {
    const runs = [run(), run(), run()];
    for (const one of runs) await queue.add(one);
    const executed: string[] = [];
    work(async (runId) => {
      executed.push(runId);
      return 'done';
    });
    await until('three runs', () => executed.length === 3);
    expect(executed).toEqual(runs.map((one) => one.runId));
    await lab.drained();
  });

  it('takes a run that is added twice as one job, and again once it has ended', async () => {
    const one = run();
    await Promise.all([queue.add(one), queue.add(one)]);
    await queue.add(one);
    expect(await lab.jobKeys()).toHaveLength(1);
    const executed: string[] = [];
    work(async (runId) => {
      executed.push(runId);
      return 'done';
    });
    await until('the run', () => executed.length === 1);
    await lab.drained();
    await queue.add(one);
    await until('the run again', () => executed.length === 2);
  });

  it('delivers a run at once whose job a lost worker still holds, after the queue was cleared', async () => {
    const one = run();
    await queue.add(one);
    let isHeld = false;
    lab.work(
      async (_runId, signal) => {
        isHeld = true;
        await new Promise((resolve) => {
          signal.addEventListener('abort', resolve);
        });
        return 'done';
      },
      { isLockLong: true },
    );
    await until('the lost worker', () => isHeld);
    await queue.add(one);
    expect(await lab.jobKeys()).toHaveLength(1);
    await queue.clear();
    expect(await lab.jobKeys()).toHaveLength(0);
    await queue.add(one);
    const executed: string[] = [];
    work(async (runId) => {
      executed.push(runId);
      return 'done';
    });
    await until('the run', () => executed.length === 1, 5000);
    expect(executed).toEqual([one.runId]);
  });

  it('holds a retry back for its delay', async () => {
    const startMs = performance.now();
    await queue.add(run(2), { delayMs: 700 });
    let executedMs = 0;
    work(async () => {
      executedMs = performance.now();
      return 'done';
    });
    await until('the run', () => executedMs > 0);
    expect(executedMs - startMs).toBeGreaterThanOrEqual(690);
  });

  it('executes as many at the same time as it may', async () => {
    let now = 0;
    let most = 0;
    const release = new AbortController();
    work(async () => {
      now += 1;
      most = Math.max(most, now);
      if (!release.signal.aborted) await once(release.signal, 'abort');
      now -= 1;
      return 'done';
    }, 2);
    for (let i = 0; i < 4; i += 1) await queue.add(run());
    await until('two at once', () => now === 2);
    release.abort();
    await until('the end', () => now === 0);
    expect(most).toBe(2);
  });

  it(
    'delivers a run again whose turn has not come, more often than it has attempts',
    { timeout: 40_000 },
    async () => {
      const one = run();
      let deliveries = 0;
      work(async () => {
        deliveries += 1;
        return deliveries <= 6 ? 'later' : 'done';
      });
      await queue.add(one);
      await until('the seventh delivery', () => deliveries === 7, 30_000);
    },
  );

  it('delivers again when the executor rejects, and gives up on what is permanent', async () => {
    const [passing, permanent] = [run(), run()];
    const deliveries = new Map<string, number>();
    work(async (runId) => {
      const count = (deliveries.get(runId) ?? 0) + 1;
      deliveries.set(runId, count);
      if (runId === permanent.runId) throw new AppError('NOT_FOUND', 'no such run');
      if (count === 1) throw new AppError('DATABASE_UNAVAILABLE', 'away');
      return 'done';
    });
    await queue.add(permanent);
    await queue.add(passing);
    await until('the second delivery', () => deliveries.get(passing.runId) === 2);
    await lab.drained();
    expect(deliveries.get(permanent.runId)).toBe(1);
  });
});

describe('stop', () => {
  it('aborts what runs with INTERRUPTED, waits for it and takes nothing more', async () => {
    const events: string[] = [];
    const worker = work(async (_runId, signal) => {
      events.push('begin');
      if (!signal.aborted) await once(signal, 'abort');
      events.push((signal.reason as AppError).code);
      await queue.ping(1000);
      events.push('cleaned up');
      return 'done';
    });
    await queue.add(run());
    await queue.add(run());
    await until('the first run', () => events.length === 1);
    await worker.stop(5000);
    expect(events).toEqual(['begin', 'INTERRUPTED', 'cleaned up']);
    expect(await lab.jobKeys()).toHaveLength(1);
  });

  it('ends in its time when a run does not', async () => {
    let isBegun = false;
    const never = new Promise<'done'>(() => undefined);
    const worker = work(async () => {
      isBegun = true;
      return never;
    });
    await queue.add(run());
    await until('the run', () => isBegun);
    const startMs = performance.now();
    await expect(worker.stop(500)).rejects.toMatchObject({ code: 'TIMEOUT' });
    expect(performance.now() - startMs).toBeLessThan(2000);
  });

  it('ends in its time when Redis is away', async () => {
    const worker = work(async () => 'done');
    await queue.add(run());
    await redis.kill();
    // A second for the runs, two to take leave of Redis, two for a busy machine.
    const startMs = performance.now();
    await worker.stop(1000).catch(() => undefined);
    expect(performance.now() - startMs).toBeLessThan(1000 + 2000 + 2000);
  });
});

describe('outages', () => {
  it('Redis away: adding fails in its time with QUEUE_UNAVAILABLE, and works again after', async () => {
    await redis.stop();
    for (const call of [() => queue.add(run()), () => queue.ping(300)]) {
      const startMs = performance.now();
      await expect(call()).rejects.toMatchObject({ code: 'QUEUE_UNAVAILABLE', retryable: true });
      expect(performance.now() - startMs).toBeLessThan(COMMAND_TIMEOUT_MS + 500);
    }
    await redis.start();
    await pollUntil(
      () =>
        queue
          .ping(1000)
          .then(() => true)
          .catch(() => undefined),
      {
        timeoutMs: 5000,
        what: 'Redis answering again',
      },
    );
    await queue.add(run());
  });

  it('Redis hanging: adding fails in its time', async () => {
    redis.server.freeze();
    try {
      const startMs = performance.now();
      await expect(queue.add(run())).rejects.toMatchObject({ code: 'QUEUE_UNAVAILABLE' });
      expect(performance.now() - startMs).toBeLessThan(COMMAND_TIMEOUT_MS + 500);
    } finally {
      redis.server.thaw();
    }
  });

  it('Redis absent at the start: opening fails in its time', async () => {
    const startMs = performance.now();
    await expect(
      openRunQueue(
        { address: { socketPath: lab.directory.file('none.sock') }, commandTimeoutMs: 500 },
        silentLogger(),
      ),
    ).rejects.toMatchObject({ code: 'QUEUE_UNAVAILABLE' });
    expect(performance.now() - startMs).toBeLessThan(2000);
  });

  it(
    'Redis killed in the middle of a run: the run goes on, and a second delivery finds it claimed',
    { timeout: 60_000 },
    async () => {
      const one = run();
      const claimed = new Set<string>();
      let deliveries = 0;
      let ends = 0;
      const release = new AbortController();
      // What the engine does: only the delivery that claims the row executes the run.
      work(async (runId) => {
        deliveries += 1;
        if (claimed.has(runId)) return 'done';
        claimed.add(runId);
        if (!release.signal.aborted) await once(release.signal, 'abort');
        ends += 1;
        return 'done';
      });
      await queue.add(one);
      await until('the run', () => deliveries === 1);
      await redis.kill();
      await redis.start();
      await pollUntil(
        () =>
          queue
            .ping(1000)
            .then(() => true)
            .catch(() => undefined),
        {
          timeoutMs: 10_000,
          what: 'Redis answering again',
        },
      );
      release.abort();
      await until('the end of the run', () => ends === 1);
      const next = run();
      await queue.add(next);
      await until('the next run', () => claimed.has(next.runId), 40_000);
      await lab.drained(20_000);
      expect(ends).toBe(2);
    },
  );

  it('a worker killed in the middle of a run: another one gets the run', { timeout: 60_000 }, async () => {
    const script = new URL('worker-child.ts', import.meta.url).pathname;
    const child = spawn(process.execPath, ['--import', 'tsx', script, redis.socketPath], {
      stdio: ['ignore', 'pipe', 'inherit'],
    });
    let output = '';
    child.stdout.on('data', (chunk: Buffer) => (output += chunk.toString()));
    const one = run();
    try {
      await queue.add(one);
      await until('the run in the other process', () => output.includes(`executing ${one.runId}`));
    } finally {
      child.kill('SIGKILL');
      await once(child, 'exit');
    }
    const executed: string[] = [];
    work(async (runId) => {
      executed.push(runId);
      return 'done';
    });
    await until('the run in this process', () => executed.length === 1);
    expect(executed).toEqual([one.runId]);
  });
});
