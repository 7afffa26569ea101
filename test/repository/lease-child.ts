import { existsSync } from 'node:fs';
import { systemClock } from '../../src/lib/clock.js';
import { pollUntil } from '../../src/lib/deadline.js';
import { toAppError } from '../../src/lib/errors.js';
import { newId, type ApplianceId, type RunId } from '../../src/lib/id.js';
import { DEFAULT_LEASE_TERMS, acquireLease } from '../../repository/lease.js';
import { LocalBackend } from '../../repository/local-backend.js';

/**
 * A process of its own for the lease tests: lease-child.ts ROOT VM GATE. Waits until the file GATE exists,
 * tries to take the lease, prints what came of it and ends without releasing.
 */
const [root = '', vmId = '', gate = ''] = process.argv.slice(2);
const context = {
  backend: new LocalBackend({ root }),
  clock: systemClock,
  applianceId: newId<ApplianceId>(),
  terms: DEFAULT_LEASE_TERMS,
};
await pollUntil(() => (existsSync(gate) ? true : undefined), {
  timeoutMs: 20_000,
  what: 'the gate',
  intervalMs: 1,
});
let answer: { token?: number; code?: string };
try {
  const lease = await acquireLease(context, `vm-${vmId}`, { runId: newId<RunId>(), purpose: 'race' });
  answer = { token: lease.token };
} catch (error) {
  answer = { code: toAppError(error).code };
}
process.stdout.write(`${JSON.stringify(answer)}\n`);
// A winner stays alive until everybody has tried, or the next one would rightly take over from the dead.
await pollUntil(() => (existsSync(`${gate}.done`) ? true : undefined), {
  timeoutMs: 20_000,
  what: 'the end',
});
