import type { ApplianceId } from '../lib/id.js';
import type { Clock } from '../lib/clock.js';
import type { Logger } from '../lib/log.js';
import type { ChildRegistry } from '../lib/process.js';
import type { Database } from '../db/database.js';
import type { SourceSettings } from '../source/source-settings.js';
import type { VolumeProvider } from '../volume/index.js';
import type { RepositoryPool } from './repository-pool.js';
import type { RunQueue } from './run-queue.js';

/** Settings of the engine, plain values from the configuration. Milliseconds and bytes. */
export interface EngineSettings {
  runs: {
    attempts: number;
    backoffMs: number;
    heartbeatMs: number;
    abandonedAfterMs: number;
    stalledAfterMs: number;
    failStalledAfterMs: number;
    progressIntervalMs: number;
  };
  nbd: {
    connectTimeoutMs: number;
    requestTimeoutMs: number;
    stallTimeoutMs: number;
    connections: number;
    requestBytes: number;
    requestsInFlight: number;
  };
  snapshot: SourceSettings['snapshot'];
  exports: {
    directory: string;
    pidFile: string;
    statusFile: string;
    identitiesDirectory: string | null;
    overlayDirectory: string;
    advertisedHost: string | null;
    ownPortsFrom: number;
    ownPorts: number;
    publishTimeoutMs: number;
    defaultTtlSeconds: number;
  };
  push: { silenceMs: number };
}

/** What every use case works with; built once in the composition root. */
export interface EngineContext {
  readonly db: Database;
  readonly queue: RunQueue;
  readonly repositories: RepositoryPool;
  readonly clock: Clock;
  readonly logger: Logger;
  readonly applianceId: ApplianceId;
  /** This process among all that execute runs. */
  readonly workerId: string;
  readonly settings: EngineSettings;
  readonly stateDirectory: string;
  /** Sockets of the whole installation. */
  readonly runtimeDirectory: string;
  /** Sockets of the private servers of this process; removed with it, or by the next start. */
  readonly socketDirectory: string;
  readonly registry: ChildRegistry;
  readonly volumeProvider: VolumeProvider;
}
