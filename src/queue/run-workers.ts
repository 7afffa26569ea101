import { DelayedError, UnrecoverableError, Worker, type Job } from 'bullmq';
import type { RunExecutor, RunLane } from '../engine/run-queue.js';
import { systemClock, type Clock } from '../lib/clock.js';
import { withDeadline } from '../lib/deadline.js';
import { AppError, isErrorCode, toAppError } from '../lib/errors.js';
import type { Logger } from '../lib/log.js';
import { connectForWorkers, DEFAULT_PREFIX, type QueueConnection } from './connection.js';
import {
  checkHandlers,
  JOB_LOCK_MS,
  LANE_QUEUES,
  LATER_MS,
  MAX_STALLED_COUNT,
  QUEUES,
  STALLED_CHECK_MS,
  type QueueHandler,
} from './queues.js';

/** Redis answers at once, or is away. */
const LEAVE_TIMEOUT_MS = 2000;

export interface RunWorkersOptions {
  connection: QueueConnection;
  /** Runs executed at the same time, in each lane. */
  concurrency: Record<RunLane, number>;
  execute: RunExecutor;
  logger: Logger;
  clock?: Clock;
  /** How long a job stays with a worker that gave no sign of life, and how often that is looked at. Defaults: 60 s and 30 s. */
  jobLockMs?: number;
  stalledCheckMs?: number;
}

/** The executing side of the queue. */
export interface RunWorkers {
  /**
   * Takes no more jobs, aborts the running ones with INTERRUPTED and waits for them. Rejects with
   * TIMEOUT when they have not ended in time; the connections are closed all the same. Idempotent.
   */
  stop(timeoutMs: number): Promise<void>;
}

/** Starts to take jobs at once; when Redis is away, as soon as it is there. */
export function startRunWorkers(options: RunWorkersOptions): RunWorkers {
  const { concurrency } = options;
  const lanes = Object.keys(LANE_QUEUES) as RunLane[];
  const handlers: QueueHandler[] = lanes.map((lane) => ({
    queue: LANE_QUEUES[lane],
    concurrency: concurrency[lane],
    handle: ({ runId }, signal) => options.execute(runId, signal),
  }));
  checkHandlers(handlers);
  const started = handlers.map((handler) => startWorker(handler, options));
  let stopping: Promise<void> | undefined;
  return {
    stop: (timeoutMs) => (stopping ??= stopAll(started, timeoutMs)),
  };
}

/** Not over before each is: what the runs of one lane use must stay when the other lane fails at once. */
async function stopAll(workers: RunWorkers[], timeoutMs: number): Promise<void> {
  const stops = await Promise.allSettled(workers.map((worker) => worker.stop(timeoutMs)));
  const failed = stops.find((stop) => stop.status === 'rejected');
  if (failed !== undefined) throw toAppError(failed.reason);
}

function startWorker(handler: QueueHandler, options: RunWorkersOptions): RunWorkers {
  const log = options.logger.child({ component: 'worker', queue: handler.queue });
  const connection = connectForWorkers(options.connection, log);
  const stopped = new AbortController();
  const running = new Set<Promise<unknown>>();
  const clock = options.clock ?? systemClock;
  const process = (job: Job<unknown>, token?: string): Promise<void> => {
    const work = executeJob(job, handler, stopped.signal);
    running.add(work);
    const forget = (): void => void running.delete(work);
    work.then(forget, forget);
    return work.then(async (outcome) => {
      if (outcome === 'done') return;
      await job.moveToDelayed(clock.nowMs() + LATER_MS, token);
      throw new DelayedError();
    });
  };
  const worker = new Worker<unknown, void>(handler.queue, process, {
    connection: connection.redis,
    prefix: options.connection.prefix ?? DEFAULT_PREFIX,
    concurrency: handler.concurrency,
    lockDuration: options.jobLockMs ?? JOB_LOCK_MS,
    stalledInterval: options.stalledCheckMs ?? STALLED_CHECK_MS,
    maxStalledCount: MAX_STALLED_COUNT,
  });
  logEvents(worker, log);
  return {
    async stop(timeoutMs) {
      // Before anything is awaited: a job that arrives from now on is aborted from its beginning.
      stopped.abort(new AppError('INTERRUPTED', 'the daemon is stopping'));
      try {
        await withDeadline(endJobs(worker, running), { timeoutMs, what: 'the end of the running jobs' });
        await takeLeave(worker, log);
      } catch (error) {
        log.error({ err: error, running: running.size }, 'jobs were left behind');
        throw error;
      } finally {
        connection.disconnect();
      }
    },
  };
}

async function executeJob(
  job: Job<unknown>,
  handler: QueueHandler,
  signal: AbortSignal,
): Promise<'done' | 'later'> {
  const payload = QUEUES[handler.queue].payload.safeParse(job.data);
  if (!payload.success) throw new UnrecoverableError('the job does not carry what its queue promises');
  try {
    return await handler.handle(payload.data, signal);
  } catch (error) {
    const failure = toAppError(error);
    // INTERNAL is repeated too: what is known to be permanent has another code.
    if (failure.retryable || failure.code === 'INTERNAL') throw failure;
    throw new UnrecoverableError(`${failure.code}: ${failure.message}`);
  }
}

/** The runs end by themselves once aborted. Their rows say how, so that Redis need not be there for it. */
async function endJobs(worker: Worker<unknown, void>, running: ReadonlySet<Promise<unknown>>): Promise<void> {
  await worker.pause(true);
  await Promise.allSettled(running);
}

/** Takes the ended jobs off the queue. When Redis is away they stay there, which is harmless: nobody can claim their runs. */
async function takeLeave(worker: Worker<unknown, void>, log: Logger): Promise<void> {
  try {
    await withDeadline(worker.close(), { timeoutMs: LEAVE_TIMEOUT_MS, what: 'taking leave of Redis' });
  } catch (error) {
    if (!isErrorCode(error, 'TIMEOUT')) throw error;
    log.warn({ err: error }, 'ended jobs stay in the queue');
  }
}

function logEvents(worker: Worker<unknown, void>, log: Logger): void {
  worker.on('error', (error) => {
    log.debug({ err: error }, 'worker connection error');
  });
  worker.on('failed', (job, error) => {
    const isLast = job === undefined || job.attemptsMade >= (job.opts.attempts ?? 1);
    log.error({ err: error, jobId: job?.id, attempt: job?.attemptsMade, isLast }, 'executing a job failed');
  });
  worker.on('stalled', (jobId) => {
    log.warn({ jobId }, 'a job lost its worker and is delivered again');
  });
  worker.on('lockRenewalFailed', (jobIds) => {
    log.warn({ jobIds }, 'running jobs lost their lock and may be delivered again');
  });
}
