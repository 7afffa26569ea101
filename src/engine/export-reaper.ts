import type { ExportRow } from '../db/database.js';
import { toTimestamp } from '../lib/clock.js';
import { isErrorCode } from '../lib/errors.js';
import type { EngineContext } from './context.js';
import { unpublishExport } from './export-publisher.js';
import { activeRunOf, factsOf } from './export-record.js';

const REAP_INTERVAL_MS = 3000;
/** Of the time that publishing may take: the daemon's answer, the server's, and what goes before. */
const PUBLISH_TIMEOUTS = 3;

/**
 * Removes, now and every few seconds, exports that have expired, that nobody goes on publishing or removing, and
 * those of pushes whose run has ended. `deadWorkerIds` are processes that are known to publish nothing any more.
 * One look at a time; what cannot be removed is logged and tried again.
 */
export function startExportReaper(context: EngineContext, deadWorkerIds: readonly string[]): AsyncDisposable {
  let looking: Promise<void> | undefined;
  const start = (): void => {
    looking ??= reapExports(context, deadWorkerIds).finally(() => (looking = undefined));
  };
  const timer = setInterval(start, REAP_INTERVAL_MS);
  start();
  return {
    async [Symbol.asyncDispose]() {
      clearInterval(timer);
      await looking;
    },
  };
}

/** One look. Never rejects. */
export async function reapExports(context: EngineContext, deadWorkerIds: readonly string[]): Promise<void> {
  try {
    for (const row of await context.db.exports.listAll({})) {
      const reason = await reasonToRemove(context, row, deadWorkerIds);
      if (reason !== null) await remove(context, row, reason);
    }
  } catch (error) {
    context.logger[isErrorCode(error, 'DATABASE_UNAVAILABLE') ? 'warn' : 'error'](
      { err: error },
      'looking for exports to remove failed',
    );
  }
}

async function remove(context: EngineContext, row: ExportRow, reason: string): Promise<void> {
  const { id, name } = row;
  try {
    await unpublishExport(context, id);
    context.logger.info({ exportId: id, name, reason }, 'export removed');
  } catch (error) {
    context.logger.warn({ err: error, exportId: id, name, reason }, 'an export could not be removed yet');
  }
}

/** Null for an export that stays. */
async function reasonToRemove(
  context: EngineContext,
  row: ExportRow,
  deadWorkerIds: readonly string[],
): Promise<string | null> {
  const nowMs = context.clock.nowMs();
  if (row.state === 'removing') return 'its removal was not finished';
  if (row.state === 'publishing') {
    const limitMs = PUBLISH_TIMEOUTS * context.settings.exports.publishTimeoutMs;
    const isLate = Date.parse(row.createdAt) < nowMs - limitMs;
    return isLate || deadWorkerIds.includes(factsOf(row).workerId) ? 'it was never published' : null;
  }
  if ((await activeRunOf(context, row)) !== null) return null;
  if (row.runId !== null) return 'its run has ended';
  return row.expiresAt !== null && row.expiresAt <= toTimestamp(nowMs) ? 'it has expired' : null;
}
