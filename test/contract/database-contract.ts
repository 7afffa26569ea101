import { afterAll, beforeAll, describe, it } from 'vitest';
import type { Database } from '../../src/db/index.js';
import { describeExportTable } from './database-export-contract.js';
import { describeIndexTables } from './database-index-contract.js';
import { describeMachineTables } from './database-machine-contract.js';
import { describePushDiskTable } from './database-push-contract.js';
import { describeRunTables } from './database-run-contract.js';
import { describeSmallTables } from './database-small-contract.js';
import { describeVolumeTable } from './database-volume-contract.js';

/** One database for a suite, and a way to open it once more, as another process would. */
export interface DatabaseUnderTest extends AsyncDisposable {
  open(): Promise<Database>;
}

export interface DatabaseHandles {
  /** Two handles on the same database. */
  first: Database;
  second: Database;
}

/**
 * What every database engine must do. `make` answers an empty database; the suite shares it between
 * its tests, which therefore use rows of their own.
 */
export function describeDatabase(name: string, make: () => Promise<DatabaseUnderTest>): void {
  describe(`database contract: ${name}`, () => {
    let underTest: DatabaseUnderTest | undefined;
    let opened: DatabaseHandles | undefined;
    const handles = (): DatabaseHandles => {
      if (opened === undefined) throw new Error('the database is not open yet');
      return opened;
    };

    beforeAll(async () => {
      underTest = await make();
      const [first, second] = [await underTest.open(), await underTest.open()];
      opened = { first, second };
      await Promise.all([first.migrate(), second.migrate()]);
    });
    afterAll(async () => {
      await opened?.first[Symbol.asyncDispose]();
      await opened?.second[Symbol.asyncDispose]();
      await underTest?.[Symbol.asyncDispose]();
    });

    it('migrates again without a change, and answers a ping', async () => {
      await handles().second.migrate();
      await handles().first.ping(5000);
    });

    describeSmallTables(handles);
    describeMachineTables(handles);
    describeRunTables(handles);
    describeIndexTables(handles);
    describeExportTable(handles);
    describePushDiskTable(handles);
    describeVolumeTable(handles);
  });
}
