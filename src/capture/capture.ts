import { AppError } from '../lib/errors.js';
import { HASH_BYTES } from '../nbd/index.js';
import {
  DiskPush,
  type CopySettings,
  type DiskProgress,
  type PushedDisk,
  type PushedTotals,
} from './disk-push.js';
import { Reporter } from './reporter.js';

const METHODS: readonly string[] = ['full', 'bitmap'];

/**
 * Who asked for the disks. Each answers false when nobody hears it just now, and rejects when the push is over. A
 * signal ends the waiting.
 */
export interface PushServer {
  /** Every two seconds, with the disks that are not complete. */
  report(disks: readonly DiskReport[], signal: AbortSignal): Promise<boolean>;
  /** The disk is written and flushed. May be said again. */
  complete(disk: PushedDisk, totals: PushedTotals, signal: AbortSignal): Promise<boolean>;
}

export interface DiskReport {
  diskId: string;
  progress: DiskProgress;
}

export interface PushJob extends CopySettings {
  disks: readonly PushedDisk[];
  server: PushServer;
  /** The server fails a push of which it hears nothing for this long. */
  silenceMs: number;
  signal: AbortSignal;
}

/**
 * Writes every disk to its export, one after the other, and tells the server. Resolves when all are complete there;
 * what becomes of them is the server's. Sources, exports and the push at the server stay as they are when it rejects.
 */
export async function pushDisks(job: PushJob): Promise<void> {
  requireKnown(job);
  const over = new AbortController();
  const signal = AbortSignal.any([job.signal, over.signal]);
  const pushes = job.disks.map((disk) => new DiskPush(disk, job, signal));
  const open = new Set(pushes);
  const report = async (): Promise<boolean> => open.size === 0 || job.server.report(reportsOf(open), signal);
  const complete = async (push: DiskPush, totals: PushedTotals): Promise<boolean> => {
    const isHeard = await job.server.complete(push.disk, totals, signal);
    if (isHeard) open.delete(push);
    return isHeard;
  };
  const reporter = new Reporter({ ...job, signal, report });
  const reporting = reporter.run().catch((error: unknown) => {
    if (!signal.aborted) over.abort(error);
  });
  try {
    for (const push of pushes) await push.checkSink();
    for (const push of pushes) {
      const totals = await push.copy();
      await reporter.insist(() => complete(push, totals));
    }
  } catch (error) {
    throw over.signal.aborted ? over.signal.reason : error;
  } finally {
    over.abort();
    await reporting;
  }
}

/** A newer server may want what this agent cannot do. */
function requireKnown({ hash, disks }: PushJob): void {
  if (!Object.hasOwn(HASH_BYTES, hash)) {
    throw new AppError('REPOSITORY_FORMAT', `this agent does not know the hash ${hash}`);
  }
  const unknown = disks.find(({ method }) => !METHODS.includes(method));
  if (unknown !== undefined) {
    throw new AppError('REPOSITORY_FORMAT', `this agent does not know the method ${unknown.method}`);
  }
}

function reportsOf(open: ReadonlySet<DiskPush>): DiskReport[] {
  return [...open].map((push) => ({ diskId: push.disk.diskId, progress: push.progress() }));
}
