import { execFile } from 'node:child_process';
import { readdir, readFile } from 'node:fs/promises';
import { promisify } from 'node:util';
import { createConnection } from 'mysql2/promise';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { openDatabase, type Database } from '../../src/db/index.js';
import { systemClock } from '../../src/lib/clock.js';
import { pollUntil } from '../../src/lib/deadline.js';
import { silentLogger } from '../../src/lib/log.js';
import { describeDatabase } from '../../test/contract/database-contract.js';
import { repositoryRow } from '../../test/contract/database-fixture.js';
import { makeLabDirectory, type LabDirectory } from '../lab/directory.js';
import type { LabServer } from '../lab/server.js';
import { startMariadb, type LabDatabase, type LabMariadb } from '../lab/mariadb.js';
import { MIGRATIONS } from '../../src/db/migrations/index.js';

const context = { logger: silentLogger(), clock: systemClock };
const MIGRATE_SCRIPT = new URL('migrate-child.ts', import.meta.url).pathname;

describeDatabase('MariaDB', async () => {
  const directory = await makeLabDirectory();
  const server = await startMariadb({ dir: directory.path });
  const { url, socketPath } = await server.createDatabase();
  return {
    open: () => openDatabase({ kind: 'mysql', url, socketPath }, context),
    async [Symbol.asyncDispose]() {
      await server[Symbol.asyncDispose]();
      await directory[Symbol.asyncDispose]();
    },
  };
});

/** A stop reaches each thread in its own time: waits until none runs any more. */
async function freeze(frozen: LabServer): Promise<void> {
  frozen.freeze();
  await pollUntil(
    async () => {
      const tasks = await readdir(`/proc/${frozen.pid}/task`);
      const stats = await Promise.all(
        tasks.map((task) => readFile(`/proc/${frozen.pid}/task/${task}/stat`, 'utf8')),
      );
      return stats.every((stat) => / T /.test(stat.slice(stat.lastIndexOf(')')))) ? true : undefined;
    },
    { timeoutMs: 5000, what: 'the stop of every thread' },
  );
}

describe('a MariaDB server', () => {
  let directory: LabDirectory;
  let server: LabMariadb;
  let database: LabDatabase;
  const open = (change: { url?: string; queryTimeoutMs?: number } = {}): Promise<Database> =>
    openDatabase(
      { kind: 'mysql', url: database.url, socketPath: server.socketPath, connectTimeoutMs: 2000, ...change },
      context,
    );
  beforeAll(async () => {
    directory = await makeLabDirectory();
    server = await startMariadb({ dir: directory.path });
    database = await server.createDatabase('holdfast');
  });
  afterAll(async () => {
    await server[Symbol.asyncDispose]();
    await directory[Symbol.asyncDispose]();
  });

  it('is migrated once by two processes that start at the same time', { timeout: 60_000 }, async () => {
    const run = promisify(execFile);
    const argv = ['--import', 'tsx', MIGRATE_SCRIPT, database.url, server.socketPath];
    await Promise.all([run(process.execPath, argv), run(process.execPath, argv)]);
    await using db = await open();
    const row = repositoryRow();
    await db.repositories.insert(row);
    expect(await db.repositories.get(row.id)).toEqual(row);
  });

  it('whose lock of a migration was left by a crash is migrated all the same', async () => {
    await using db = await open();
    await db.migrate();
    const admin = await createConnection({ socketPath: server.socketPath, user: 'root' });
    await admin.query('UPDATE holdfast.schema_migrations_lock SET is_locked = 1');
    await admin.query(`DELETE FROM holdfast.schema_migrations WHERE name = '0011-audit-log'`);
    await db.migrate();
    const [rows] = await admin.query('SELECT count(*) AS n FROM holdfast.schema_migrations');
    await admin.end();
    expect(rows).toEqual([{ n: MIGRATIONS.length }]);
  });

  it('changed by a newer Holdfast is not touched', async () => {
    await using db = await open();
    await db.migrate();
    const admin = await createConnection({ socketPath: server.socketPath, user: 'root' });
    await admin.query(
      `INSERT INTO holdfast.schema_migrations (name, batch, migration_time) VALUES ('9999-future', 9, now())`,
    );
    await expect(db.migrate()).rejects.toMatchObject({
      code: 'CONFIG_INVALID',
      details: { migration: '9999-future' },
    });
    await admin.query(`DELETE FROM holdfast.schema_migrations WHERE name = '9999-future'`);
    await admin.end();
  });

  it(
    'stopped gives DATABASE_UNAVAILABLE within its deadline, and works again once started',
    { timeout: 60_000 },
    async () => {
      await using db = await open();
      await db.migrate();
      const row = repositoryRow();
      await db.repositories.insert(row);
      await server.stop();
      const startMs = performance.now();
      for (let i = 0; i < 3; i += 1) {
        await expect(db.repositories.get(row.id)).rejects.toMatchObject({
          code: 'DATABASE_UNAVAILABLE',
          retryable: true,
        });
      }
      expect(performance.now() - startMs).toBeLessThan(7000);
      await expect(db.ping(1000)).rejects.toMatchObject({ code: 'DATABASE_UNAVAILABLE' });
      await server.start();
      expect(await db.repositories.get(row.id)).toEqual(row);
    },
  );

  it(
    'that hangs gives DATABASE_UNAVAILABLE within its deadline, and works again after',
    { timeout: 60_000 },
    async () => {
      const db = await open({ queryTimeoutMs: 500 });
      await db.migrate();
      await freeze(server.server);
      try {
        const startMs = performance.now();
        await expect(db.repositories.list({ limit: 1, cursor: null })).rejects.toMatchObject({
          code: 'DATABASE_UNAVAILABLE',
        });
        await expect(db.ping(200)).rejects.toMatchObject({ code: 'DATABASE_UNAVAILABLE' });
        expect(performance.now() - startMs).toBeLessThan(4000);
      } finally {
        server.server.thaw();
      }
      await db.repositories.list({ limit: 1, cursor: null });
      await db[Symbol.asyncDispose]();
    },
  );

  it('that refuses the user or has no such database is not asked again and again', async () => {
    await expect(open({ url: 'mysql://nobody:wrong@localhost/holdfast' })).rejects.toMatchObject({
      code: 'DATABASE_UNAVAILABLE',
      retryable: false,
    });
    await expect(open({ url: 'mysql://root@localhost/absent' })).rejects.toMatchObject({
      code: 'DATABASE_UNAVAILABLE',
      retryable: false,
    });
  });
});
