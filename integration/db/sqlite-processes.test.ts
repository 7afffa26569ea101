import { execFile } from 'node:child_process';
import { promisify } from 'node:util';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { openDatabase } from '../../src/db/index.js';
import { systemClock } from '../../src/lib/clock.js';
import { silentLogger } from '../../src/lib/log.js';
import { repositoryRow } from '../../test/contract/database-fixture.js';
import { makeLabDirectory, type LabDirectory } from '../lab/directory.js';

const MIGRATE_SCRIPT = new URL('migrate-child.ts', import.meta.url).pathname;

describe('a SQLite file used by several processes', () => {
  let directory: LabDirectory;
  beforeEach(async () => {
    directory = await makeLabDirectory();
  });
  afterEach(() => directory[Symbol.asyncDispose]());

  it('is migrated once when they start at the same time', { timeout: 60_000 }, async () => {
    const file = directory.file('holdfast.db');
    const run = promisify(execFile);
    const argv = ['--import', 'tsx', MIGRATE_SCRIPT, 'sqlite', file];
    await Promise.all([1, 2, 3].map(() => run(process.execPath, argv)));
    await using db = await openDatabase(
      { kind: 'sqlite', file },
      { logger: silentLogger(), clock: systemClock },
    );
    const row = repositoryRow();
    await db.repositories.insert(row);
    expect(await db.repositories.get(row.id)).toEqual(row);
  });
});
