import { mkdtemp, rm, stat, writeFile } from 'node:fs/promises';
import os from 'node:os';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { openDatabase, type Database } from '../../src/db/index.js';
import { systemClock } from '../../src/lib/clock.js';
import { silentLogger } from '../../src/lib/log.js';
import { describeDatabase } from '../contract/database-contract.js';

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
