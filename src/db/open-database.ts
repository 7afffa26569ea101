import type { Clock } from '../lib/clock.js';
import { withDeadline } from '../lib/deadline.js';
import { AppError, isErrorCode } from '../lib/errors.js';
import type { Logger } from '../lib/log.js';
import { createAuditLogTable } from './audit-log-table.js';
import { connect, type DatabaseOptions } from './connection.js';
import type { Database } from './database.js';
import { createExportTable } from './export-table.js';
import { createIdempotencyTable } from './idempotency-table.js';
import { migrate } from './migrate.js';
import { createPushDiskTable } from './push-disk-table.js';
import { createRecoveryPointTable } from './recovery-point-table.js';
import { createRepositoryTable } from './repository-table.js';
import { createRunEventTable } from './run-event-table.js';
import { createRunTable } from './run-table.js';
import { Session } from './session.js';
import { createSettingTable } from './setting-table.js';
import { createTokenTable } from './token-table.js';
import { createVmTable } from './vm-table.js';
import { createVolumeTable } from './volume-table.js';

export type { DatabaseOptions } from './connection.js';

const OPEN_TIMEOUT_MS = 15_000;

/**
 * Opens the database and asks it one question, so that wrong settings and an unreachable server are
 * found at the start (DATABASE_UNAVAILABLE, CONFIG_INVALID). The schema is not touched: call `migrate`.
 * The caller disposes it, after everything that uses it.
 */
export async function openDatabase(
  options: DatabaseOptions,
  { logger, clock }: { logger: Logger; clock: Clock },
): Promise<Database> {
  const log = logger.child({ component: 'database' });
  const knex = connect(options, log);
  const session = new Session(knex, { engine: options.kind, logger: log, clock });
  let closing: Promise<void> | undefined;
  const close = (): Promise<void> => (closing ??= knex.destroy());
  try {
    await ping(session, OPEN_TIMEOUT_MS);
  } catch (error) {
    await close();
    throw error;
  }
  return {
    repositories: createRepositoryTable(session),
    vms: createVmTable(session),
    runs: createRunTable(session),
    runEvents: createRunEventTable(session),
    points: createRecoveryPointTable(session),
    tokens: createTokenTable(session),
    idempotencyKeys: createIdempotencyTable(session),
    auditLog: createAuditLogTable(session),
    settings: createSettingTable(session),
    exports: createExportTable(session),
    pushDisks: createPushDiskTable(session),
    volumes: createVolumeTable(session),
    migrate: () => migrate(knex, session),
    ping: (timeoutMs) => ping(session, timeoutMs),
    [Symbol.asyncDispose]: close,
  };
}

async function ping(session: Session, timeoutMs: number): Promise<void> {
  const work = session.run('asking the database', async (db) => {
    await db.raw('SELECT 1');
  });
  try {
    await withDeadline(work, { timeoutMs, what: 'the answer of the database' });
  } catch (error) {
    if (!isErrorCode(error, 'TIMEOUT')) throw error;
    throw new AppError('DATABASE_UNAVAILABLE', `the database did not answer within ${timeoutMs} ms`, {
      cause: error,
    });
  }
}
