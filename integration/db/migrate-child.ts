/** A second process that migrates: `migrate-child.ts sqlite FILE` or `migrate-child.ts URL SOCKET`. */
import { openDatabase } from '../../src/db/index.js';
import { systemClock } from '../../src/lib/clock.js';
import { silentLogger } from '../../src/lib/log.js';

const [first = '', second = ''] = process.argv.slice(2);
const db = await openDatabase(
  first === 'sqlite' ? { kind: 'sqlite', file: second } : { kind: 'mysql', url: first, socketPath: second },
  { logger: silentLogger(), clock: systemClock },
);
await db.migrate();
await db[Symbol.asyncDispose]();
