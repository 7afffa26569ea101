import { Redis, type RedisOptions } from 'ioredis';
import { AppError } from '../lib/errors.js';
import type { Logger } from '../lib/log.js';

/** Where Redis is and how the queue uses it. */
export interface QueueConnection {
  /** A Unix socket, or a redis:// or rediss:// URL. */
  address: { socketPath: string } | { url: string };
  /** Begins every key. Appliances that share a Redis need different ones. Default `holdfast`. */
  prefix?: string;
  /** Limit for a command. Default 5 s. */
  commandTimeoutMs?: number;
}

export const DEFAULT_PREFIX = 'holdfast';
export const DEFAULT_COMMAND_TIMEOUT_MS = 5000;
const RECONNECT_MAX_MS = 1000;

/** Without what picks an overload of ioredis' constructor. */
type Options = Omit<RedisOptions, 'replyMapping'>;

/**
 * The address the settings name, or that of the managed server. CONFIG_INVALID when a given server
 * has no address.
 */
export function redisAddress(
  redis: { kind: 'managed' | 'given'; url: string | null; socketPath: string | null },
  managedSocketPath: string,
): QueueConnection['address'] {
  if (redis.kind === 'managed') return { socketPath: managedSocketPath };
  if (redis.socketPath !== null) return { socketPath: redis.socketPath };
  if (redis.url !== null) return { url: redis.url };
  throw new AppError('CONFIG_INVALID', 'redis.kind given needs redis.url or redis.socketPath', {
    details: { key: 'redis.url' },
  });
}

/** For commands somebody waits for. They wait for a connection too, and fail after the time of a command. */
export function connectForCommands(connection: QueueConnection, logger: Logger): Redis {
  return connect(connection, logger, {
    maxRetriesPerRequest: null,
    commandTimeout: connection.commandTimeoutMs ?? DEFAULT_COMMAND_TIMEOUT_MS,
  });
}

export interface WorkerConnection {
  redis: Redis;
  /** Cuts this connection and those made from it at once; what waits on them is given up. */
  disconnect(): void;
}

/**
 * For workers, whose commands block until there is a job, and outlast an outage of Redis. BullMQ makes
 * its blocking connection from this one and can only close it while Redis answers: it is remembered here.
 */
export function connectForWorkers(connection: QueueConnection, logger: Logger): WorkerConnection {
  const redis = connect(connection, logger, { maxRetriesPerRequest: null });
  const all = [redis];
  const duplicate = redis.duplicate.bind(redis);
  redis.duplicate = (override) => {
    const copy = duplicate(override);
    all.push(copy);
    return copy;
  };
  return {
    redis,
    disconnect: () => {
      for (const one of all) one.disconnect();
    },
  };
}

function connect({ address, commandTimeoutMs }: QueueConnection, logger: Logger, special: Options): Redis {
  const options: Options = {
    connectTimeout: commandTimeoutMs ?? DEFAULT_COMMAND_TIMEOUT_MS,
    retryStrategy: (times) => Math.min(50 * 2 ** Math.min(times, 10), RECONNECT_MAX_MS),
    // A managed server that has just started may still be loading its data: ioredis waits for it.
    enableReadyCheck: true,
    ...special,
  };
  const redis =
    'url' in address ? new Redis(address.url, options) : new Redis({ ...options, path: address.socketPath });
  logOutages(redis, logger);
  return redis;
}

/** One line when Redis goes and one when it is back, not one for each try to connect. */
function logOutages(redis: Redis, logger: Logger): void {
  let isAway = false;
  redis.on('error', (error: Error) => {
    if (!isAway) logger.warn({ err: error }, 'Redis cannot be reached');
    isAway = true;
  });
  redis.on('ready', () => {
    if (isAway) logger.info('Redis is back');
    isAway = false;
  });
}
