import { mkdir, readFile, rm } from 'node:fs/promises';
import path from 'node:path';
import mysql from 'mysql2/promise';
import { runTool } from '../../src/lib/process.js';
import { answersOnSocket, startLabServer, type LabServer } from './server.js';

export interface LabMariadb extends AsyncDisposable {
  readonly socketPath: string;
  readonly server: LabServer;
  /** A new empty utf8mb4 database; connect as `root` without a password. */
  createDatabase(name?: string): Promise<LabDatabase>;
  stop(): Promise<void>;
  kill(): Promise<void>;
  /** Starts it again on the same data. */
  start(): Promise<void>;
}

export interface LabDatabase {
  name: string;
  socketPath: string;
  user: string;
  /** `mysql://root@localhost/<name>`, to go with `socketPath`. */
  url: string;
}

const SQL_DIRECTORY = '/usr/share/mysql';
const SYSTEM_TABLES = [
  'mysql_system_tables.sql',
  'mysql_performance_tables.sql',
  'mysql_system_tables_data.sql',
];
const SMALL = ['--innodb-buffer-pool-size=32M', '--innodb-log-file-size=16M'];

/** What mariadb-install-db does, without the client tools that it wants. */
async function installSystemTables(dataDir: string): Promise<void> {
  await mkdir(dataDir, { recursive: true });
  const scripts = await Promise.all(
    SYSTEM_TABLES.map((file) => readFile(path.join(SQL_DIRECTORY, file), 'utf8')),
  );
  const input = ['CREATE DATABASE mysql;', 'USE mysql;', 'SET @auth_root_socket=NULL;', ...scripts].join(
    '\n',
  );
  const args = ['--no-defaults', '--bootstrap', '--user=root', `--datadir=${dataDir}`, ...SMALL];
  await runTool('mariadbd', args, { timeoutMs: 60_000, input });
}

/** A private MariaDB on a Unix socket in `dir` (created), without network. Start one for a test file. */
export async function startMariadb(options: { dir: string }): Promise<LabMariadb> {
  const dataDir = path.join(options.dir, 'data');
  const socketPath = path.join(options.dir, 'mariadb.sock');
  await installSystemTables(dataDir);
  const args = [
    ...['--no-defaults', '--user=root', `--datadir=${dataDir}`, `--socket=${socketPath}`],
    ...['--skip-networking', `--pid-file=${path.join(options.dir, 'mariadb.pid')}`, ...SMALL],
  ];
  const launch = async (): Promise<LabServer> => {
    await rm(socketPath, { force: true });
    return startLabServer('mariadbd', args, {
      isReady: () => answersOnSocket(socketPath, '', /MariaDB/),
      stopTimeoutMs: 10_000,
    });
  };
  let server = await launch();
  let created = 0;
  return {
    socketPath,
    get server() {
      return server;
    },
    createDatabase: async (name = `holdfast${(created += 1)}`) => {
      await createDatabase(socketPath, name);
      return { name, socketPath, user: 'root', url: `mysql://root@localhost/${name}` };
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

async function createDatabase(socketPath: string, name: string): Promise<void> {
  const connection = await mysql.createConnection({ socketPath, user: 'root', connectTimeout: 5000 });
  try {
    await connection.query('CREATE DATABASE ?? CHARACTER SET utf8mb4', [name]);
  } finally {
    await connection.end();
  }
}
