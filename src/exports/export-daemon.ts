import { readFile } from 'node:fs/promises';
import { pollUntil } from '../lib/deadline.js';
import { AppError, errnoOf, isErrorCode } from '../lib/errors.js';
import { isSameProcess } from '../lib/process.js';
import { hostMonotonicMs, readExportStatus, type ExportStatus } from './export-status.js';

/** Where an export daemon is found. */
export interface ExportDaemonPlace {
  pidFile: string;
  statusFile: string;
}

/** True while the very process that wrote the status lives. */
export function isExportDaemonAlive(status: ExportStatus): Promise<boolean> {
  return isSameProcess({ pid: status.pid, startTime: status.processStartTime });
}

/**
 * The status of the daemon that may be signalled. The pid file alone is never believed: the status file must
 * name the same process, and that process must be the one that wrote it. EXPORT_DAEMON_UNAVAILABLE when none
 * such runs.
 */
export async function requireExportDaemon({ pidFile, statusFile }: ExportDaemonPlace): Promise<ExportStatus> {
  const pid = await readPid(pidFile);
  const status = await readExportStatus(statusFile);
  if (pid !== null && status?.pid === pid && (await isExportDaemonAlive(status))) return status;
  throw new AppError('EXPORT_DAEMON_UNAVAILABLE', `no export daemon runs by ${pidFile}`, {
    details: { pidFile },
  });
}

/**
 * Has the daemon read its directory again (SIGHUP), and answers its status after that: what was written or
 * removed before the call is in it, each file served or failed. EXPORT_DAEMON_UNAVAILABLE when none runs, it may
 * not be signalled, or it does not finish in time.
 */
export async function reloadExportDaemon(
  place: ExportDaemonPlace,
  options: { timeoutMs: number; signal?: AbortSignal | undefined },
): Promise<ExportStatus> {
  const { pid } = await requireExportDaemon(place);
  const askedAtMs = hostMonotonicMs();
  try {
    process.kill(pid, 'SIGHUP');
    return await pollUntil(
      async () => {
        const status = await requireExportDaemon(place);
        return status.generation > 0 && status.readAtMs >= askedAtMs ? status : undefined;
      },
      { ...options, what: 'the export daemon reading its directory' },
    );
  } catch (error) {
    if (errnoOf(error) !== 'EPERM' && !isErrorCode(error, 'TIMEOUT')) throw error;
    const problem = error instanceof Error ? error.message : String(error);
    throw new AppError('EXPORT_DAEMON_UNAVAILABLE', `the export daemon ${pid} does not answer: ${problem}`, {
      cause: error,
      details: { pid },
    });
  }
}

async function readPid(pidFile: string): Promise<number | null> {
  try {
    const text = await readFile(pidFile, 'utf8');
    return /^[1-9]\d{0,9}\n$/.test(text) ? Number(text) : null;
  } catch (error) {
    if (errnoOf(error) === 'ENOENT') return null;
    throw error;
  }
}
