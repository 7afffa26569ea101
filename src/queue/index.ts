export { redisAddress, type QueueConnection } from './connection.js';
export { startManagedRedis, type ManagedRedis, type ManagedRedisOptions } from './managed-redis.js';
export { openRunQueue } from './run-queue.js';
export { startRunWorkers, type RunWorkers, type RunWorkersOptions } from './run-workers.js';
