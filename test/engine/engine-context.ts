import path from 'node:path';
import { openDatabase } from '../../src/db/index.js';
import type { EngineContext, EngineSettings } from '../../src/engine/context.js';
import { systemClock } from '../../src/lib/clock.js';
import { AppError } from '../../src/lib/errors.js';
import { newId, type ApplianceId } from '../../src/lib/id.js';
import { silentLogger } from '../../src/lib/log.js';
import { ChildRegistry } from '../../src/lib/process.js';

export const SETTINGS: EngineSettings = {
  runs: {
    attempts: 1,
    backoffMs: 100,
    heartbeatMs: 300,
    abandonedAfterMs: 2000,
    stalledAfterMs: 1000,
    failStalledAfterMs: 1000,
    progressIntervalMs: 100,
  },
  nbd: {
    connectTimeoutMs: 1000,
    requestTimeoutMs: 1000,
    stallTimeoutMs: 1000,
    connections: 1,
    requestBytes: 65_536,
    requestsInFlight: 1,
  },
  snapshot: {
    scratchDirectory: '/nowhere',
    scratchKeepFreePercent: 20,
    scratchKeepFreeBytes: 1,
    commandTimeoutMs: 1,
    agentTimeoutMs: 1,
    freezeLimitMs: 1,
    cbwTimeoutMs: 1,
  },
  exports: {
    directory: '/nowhere/exports.d',
    pidFile: '/nowhere/exportd.pid',
    statusFile: '/nowhere/status.json',
    identitiesDirectory: null,
    overlayDirectory: '/nowhere/overlays',
    advertisedHost: null,
    ownPortsFrom: 1,
    ownPorts: 1,
    publishTimeoutMs: 1,
    defaultTtlSeconds: 0,
  },
  push: { silenceMs: 1000 },
};

/** With a database in the directory, which the caller closes; of the rest nothing answers. */
export async function openEngineContext(
  directory: string,
  change: Partial<EngineContext> = {},
): Promise<EngineContext> {
  const logger = silentLogger();
  const db = await openDatabase(
    { kind: 'sqlite', file: path.join(directory, 'holdfast.db') },
    { logger, clock: systemClock },
  );
  await db.migrate();
  const nothing = (): Promise<never> => Promise.reject(new AppError('INTERNAL', 'not used here'));
  return {
    db,
    queue: { add: nothing, clear: nothing, ping: nothing, [Symbol.asyncDispose]: () => Promise.resolve() },
    repositories: { open: nothing, look: nothing },
    clock: systemClock,
    logger,
    applianceId: newId<ApplianceId>(),
    workerId: 'this worker',
    settings: SETTINGS,
    stateDirectory: directory,
    runtimeDirectory: directory,
    socketDirectory: directory,
    registry: new ChildRegistry(directory),
    volumeProvider: { name: 'host', list: nothing },
    ...change,
  };
}
