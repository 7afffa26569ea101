import { spawn } from 'node:child_process';
import { readFile, stat, writeFile } from 'node:fs/promises';
import { Redis } from 'ioredis';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { pollUntil } from '../../src/lib/deadline.js';
import { silentLogger } from '../../src/lib/log.js';
import { ChildRegistry, isSameProcess, processStartTime } from '../../src/lib/process.js';
import { startManagedRedis, type ManagedRedis } from '../../src/queue/index.js';
import { findRedisServer } from '../../src/queue/redis-binary.js';
import { probeRedis } from '../../src/queue/redis-probe.js';
import { makeLabDirectory, type LabDirectory } from '../lab/directory.js';

let directory: LabDirectory;
let registry: ChildRegistry;
let server: ManagedRedis | undefined;
let leftovers: { pid: number; startTime: string }[];

beforeEach(async () => {
  leftovers = [];
  directory = await makeLabDirectory({ wantBytes: 0 });
  registry = new ChildRegistry(directory.file('children'));
});
afterEach(async () => {
  await server?.[Symbol.asyncDispose]();
  server = undefined;
  for (const leftover of leftovers) {
    if (await isSameProcess(leftover)) process.kill(leftover.pid, 'SIGKILL');
  }
  await directory[Symbol.asyncDispose]();
});

const start = async (): Promise<ManagedRedis> => {
  server = await startManagedRedis({
    directory: directory.file('state'),
    runtimeDirectory: directory.file('run'),
    registry,
    logger: silentLogger(),
  });
  return server;
};

async function withClient<T>(socketPath: string, work: (client: Redis) => Promise<T>): Promise<T> {
  const client = new Redis(socketPath, { maxRetriesPerRequest: 1 });
  try {
    return await work(client);
  } finally {
    client.disconnect();
  }
}

const awaitRestart = (redis: ManagedRedis, oldPid: number): Promise<true> =>
  pollUntil(
    async () =>
      redis.pid !== oldPid && (await probeRedis(redis.socketPath)) === 'ready' ? (true as const) : undefined,
    { timeoutMs: 10_000, what: 'the restart of Redis' },
  );

describe('the managed Redis', () => {
  it('listens on a private socket only, keeps an append-only file and never evicts', async () => {
    const redis = await start();
    expect((await stat(redis.socketPath)).mode & 0o777).toBe(0o700);
    const settings = await withClient(redis.socketPath, (client) =>
      client.config('GET', 'port', 'appendonly', 'appendfsync', 'maxmemory-policy', 'dir'),
    );
    expect(settings).toEqual(
      expect.arrayContaining(['port', '0', 'yes', 'everysec', 'noeviction', directory.file('state')]),
    );
  });

  it('keeps its data when it is stopped and started', async () => {
    await withClient((await start()).socketPath, (client) => client.set('key', 'value'));
    await server?.[Symbol.asyncDispose]();
    expect(await withClient((await start()).socketPath, (client) => client.get('key'))).toBe('value');
  });

  it('is started again on its data when it is killed, more than once', async () => {
    const redis = await start();
    // Written to the file before the answer; only a power cut can lose the last second.
    await withClient(redis.socketPath, (client) => client.set('key', 'value'));
    for (let i = 0; i < 2; i += 1) {
      const { pid } = redis;
      process.kill(pid, 'SIGKILL');
      await awaitRestart(redis, pid);
    }
    expect(await withClient(redis.socketPath, (client) => client.get('key'))).toBe('value');
  });

  it('leaves no process, record or listener behind when disposed, also right after a kill', async () => {
    const redis = await start();
    const recorded = { pid: redis.pid, startTime: (await processStartTime(redis.pid)) ?? '' };
    process.kill(redis.pid, 'SIGKILL');
    await redis[Symbol.asyncDispose]();
    await redis[Symbol.asyncDispose]();
    expect(await isSameProcess(recorded)).toBe(false);
    expect(await probeRedis(redis.socketPath)).toBe('absent');
    expect(await registry.reap()).toEqual([]);
  });

  it('takes over the data after a crash left its server running', async () => {
    const leftover = await startLeftover();
    await withClient(directory.file('run', 'redis.sock'), (client) => client.set('key', 'old daemon'));
    await registry.record({ ...leftover, tool: 'redis-server', owner: 'redis' });
    expect(await registry.reap()).toHaveLength(1);
    const redis = await start();
    expect(redis.pid).not.toBe(leftover.pid);
    expect(await withClient(redis.socketPath, (client) => client.get('key'))).toBe('old daemon');
  });

  it('refuses to start beside a server that is not in the record, and leaves that one alone', async () => {
    const leftover = await startLeftover();
    await expect(start()).rejects.toMatchObject({ code: 'QUEUE_UNAVAILABLE', retryable: false });
    expect(await isSameProcess(leftover)).toBe(true);
  });

  it('says why it does not start', async () => {
    await start();
    await server?.[Symbol.asyncDispose]();
    const appendOnly = directory.file('state', 'appendonlydir', 'appendonly.aof.manifest');
    await writeFile(appendOnly, 'no manifest\n');
    await expect(start()).rejects.toMatchObject({
      code: 'TOOL_FAILED',
      details: { logTail: expect.stringContaining('manifest') as string },
    });
    expect(await readFile(directory.file('state', 'redis.log'), 'utf8')).toContain('manifest');
  });

  it('is TOOL_MISSING where no binary is', async () => {
    await expect(findRedisServer([directory.path], directory.file('bin'))).rejects.toMatchObject({
      code: 'TOOL_MISSING',
    });
  });

  /** A server as a crashed daemon leaves it: on our data and socket, and nobody's child. */
  async function startLeftover(): Promise<{ pid: number; startTime: string }> {
    await start();
    await server?.[Symbol.asyncDispose]();
    const socketPath = directory.file('run', 'redis.sock');
    const binary = await findRedisServer(['/usr/bin'], directory.file('state', 'bin'));
    const argv = ['--port', '0', '--unixsocket', socketPath, '--dir', directory.file('state')];
    const child = spawn(binary, [...argv, '--appendonly', 'yes', '--save', ''], { stdio: 'ignore' });
    const pid = child.pid ?? -1;
    const leftover = { pid, startTime: (await processStartTime(pid)) ?? '' };
    leftovers.push(leftover);
    await pollUntil(async () => ((await probeRedis(socketPath)) === 'ready' ? true : undefined), {
      timeoutMs: 5000,
      what: 'the leftover server',
    });
    return leftover;
  }
});
