import { Queue } from 'bullmq';
import type { RunQueue } from '../engine/run-queue.js';
import { CleanupStack } from '../lib/cleanup.js';
import { withDeadline } from '../lib/deadline.js';
import { AppError } from '../lib/errors.js';
import type { Logger } from '../lib/log.js';
import {
  connectForCommands,
  DEFAULT_COMMAND_TIMEOUT_MS,
  DEFAULT_PREFIX,
  type QueueConnection,
} from './connection.js';
import {
  INFRASTRUCTURE_ATTEMPTS,
  INFRASTRUCTURE_BACKOFF_MS,
  LANE_QUEUES,
  QUEUE_NAMES,
  type QueueName,
  type RunPayload,
} from './queues.js';

/**
 * Opens the sending side of the runs' queues. Rejects with QUEUE_UNAVAILABLE when Redis does not
 * answer in the time of a command; later outages only fail the calls that meet them.
 */
export async function openRunQueue(connection: QueueConnection, logger: Logger): Promise<RunQueue> {
  const log = logger.child({ component: 'queue' });
  const timeoutMs = connection.commandTimeoutMs ?? DEFAULT_COMMAND_TIMEOUT_MS;
  const cleanup = new CleanupStack();
  const redis = connectForCommands(connection, log);
  cleanup.defer(() => {
    redis.disconnect();
  });
  const ping = (limitMs: number): Promise<void> =>
    withinDeadline(redis.ping(), { timeoutMs: limitMs, what: 'Redis answering a ping' });
  try {
    await ping(timeoutMs);
  } catch (error) {
    await cleanup.run();
    throw error;
  }
  const open = (name: QueueName): Queue<RunPayload> => {
    const queue = new Queue<RunPayload>(name, {
      connection: redis,
      prefix: connection.prefix ?? DEFAULT_PREFIX,
      defaultJobOptions: {
        attempts: INFRASTRUCTURE_ATTEMPTS,
        backoff: { type: 'exponential', delay: INFRASTRUCTURE_BACKOFF_MS },
        // An ended job leaves nothing: its id must be free, or a run still queued could not be added again.
        removeOnComplete: true,
        removeOnFail: true,
      },
    });
    queue.on('error', (error) => {
      log.debug({ err: error }, 'queue connection error');
    });
    cleanup.defer(() => queue.close());
    return queue;
  };
  const queues = { runs: open('runs'), attended: open('attended') };
  let closing: Promise<void> | undefined;
  return {
    async add({ runId, kind, lane, attempt }, { delayMs = 0 } = {}) {
      const options = { jobId: `${runId}-${attempt}`, delay: delayMs };
      const job = queues[LANE_QUEUES[lane]].add(kind, { runId, kind }, options);
      await withinDeadline(job, { timeoutMs, what: `adding run ${runId} to the queue` });
    },
    async clear() {
      const work = Promise.all(QUEUE_NAMES.map((name) => queues[name].obliterate({ force: true })));
      await withinDeadline(work, { timeoutMs, what: 'clearing the queues' });
    },
    ping,
    [Symbol.asyncDispose]: () => (closing ??= cleanup.run()),
  };
}

/** Every fault on the way to Redis is the same to the caller: not added, or not known to be. */
async function withinDeadline(
  work: Promise<unknown>,
  options: { timeoutMs: number; what: string },
): Promise<void> {
  try {
    await withDeadline(work, options);
  } catch (error) {
    throw new AppError('QUEUE_UNAVAILABLE', `${options.what} failed: Redis is not available`, {
      cause: error,
    });
  }
}
