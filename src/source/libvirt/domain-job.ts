import { pollUntil } from '../../lib/deadline.js';
import { AppError, isErrorCode } from '../../lib/errors.js';
import { socketOfBackup } from './backup-xml.js';
import { askDomain, type DomainLink } from './domain-link.js';

/** What a domain is busy with. A backup whose server has no Unix socket is somebody else's: null. */
type DomainJob =
  { kind: 'none' } | { kind: 'backup'; socket: string | null } | { kind: 'other'; operation: string };

interface Control {
  signal?: AbortSignal | undefined;
}

const POLL_INTERVAL_MS = 50;

/** Rejects with SOURCE_BUSY when a job runs. Asked before: `backup-begin` waits 30 s for its turn, with the guest frozen. */
export async function refuseOtherJob(link: DomainLink, control: Control): Promise<void> {
  const job = await readJob(link, control);
  if (job.kind === 'none') return;
  const operation = job.kind === 'backup' ? 'Backup' : job.operation;
  throw new AppError('SOURCE_BUSY', `another job runs on the machine: ${operation}`, {
    details: { operation },
  });
}

/** Whether the backup with this socket runs. Null when libvirt cannot be asked: the machine itself does not mind. */
export async function isBackupThere(
  link: DomainLink,
  socket: string,
  control: Control,
): Promise<boolean | null> {
  try {
    return (await readBackupSocket(link, control)) === socket;
  } catch (error) {
    if (isErrorCode(error, 'NOT_FOUND')) return false;
    if (isErrorCode(error, 'SOURCE_UNREACHABLE', 'TIMEOUT')) return null;
    throw error;
  }
}

/**
 * Ends the backup with this socket and resolves when it is gone; any other job is left alone, and so is a
 * machine that is off or gone. Waits for a backup that is just beginning, because it may be this one.
 * Rejects with TIMEOUT when libvirt did not end it, or could not be asked, for the time of a command; at once
 * when the way there is lost.
 */
export async function endBackup(link: DomainLink, socket: string): Promise<void> {
  let refusal: AppError | undefined;
  const lookAndAbort = async (): Promise<true | undefined> => {
    try {
      const job = await readJob(link, {});
      if (job.kind === 'backup' && job.socket === socket) await askDomain(link, ['domjobabort']);
      else if (job.kind !== 'other' || job.operation !== 'Backup') return true;
    } catch (error) {
      // libvirtd is away, or the job ended between the questions: the next look tells.
      if (!(error instanceof AppError)) throw error;
      refusal = error;
    }
    return undefined;
  };
  try {
    const what = 'the end of the backup job';
    const { timeoutMs, lost } = link;
    const signal = lost ?? undefined;
    await pollUntil(lookAndAbort, { timeoutMs, what, intervalMs: POLL_INTERVAL_MS, signal });
  } catch (error) {
    if (!isErrorCode(error, 'TIMEOUT')) throw error;
    throw new AppError('TIMEOUT', `the backup job with ${socket} did not end`, { cause: refusal ?? error });
  }
}

async function readJob(link: DomainLink, control: Control): Promise<DomainJob> {
  try {
    return { kind: 'backup', socket: await readBackupSocket(link, control) };
  } catch (error) {
    if (!isErrorCode(error, 'NOT_FOUND')) throw error;
  }
  try {
    const text = await askDomain(link, ['domjobinfo'], control);
    if (/^Job type:\s*None\b/m.test(text)) return { kind: 'none' };
    return { kind: 'other', operation: /^Operation:\s*(.{1,60}?)\s*$/m.exec(text)?.[1] ?? 'unknown' };
  } catch (error) {
    if (isNoMachine(error)) return { kind: 'none' };
    throw error;
  }
}

/** Rejects with NOT_FOUND when no backup runs, or there is no such machine. */
async function readBackupSocket(link: DomainLink, control: Control): Promise<string | null> {
  return socketOfBackup(await askDomain(link, ['backup-dumpxml'], control));
}

function isNoMachine(error: unknown): boolean {
  if (!(error instanceof AppError)) return false;
  return error.code === 'NOT_FOUND' || /domain is not running/.test(error.message);
}
