import { z } from 'zod';
import { AppError } from '../lib/errors.js';
import { isUlid, type RunId } from '../lib/id.js';
import type { RunLane } from '../engine/run-queue.js';
import { RUN_KINDS } from '../engine/types.js';

export const runKindSchema = z.enum(RUN_KINDS);

/** What a job carries: ids only. */
export const runPayloadSchema = z.strictObject({
  runId: z.custom<RunId>((value) => typeof value === 'string' && isUlid(value)),
  kind: runKindSchema,
});
export type RunPayload = z.infer<typeof runPayloadSchema>;

/** Every queue with what its jobs carry. */
export const QUEUES = {
  runs: { payload: runPayloadSchema },
  attended: { payload: runPayloadSchema },
} as const;
export type QueueName = keyof typeof QUEUES;
export const QUEUE_NAMES: readonly QueueName[] = Object.keys(QUEUES) as QueueName[];

/** The queue of each lane. */
export const LANE_QUEUES: Record<RunLane, QueueName> = { work: 'runs', attended: 'attended' };

/** Executes one job of a queue. */
export interface QueueHandler {
  queue: QueueName;
  /** Jobs executed at the same time. */
  concurrency: number;
  /** `later`: delivered again after LATER_MS, which is no attempt. */
  handle: (payload: RunPayload, signal: AbortSignal) => Promise<'done' | 'later'>;
}

/** INTERNAL unless every queue has exactly one handler: found at the start, not when a job is lost. */
export function checkHandlers(handlers: readonly { queue: string }[]): void {
  for (const name of QUEUE_NAMES) {
    const count = handlers.filter((handler) => handler.queue === name).length;
    if (count !== 1) {
      throw new AppError('INTERNAL', `queue ${name} has ${count} handlers instead of one`, {
        details: { queue: name, count },
      });
    }
  }
}

/**
 * Who tries again. A run that fails is ended or queued again by the engine, which counts the attempt
 * in the run's row and adds it here with a delay: that is a new job. BullMQ repeats a job only when
 * the executor itself rejects, because of a fault in Holdfast or a database that is away; the run is
 * then still as it was. A job that is delivered twice (its worker or Redis died) is harmless: only
 * one delivery can claim the run's row.
 */
export const INFRASTRUCTURE_ATTEMPTS = 5;
export const INFRASTRUCTURE_BACKOFF_MS = 1000;

/** Wait before a job is delivered again whose turn has not come. */
export const LATER_MS = 1000;

/** Longer than Redis is usually away: while it lasts nobody else takes the job. */
export const JOB_LOCK_MS = 60_000;
export const STALLED_CHECK_MS = 30_000;
/** A lost worker is no fault of the job. */
export const MAX_STALLED_COUNT = 1000;
