import { mkdir, readFile } from 'node:fs/promises';
import path from 'node:path';
import { startApi, type ApiServer } from './api/index.js';
import type { Config } from './config/index.js';
import { openDatabase } from './db/index.js';
import type { EngineContext, EngineSettings } from './engine/context.js';
import { createEngine } from './engine/create-engine.js';
import type { Engine } from './engine/engine.js';
import { createRunExecution } from './engine/execute-run.js';
import { startExportReaper } from './engine/export-reaper.js';
import { createRecovery, recoveryIntervalMs, requeueWaiting, type Recovery } from './engine/recovery.js';
import { SourceLeftovers } from './engine/source-leftovers.js';
import { createRepositoryPool } from './engine/repository-pool.js';
import { startVolumeWatch } from './engine/volume-orphans.js';
import { CleanupStack } from './lib/cleanup.js';
import { systemClock } from './lib/clock.js';
import { errnoOf, isErrorCode } from './lib/errors.js';
import { newId, type ApplianceId } from './lib/id.js';
import type { Logger } from './lib/log.js';
import {
  openRunQueue,
  redisAddress,
  startManagedRedis,
  startRunWorkers,
  type QueueConnection,
} from './queue/index.js';
import { hostProvider } from './volume/index.js';
import { openStateDirectory, writePrivate, type StateDirectory } from './state-directory.js';

/** How long running runs may take to clean up when the daemon stops. */
const STOP_TIMEOUT_MS = 30_000;

/** The running daemon. Disposal ends what was built, last first. */
export interface App extends AsyncDisposable {
  readonly api: ApiServer | null;
  readonly adminTokenFile: string;
}

/** Builds every long-lived object in order. What was built before a failure is ended again. */
export async function startApp(config: Config, logger: Logger): Promise<App> {
  await using stack = new CleanupStack();
  await mkdir(config.stateDirectory, { recursive: true, mode: 0o700 });
  await mkdir(config.runtimeDirectory, { recursive: true, mode: 0o700 });
  const state = stack.use(await openStateDirectory(config.stateDirectory, config.runtimeDirectory));
  const db = stack.use(await openDatabase(config.database, { logger, clock: systemClock }));
  await db.migrate();
  const redis = await connectRedis(config, { logger, state, stack });
  const queue = stack.use(await openRunQueue(redis, logger));
  // Nobody else uses a managed Redis: without the locks of a killed daemon its runs start again at once.
  if (config.redis.kind === 'managed') await queue.clear();
  // Everybody on one database is one appliance, and owns the same repositories.
  const applianceId = (await db.settings.getOrCreate('appliance-id', newId<ApplianceId>())) as ApplianceId;
  const context: EngineContext = {
    db,
    queue,
    repositories: createRepositoryPool(db, {
      applianceId,
      leaseTerms: { renewMs: config.repository.leaseRenewMs, expiryMs: config.repository.leaseExpiresMs },
    }),
    clock: systemClock,
    logger: logger.child({ component: 'engine' }),
    applianceId,
    workerId: state.workerId,
    settings: engineSettings(config),
    stateDirectory: config.stateDirectory,
    runtimeDirectory: config.runtimeDirectory,
    socketDirectory: state.socketDirectory,
    registry: state.registry,
    volumeProvider: hostProvider,
  };
  const leftovers = stack.use(new SourceLeftovers(context));
  const execution = createRunExecution(context, leftovers);
  const engine = createEngine(context, execution.active);
  await ensureAdminToken(engine, state.adminTokenFile);
  const recovery = createRecovery(context, execution.active, leftovers);
  await recovery.recoverDead(state.deadWorkerIds);
  await state.forgetDeadWorkers();
  if (config.roles.includes('scheduler')) {
    for (const started of startScheduler(context, { recovery, state })) stack.use(started);
  }
  if (config.roles.includes('worker')) {
    const workers = startRunWorkers({
      connection: redis,
      concurrency: { work: config.runs.workers, attended: config.runs.attendedWorkers },
      execute: execution.execute,
      logger,
    });
    stack.defer(() => workers.stop(STOP_TIMEOUT_MS));
  }
  const api = config.roles.includes('api')
    ? stack.use(
        await startApi({
          engine,
          logger,
          config: { listen: config.listen, maxBodyBytes: config.api.maxBodyBytes },
        }),
      )
    : null;
  const steps = stack.move();
  return { api, adminTokenFile: state.adminTokenFile, [Symbol.asyncDispose]: () => steps.run() };
}

function engineSettings(config: Config): EngineSettings {
  const { runs, nbd, snapshot, exports, push } = config;
  return { runs, nbd, snapshot, exports, push };
}

async function connectRedis(
  config: Config,
  parts: { logger: Logger; state: StateDirectory; stack: CleanupStack },
): Promise<QueueConnection> {
  const { redis } = config;
  const managed =
    redis.kind === 'given'
      ? null
      : parts.stack.use(
          await startManagedRedis({
            directory: path.join(config.stateDirectory, 'redis'),
            runtimeDirectory: config.runtimeDirectory,
            registry: parts.state.registry,
            logger: parts.logger,
          }),
        );
  return {
    address: redisAddress(redis, managed?.socketPath ?? ''),
    prefix: redis.prefix,
    commandTimeoutMs: redis.commandTimeoutMs,
  };
}

/** The first token, for the administrator of this host: its file is the only place it is kept in. */
async function ensureAdminToken(engine: Engine, file: string): Promise<void> {
  try {
    if ((await engine.authenticate((await readFile(file, 'utf8')).trim())) !== null) return;
  } catch (error) {
    if (errnoOf(error) !== 'ENOENT') throw error;
  }
  const { secret } = await engine.createToken('admin', null);
  await writePrivate(file, `${secret}\n`);
}

/** Everything that is looked after at intervals. */
function startScheduler(
  context: EngineContext,
  { recovery, state }: { recovery: Recovery; state: StateDirectory },
): AsyncDisposable[] {
  return [
    startReconciling(context, recovery),
    startExportReaper(context, state.deadWorkerIds),
    startVolumeWatch(context),
  ];
}

/** Looks for abandoned runs, and for queued ones without a job. One look at a time; a look that fails is logged and tried again at the next interval. */
function startReconciling(context: EngineContext, recovery: Recovery): AsyncDisposable {
  let looking: Promise<void> | undefined;
  const look = async (): Promise<void> => {
    try {
      await recovery.recoverAbandoned();
      await requeueWaiting(context);
    } catch (error) {
      const isOutage = isErrorCode(error, 'DATABASE_UNAVAILABLE', 'QUEUE_UNAVAILABLE');
      context.logger[isOutage ? 'warn' : 'error']({ err: error }, 'looking for abandoned runs failed');
    }
  };
  const start = (): void => {
    looking ??= look().finally(() => (looking = undefined));
  };
  const timer = setInterval(start, recoveryIntervalMs(context.settings));
  start();
  return {
    async [Symbol.asyncDispose]() {
      clearInterval(timer);
      await looking;
    },
  };
}
