import { mkdir, rm, symlink } from 'node:fs/promises';
import path from 'node:path';
import { answersOnSocket, pathExists, startLabServer, type LabServer } from './server.js';

export interface LabRedis extends AsyncDisposable {
  readonly socketPath: string;
  /** The server now running; another one after `restart()`. */
  readonly server: LabServer;
  /** Stops it; `start()` brings it back on the same data. */
  stop(): Promise<void>;
  kill(): Promise<void>;
  start(): Promise<void>;
}

const SERVER_BINARY = '/usr/bin/redis-server';
/** Debian builds one binary that acts by its name; redis-tools has it under this one, without a service. */
const MULTI_CALL_BINARY = '/usr/bin/redis-check-rdb';

async function findServerBinary(directory: string): Promise<string> {
  if (await pathExists(SERVER_BINARY)) return SERVER_BINARY;
  const link = path.join(directory, 'redis-server');
  if (!(await pathExists(link))) await symlink(MULTI_CALL_BINARY, link);
  return link;
}

/** A private Redis with an append-only file and no eviction, on a Unix socket in `dir` (created). */
export async function startRedis(options: { dir: string }): Promise<LabRedis> {
  const { dir } = options;
  await mkdir(dir, { recursive: true });
  const socketPath = path.join(dir, 'redis.sock');
  const binary = await findServerBinary(dir);
  const args = [
    ...['--port', '0', '--unixsocket', socketPath, '--unixsocketperm', '700', '--dir', dir],
    ...['--appendonly', 'yes', '--appendfsync', 'everysec', '--save', '', '--maxmemory-policy', 'noeviction'],
    ...['--daemonize', 'no', '--logfile', path.join(dir, 'redis.log')],
  ];
  const launch = async (): Promise<LabServer> => {
    await rm(socketPath, { force: true });
    return startLabServer(binary, args, {
      isReady: () => answersOnSocket(socketPath, 'PING\r\n', /^\+PONG/),
    });
  };
  let server = await launch();
  return {
    socketPath,
    get server() {
      return server;
    },
    stop: () => server.stop(),
    kill: () => server.kill(),
    start: async () => {
      await server.stop();
      server = await launch();
    },
    [Symbol.asyncDispose]: () => server.stop(),
  };
}
