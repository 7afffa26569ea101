import { Redis } from 'ioredis';
import type { RunExecutor, RunLane, RunQueue } from '../../src/engine/run-queue.js';
import { CleanupStack } from '../../src/lib/cleanup.js';
import { pollUntil } from '../../src/lib/deadline.js';
import { newId, type RunId } from '../../src/lib/id.js';
import { silentLogger } from '../../src/lib/log.js';
import { openRunQueue, startRunWorkers, type RunWorkers } from '../../src/queue/index.js';
import { makeLabDirectory, type LabDirectory } from '../lab/directory.js';
import { startRedis, type LabRedis } from '../lab/redis.js';

export const COMMAND_TIMEOUT_MS = 1000;

/** A Redis with the sending side of the queues, and as many workers as a test starts. */
export interface QueueLab extends AsyncDisposable {
  readonly directory: LabDirectory;
  readonly redis: LabRedis;
  readonly queue: RunQueue;
  /** With a short lock, so that a lost worker is noticed within a test; the default one is long. */
  work(
    execute: RunExecutor,
    options?: Partial<Record<RunLane, number>> & { isLockLong?: boolean },
  ): RunWorkers;
  /** Of the jobs of both lanes. */
  jobKeys(): Promise<string[]>;
  /** Until no job is left. */
  drained(timeoutMs?: number): Promise<void>;
}

export async function startQueueLab(): Promise<QueueLab> {
  await using stack = new CleanupStack();
  const directory = stack.use(await makeLabDirectory({ wantBytes: 0 }));
  const redis = stack.use(await startRedis({ dir: directory.file('redis') }));
  const connection = { address: { socketPath: redis.socketPath }, commandTimeoutMs: COMMAND_TIMEOUT_MS };
  const queue = stack.use(await openRunQueue(connection, silentLogger()));
  const workers: RunWorkers[] = [];
  stack.defer(() => Promise.allSettled(workers.map((worker) => worker.stop(2000))));
  const steps = stack.move();
  const jobKeys = (): Promise<string[]> => listJobKeys(redis);
  return {
    directory,
    redis,
    queue,
    work(execute, { work = 1, attended = 1, isLockLong = false } = {}) {
      const started = startRunWorkers({
        connection,
        concurrency: { work, attended },
        execute,
        logger: silentLogger(),
        ...(isLockLong ? {} : { jobLockMs: 1000, stalledCheckMs: 500 }),
      });
      workers.push(started);
      return started;
    },
    jobKeys,
    async drained(timeoutMs = 5000) {
      await pollUntil(async () => ((await jobKeys()).length === 0 ? true : undefined), {
        timeoutMs,
        what: 'the end of the jobs',
      });
    },
    [Symbol.asyncDispose]: () => steps.run(),
  };
}

async function listJobKeys(redis: LabRedis): Promise<string[]> {
  const client = new Redis(redis.socketPath);
  try {
    return (await client.keys('holdfast:*')).filter((key) => /:[0-9A-Z]{26}-\d+$/.test(key));
  } finally {
    client.disconnect();
  }
}

export interface LabRun {
  runId: RunId;
  kind: 'backup';
  lane: RunLane;
  attempt: number;
}

export function labRun(attempt = 1, lane: RunLane = 'work'): LabRun {
  return { runId: newId<RunId>(), kind: 'backup', lane, attempt };
}

export function until(what: string, probe: () => boolean, timeoutMs = 15_000): Promise<true> {
  return pollUntil(() => (probe() ? (true as const) : undefined), { timeoutMs, what });
}
