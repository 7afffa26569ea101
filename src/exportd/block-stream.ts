import { open } from 'node:fs/promises';
import { z } from 'zod';
import { pause, pollUntil, throwIfAborted, withDeadline } from '../lib/deadline.js';
import { AppError } from '../lib/errors.js';
import { QmpError, type QmpClient } from '../lib/qmp.js';
import type { BlockNode } from './image.js';

export interface BlockStreamOptions {
  /** The file that the node writes to. */
  imagePath: string;
  /** Called from time to time with a position in the disk. */
  onProgress: (doneBytes: number) => void;
  signal: AbortSignal;
}

const POLL_MS = 200;
const CANCEL_TIMEOUT_MS = 30_000;
/** All that was copied may still be in memory. */
const SYNC_TIMEOUT_MS = 3_600_000;

const jobsSchema = z.array(
  z.object({
    id: z.string(),
    status: z.string(),
    'current-progress': z.number(),
    error: z.string().optional(),
  }),
);
type Job = z.infer<typeof jobsSchema>[number];

/** A node whose children have names, as `streamNode` needs them. */
export function nameNode(node: BlockNode, name: string): BlockNode {
  return {
    ...replaceChildren(node, (child, role) => ({ ...child, 'node-name': `${name}-${role}` })),
    'node-name': name,
  };
}

/**
 * Copies into a QCOW2 image, which `nameNode` named, what its backing files hold, while clients use it. Resolves
 * when its header names none, and both are on the disk; QEMU has closed them then. Rejects with TOOL_FAILED when
 * a file cannot be read or written, with the signal's reason, or as the connection does; the image is then what
 * it was, on its backing files.
 */
export async function streamNode(
  qmp: QmpClient,
  { node, name }: { node: BlockNode; name: string },
  options: BlockStreamOptions,
): Promise<void> {
  const { imagePath, signal } = options;
  const id = `${name}-stream`;
  // However long it takes: whoever asked for it sees the progress, and can take it back.
  const follow = async (status: string): Promise<void> => {
    for (;;) {
      throwIfAborted(signal);
      const job = await findJob(qmp, id);
      if (job === undefined) throw new AppError('INTERNAL', `the job ${id} is gone`);
      options.onProgress(job['current-progress']);
      if (job.error !== undefined) throw new AppError('TOOL_FAILED', `QEMU cannot copy: ${job.error}`);
      if (job.status === status) return;
      await pause(POLL_MS, signal);
    }
  };
  const isKept = { 'auto-finalize': false, 'auto-dismiss': false };
  await qmp.execute('block-stream', { 'job-id': id, device: name, ...isKept });
  try {
    await follow('pending');
    // QEMU 7.2 writes the header without a flush before it: a death right after would leave an image that lacks
    // what it copied, with nothing behind it. To reopen a node flushes it; what is in the page cache goes
    // first, or all clients would wait for it.
    await syncFile(imagePath, signal);
    const reopened = replaceChildren(node, (_child, role) => `${name}-${role}`);
    await qmp.execute('blockdev-reopen', { options: [{ ...reopened, 'node-name': name }] });
    await qmp.execute('job-finalize', { id });
    await follow('concluded');
  } finally {
    await endJob(qmp, id);
  }
  await syncFile(imagePath, signal);
}

export async function syncFile(file: string, signal: AbortSignal): Promise<void> {
  const handle = await open(file, 'r');
  // To close it waits for the sync, which nothing can stop.
  const synced = handle.sync().finally(() => handle.close());
  await withDeadline(synced, { timeoutMs: SYNC_TIMEOUT_MS, what: `writing ${file} to the disk`, signal });
}

/** Cancels it unless it has ended, and has QEMU forget it: until then it holds the node. */
async function endJob(qmp: QmpClient, id: string): Promise<void> {
  const hasEnded = async (): Promise<true | undefined> =>
    (await findJob(qmp, id))?.status === 'concluded' ? true : undefined;
  if (!(await hasEnded())) await cancelJob(qmp, id);
  await pollUntil(hasEnded, { timeoutMs: CANCEL_TIMEOUT_MS, what: `the end of the job ${id}` });
  await qmp.execute('job-dismiss', { id });
}

async function cancelJob(qmp: QmpClient, id: string): Promise<void> {
  try {
    await qmp.execute('job-cancel', { id });
  } catch (error) {
    // Refused for one that is about to end by itself, which whoever waits for its end sees.
    if (!(error instanceof QmpError)) throw error;
  }
}

async function findJob(qmp: QmpClient, id: string): Promise<Job | undefined> {
  return jobsSchema.parse(await qmp.execute('query-jobs')).find((job) => job.id === id);
}

function replaceChildren(
  node: BlockNode,
  replace: (child: BlockNode, role: 'file' | 'backing') => unknown,
): BlockNode {
  const { file, backing } = node;
  return {
    ...node,
    ...(isNode(file) ? { file: replace(file, 'file') } : {}),
    ...(isNode(backing) ? { backing: replace(backing, 'backing') } : {}),
  };
}

function isNode(child: unknown): child is BlockNode {
  return typeof child === 'object' && child !== null;
}
