/**
 * A worker process: `worker-child.ts SOCKET`. Prints `executing RUN`, then keeps the run until it is
 * aborted, as a copy that is under way.
 */
import { once } from 'node:events';
import { silentLogger } from '../../src/lib/log.js';
import { startRunWorkers } from '../../src/queue/index.js';

const [socketPath = ''] = process.argv.slice(2);
startRunWorkers({
  connection: { address: { socketPath } },
  concurrency: { work: 1, attended: 1 },
  logger: silentLogger(),
  jobLockMs: 1000,
  stalledCheckMs: 500,
  execute: async (runId, signal) => {
    process.stdout.write(`executing ${runId}\n`);
    if (!signal.aborted) await once(signal, 'abort');
    return 'done';
  },
});
