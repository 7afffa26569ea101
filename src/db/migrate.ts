import { createHash } from 'node:crypto';
import type { Knex } from 'knex';
import { pollUntil } from '../lib/deadline.js';
import { AppError } from '../lib/errors.js';
import type { Engine } from './connection.js';
import { MIGRATIONS, type SchemaMigration } from './migrations/index.js';
import type { Session } from './session.js';

const MIGRATE_TIMEOUT_MS = 120_000;
/** How long the server waits for the lock in one statement; well below the statement deadline. */
const LOCK_WAIT_SECONDS = 1;
const TABLE = 'schema_migrations';

/**
 * Brings the schema to the newest state. Safe when several processes start at once: on SQLite all of
 * it is one transaction, on MariaDB the server's named lock is held, which ends with its connection.
 */
export async function migrate(knex: Knex, session: Session): Promise<void> {
  if (session.engine === 'sqlite') {
    await session.transaction('migrating the database', (trx) => applyAll(trx, 'sqlite'));
    return;
  }
  await session.transaction('migrating the database', async (holder) => {
    const name = await lockName(holder);
    await acquireLock(holder, name);
    try {
      await applyAll(knex, 'mysql');
    } finally {
      await holder.raw('SELECT RELEASE_LOCK(?)', [name]);
    }
  });
}

/** Named locks count for the whole server: the name has the database in it, within 64 characters. */
async function lockName(db: Knex): Promise<string> {
  const rows = await selectRaw(db, 'SELECT DATABASE() AS answer');
  const digest = createHash('sha256').update(String(rows[0]?.answer)).digest('hex');
  return `holdfast-migrate-${digest.slice(0, 32)}`;
}

async function acquireLock(holder: Knex, name: string): Promise<void> {
  await pollUntil(
    async () => {
      const rows = await selectRaw(holder, 'SELECT GET_LOCK(?, ?) AS answer', [name, LOCK_WAIT_SECONDS]);
      return Number(rows[0]?.answer) === 1 ? true : undefined;
    },
    { timeoutMs: MIGRATE_TIMEOUT_MS, what: 'the lock for migrating the database' },
  );
}

async function selectRaw(
  db: Knex,
  sql: string,
  bindings: readonly (string | number)[] = [],
): Promise<{ answer: unknown }[]> {
  const [rows] = (await db.raw(sql, bindings)) as [{ answer: unknown }[]];
  return rows;
}

async function applyAll(db: Knex, engine: Engine): Promise<void> {
  const config: Knex.MigratorConfig = {
    tableName: TABLE,
    migrationSource: new SchemaMigrationSource(engine),
    disableMigrationsListValidation: true,
  };
  await refuseNewer(db);
  // Nobody else migrates now: a lock row of knex is what a crashed process left behind.
  await db.migrate.forceFreeMigrationsLock(config);
  await db.migrate.latest(config);
}

/** A database that a newer Holdfast has changed is not touched. */
async function refuseNewer(db: Knex): Promise<void> {
  if (!(await db.schema.hasTable(TABLE))) return;
  const applied = await db<{ name: string }>(TABLE).select('name');
  const known = new Set(MIGRATIONS.map((migration) => migration.name));
  const unknown = applied.find(({ name }) => !known.has(name));
  if (unknown !== undefined) {
    throw new AppError('CONFIG_INVALID', `the database was changed by a newer Holdfast (${unknown.name})`, {
      details: { key: 'database', migration: unknown.name },
    });
  }
}

/** Gives knex our modules in place of a directory of scripts. */
class SchemaMigrationSource implements Knex.MigrationSource<SchemaMigration> {
  constructor(private readonly engine: Engine) {}

  getMigrations(): Promise<SchemaMigration[]> {
    return Promise.resolve([...MIGRATIONS]);
  }

  getMigrationName(migration: SchemaMigration): string {
    return migration.name;
  }

  getMigration(migration: SchemaMigration): Promise<Knex.Migration> {
    return Promise.resolve({
      up: (db: Knex) => migration.up(db, this.engine),
      down: () => Promise.reject(new Error('the schema only goes forward: restore a backup of the database')),
    });
  }
}
