import { readFile } from 'node:fs/promises';
import { pollUntil } from '../lib/deadline.js';
import { AppError, errnoOf } from '../lib/errors.js';
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
 * Has the daemon read its directory again (SIGHUP), and answers its status after that: what was written or
 * removed before the call is in it, each file served or failed. The pid file alone is never believed: the
 * status file must name the same process, and that process must be the one that wrote it. CONFLICT when none
 * such runs, TIMEOUT when it does not finish.
 */
export async function reloadExportDaemon(
  { pidFile, statusFile }: ExportDaemonPlace,
  options: { timeoutMs: number; signal?: AbortSignal | undefined },
): Promise<ExportStatus> {
  const pid = await readPid(pidFile);
  const before = await readExportStatus(statusFile);
  if (pid === null || before?.pid !== pid || !(await isExportDaemonAlive(before))) throw notRunning(pidFile);
  const askedAtMs = hostMonotonicMs();
  process.kill(pid, 'SIGHUP');
  return pollUntil(
    async () => {
      const status = await readExportStatus(statusFile);
      if (status === null || !(await isExportDaemonAlive(status))) throw notRunning(pidFile);
      return status.generation > 0 && status.readAtMs >= askedAtMs ? status : undefined;
    },
    { ...options, what: 'the export daemon reading its directory' },
  );
}

function notRunning(pidFile: string): AppError {
  return new AppError('CONFLICT', `no export daemon runs by ${pidFile}; start holdfast-exportd`, {
    details: { pidFile },
  });
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
