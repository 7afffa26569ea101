import { z } from 'zod';
import { isUlid, type RunId } from '../lib/id.js';

export const runKindSchema = z.enum(['backup', 'restore', 'check', 'rescan', 'delete']);

/** What a job carries: ids only. */
export const runPayloadSchema = z.strictObject({
  runId: z.custom<RunId>((value) => typeof value === 'string' && isUlid(value)),
  kind: runKindSchema,
});
export type RunPayload = z.infer<typeof runPayloadSchema>;
