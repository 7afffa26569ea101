import { mkdtemp, rm, stat, writeFile } from 'node:fs/promises';
import os from 'node:os';
import path from 'node:path';
import { knex, type Knex } from 'knex';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { openDatabase, type Database } from '../../src/db/index.js';
import { uniqueKey } from '../../src/db/columns.js';
import { MIGRATIONS } from '../../src/db/migrations/index.js';
import { systemClock } from '../../src/lib/clock.js';
import { silentLogger } from '../../src/lib/log.js';
import { describeDatabase } from '../contract/database-contract.js';
import { pointEntry, repositoryRow, runRow, vmRow } from '../contract/database-fixture.js';

const context = { logger: silentLogger(), clock: systemClock };

async function openFile(file: string): Promise<Database> {
  return openDatabase({ kind: 'sqlite', file }, context);
}

describeDatabase('SQLite', async () => {
  const directory = await mkdtemp(path.join(os.tmpdir(), 'holdfast-sqlite-'));
  return {
    open: () => openFile(path.join(directory, 'holdfast.db')),
    [Symbol.asyncDispose]: () => rm(directory, { recursive: true, force: true }),
  };
});

describe('a SQLite file', () => {
  let directory: string;
  beforeAll(async () => {
    directory = await mkdtemp(path.join(os.tmpdir(), 'holdfast-sqlite-'));
  });
  afterAll(() => rm(directory, { recursive: true, force: true }));

  it('is made with its directory, for its owner only', async () => {
    const file = path.join(directory, 'new', 'holdfast.db');
    const db = await openFile(file);
    await db[Symbol.asyncDispose]();
    expect((await stat(file)).mode & 0o777).toBe(0o600);
    expect((await stat(path.dirname(file))).mode & 0o777).toBe(0o700);
  });

  it('that is no database is DATABASE_UNAVAILABLE', async () => {
    const file = path.join(directory, 'text.db');
    await writeFile(file, 'not a database, but long enough to be looked at as one'.repeat(100));
    await expect(openFile(file)).rejects.toMatchObject({ code: 'DATABASE_UNAVAILABLE' });
  });

  it('that cannot be made is DATABASE_UNAVAILABLE, and a missing name CONFIG_INVALID', async () => {
    await writeFile(path.join(directory, 'file'), '');
    await expect(openFile(path.join(directory, 'file', 'x.db'))).rejects.toMatchObject({
      code: 'DATABASE_UNAVAILABLE',
    });
    await expect(openDatabase({ kind: 'sqlite' }, context)).rejects.toMatchObject({ code: 'CONFIG_INVALID' });
  });
});

/** A database as the release before made it, with these rows in its tables. */
async function makeOldDatabase(
  file: string,
  options: { migrations: number; rows: Record<string, Record<string, unknown>[]> },
): Promise<void> {
  const db = knex({ client: 'better-sqlite3', connection: { filename: file }, useNullAsDefault: true });
  try {
    await db.migrate.latest({
      tableName: 'schema_migrations',
      migrationSource: {
        getMigrations: () => Promise.resolve(MIGRATIONS.slice(0, options.migrations)),
        getMigrationName: ({ name }) => name,
        getMigration: ({ up }) =>
          Promise.resolve({ up: (on) => up(on, 'sqlite'), down: () => Promise.resolve() }),
      } satisfies Knex.MigrationSource<(typeof MIGRATIONS)[number]>,
    });
    for (const [table, rows] of Object.entries(options.rows)) await db(table).insert(rows);
  } finally {
    await db.destroy();
  }
}

describe('the migration 0013, of what discovery finds', () => {
  it('keeps the machines, disks, points and runs that are there, and lets them be discovered', async () => {
    const directory = await mkdtemp(path.join(os.tmpdir(), 'holdfast-sqlite-'));
    try {
      const file = path.join(directory, 'holdfast.db');
      const names = [`vm ä`, 'lost'];
      const [vm, lost] = names.map((name) => vmRow({ name }, 2));
      for (const disk of lost!.disks) disk.source = null;
      const old = [vm!, lost!];
      await makeOldDatabase(file, {
        migrations: 12,
        rows: {
          vms: old.map(({ id, name, createdAt }) => ({
            id,
            name,
            name_key: uniqueKey(name),
            created_at: createdAt,
          })),
          vm_disks: old
            .flatMap(({ disks }) => disks)
            .map((disk) => ({
              ...{ id: disk.id, vm_id: disk.vmId, disk_number: disk.number, name: disk.name },
              ...{ name_key: uniqueKey(disk.name), size_bytes: disk.sizeBytes, lineage: disk.lineage },
              source: JSON.stringify(disk.source),
            })),
        },
      });
      await using db = await openFile(file);
      await db.migrate();
      await db.migrate();
      for (const row of old) expect(await db.vms.get(row.id)).toEqual(row);
      expect(await db.vms.findByName('lost')).toEqual(lost);
      expect(await db.vms.listBySourceKey('')).toEqual([]);
      expect(await db.vms.findAdoptable('lineage 0')).toEqual(lost);
      const found = { ...vm!, sourceKey: 'libvirt:x', source: { kind: 'libvirt' }, facts: { state: 'off' } };
      found.disks[0]!.facts = { target: 'vda' };
      await db.vms.follow(found);
      expect(await db.vms.findBySourceKey('libvirt:x')).toEqual(found);
      await expect(db.vms.follow({ ...lost!, sourceKey: 'libvirt:x' })).rejects.toMatchObject({
        code: 'CONFLICT',
      });
      const repository = repositoryRow();
      await db.repositories.insert(repository);
      const { point, layers } = pointEntry(found, repository);
      await db.points.insert(point, layers);
      await db.runs.insert(runRow({ vmId: vm!.id, repositoryId: repository.id }), { turn: 'refuse' });
      expect(await db.points.get(point.id)).toEqual(point);
    } finally {
      await rm(directory, { recursive: true, force: true });
    }
  });
});
