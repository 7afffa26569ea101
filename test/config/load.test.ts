import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises';
import os from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { describeConfig, environmentName, loadConfig, type Config } from '../../src/config/index.js';

let directory: string;
let file: string;

beforeEach(async () => {
  directory = await mkdtemp(path.join(os.tmpdir(), 'holdfast-config-'));
  file = path.join(directory, 'holdfast.yaml');
  await writeFile(file, '');
});
afterEach(() => rm(directory, { recursive: true, force: true }));

const load = (env: Record<string, string> = {}): Promise<Config> => loadConfig({ file, env });

async function writeDropIn(name: string, text: string): Promise<string> {
  await mkdir(path.join(directory, 'conf.d'), { recursive: true });
  const dropIn = path.join(directory, 'conf.d', name);
  await writeFile(dropIn, text);
  return dropIn;
}

describe('loadConfig', () => {
  it('has the documented defaults and is frozen all the way down', async () => {
    const config = await load();
    expect(config).toMatchObject({
      stateDirectory: '/var/lib/holdfast',
      runtimeDirectory: '/run/holdfast',
      roles: ['api', 'scheduler', 'worker'],
      listen: { host: '127.0.0.1', port: 8007, tls: { certificate: null, key: null } },
      log: { level: 'info' },
      database: { kind: 'sqlite', file: '/var/lib/holdfast/holdfast.db', url: null },
      redis: { kind: 'managed', url: null },
      runs: {
        workers: 2,
        attendedWorkers: 64,
        attempts: 3,
        backoffMs: 10_000,
        heartbeatMs: 5000,
        abandonedAfterMs: 30_000,
        stalledAfterMs: 60_000,
        failStalledAfterMs: 300_000,
        progressIntervalMs: 2000,
      },
      nbd: { connectTimeoutMs: 10_000, requestTimeoutMs: 30_000, stallTimeoutMs: 60_000, connections: 2 },
      exports: {
        directory: '/etc/holdfast/exports.d',
        pidFile: '/run/holdfast-exportd/exportd.pid',
        statusFile: '/run/holdfast-exportd/status.json',
        identitiesDirectory: null,
        overlayDirectory: '/var/lib/holdfast-overlays',
        advertisedHost: null,
        ownPortsFrom: 10_810,
        ownPorts: 100,
        publishTimeoutMs: 30_000,
        defaultTtlSeconds: 86_400,
      },
      push: { silenceMs: 300_000 },
      api: { maxBodyBytes: 1_048_576 },
    });
    expect(Object.isFrozen(config)).toBe(true);
    expect(Object.isFrozen(config.listen.tls)).toBe(true);
    expect(Object.isFrozen(config.roles)).toBe(true);
  });

  it('takes the file over defaults, drop-ins by name over the file, the environment over all', async () => {
    await writeFile(file, 'runs: { workers: 3, attempts: 4, backoffMs: 5, heartbeatMs: 6 }\n');
    await writeDropIn('20-b.yaml', 'runs: { attempts: 6 }\n');
    await writeDropIn('10-a.yaml', 'runs: { attempts: 5, backoffMs: 7 }\n');
    await writeDropIn('30-c.yaml.bak', 'runs: { attempts: 9 }\n');
    const { runs } = await load({ HOLDFAST_RUNS_HEARTBEAT_MS: '8', PATH: '/bin' });
    expect(runs).toMatchObject({
      workers: 3,
      attempts: 6,
      backoffMs: 7,
      heartbeatMs: 8,
      stalledAfterMs: 60_000,
    });
  });

  it('reads lists, numbers, texts and empty values from the environment', async () => {
    await writeFile(file, 'redis: { socketPath: /run/redis.sock }\n');
    const config = await load({
      HOLDFAST_ROLES: 'api, worker',
      HOLDFAST_LISTEN_PORT: '0',
      HOLDFAST_LOG_LEVEL: 'debug',
      HOLDFAST_REDIS_SOCKET_PATH: '',
      HOLDFAST_TOKEN: 'belongs to the command line',
    });
    expect(config.roles).toEqual(['api', 'worker']);
    expect(config.listen.port).toBe(0);
    expect(config.log.level).toBe('debug');
    expect(config.redis.socketPath).toBeNull();
  });

  it('puts the SQLite file below the state directory unless it is named', async () => {
    expect((await load({ HOLDFAST_STATE_DIRECTORY: '/srv/h' })).database.file).toBe('/srv/h/holdfast.db');
    expect((await load({ HOLDFAST_DATABASE_FILE: '/srv/x.db' })).database.file).toBe('/srv/x.db');
  });

  it('takes a section that is empty, and a default file that is absent', async () => {
    await writeFile(file, '# nothing set\nruns:\n');
    expect((await load()).runs.workers).toBe(2);
  });

  it('refuses a named file that is absent', async () => {
    await expect(loadConfig({ file: path.join(directory, 'no.yaml'), env: {} })).rejects.toMatchObject({
      code: 'CONFIG_INVALID',
      details: { file: path.join(directory, 'no.yaml') },
    });
  });
});

describe('what is refused, with the key and the file named', () => {
  const cases: [string, string, string][] = [
    ['an unknown key', 'runs: { worker: 3 }', 'runs.worker'],
    ['an unknown section', 'run: { workers: 3 }', 'run'],
    ['a prototype key', '__proto__: { a: 1 }', '__proto__'],
    ['a value of another type', 'runs: { workers: many }', 'runs.workers'],
    ['a number out of range', 'listen: { port: 65536 }', 'listen.port'],
    ['a fraction', 'runs: { backoffMs: 1.5 }', 'runs.backoffMs'],
    ['an unknown role', 'roles: [api, chef]', 'roles'],
    ['no role at all', 'roles: []', 'roles'],
    ['a relative path', 'stateDirectory: var', 'stateDirectory'],
    ['a section that is a list', 'runs: [1]', 'runs'],
    [
      'a request size that is no whole number of clusters',
      'nbd: { requestBytes: 100000 }',
      'nbd.requestBytes',
    ],
    ['a prefix with other characters', 'redis: { prefix: "a:b" }', 'redis.prefix'],
    ['a host with a scheme', 'exports: { advertisedHost: "nbd://backup" }', 'exports.advertisedHost'],
    ['a host with a path', 'exports: { advertisedHost: "backup/x" }', 'exports.advertisedHost'],
    [
      'a time to live of more than a year',
      'exports: { defaultTtlSeconds: 31536001 }',
      'exports.defaultTtlSeconds',
    ],
    ['a silence below a second', 'push: { silenceMs: 999 }', 'push.silenceMs'],
    ['a URL of another scheme', 'database: { url: "http://db/x" }', 'database.url'],
  ];
  it.each(cases)('%s', async (_what, text, key) => {
    const dropIn = await writeDropIn('10.yaml', text);
    await expect(load()).rejects.toMatchObject({ code: 'CONFIG_INVALID', details: { key, file: dropIn } });
  });

  it.each([
    ['text that is no YAML', 'runs: { workers'],
    ['a key given twice', 'api: {}\napi: {}'],
    ['aliases', 'roles: &a [api]\nlog: *a'],
    ['a document that is no mapping', '- api'],
  ])('%s', async (_what, text) => {
    await writeFile(file, text);
    await expect(load()).rejects.toMatchObject({ code: 'CONFIG_INVALID', details: { file } });
  });

  it('an unknown variable, or a number with other characters', async () => {
    await expect(load({ HOLDFAST_RUNS_WORKER: '1' })).rejects.toMatchObject({
      code: 'CONFIG_INVALID',
      details: { key: 'HOLDFAST_RUNS_WORKER' },
    });
    await expect(load({ HOLDFAST_RUNS_WORKERS: '1e1' })).rejects.toMatchObject({
      details: { key: 'runs.workers', file: 'HOLDFAST_RUNS_WORKERS' },
    });
  });

  it('a host other than loopback without TLS, and half a TLS setting', async () => {
    for (const host of ['0.0.0.0', '::', '192.0.2.7', 'backup.example', '127.evil.example']) {
      await expect(load({ HOLDFAST_LISTEN_HOST: host })).rejects.toMatchObject({
        code: 'CONFIG_INVALID',
        details: { key: 'listen.tls' },
      });
    }
    await expect(load({ HOLDFAST_LISTEN_TLS_KEY: '/k.pem' })).rejects.toMatchObject({
      details: { key: 'listen.tls.certificate' },
    });
    const tls = { HOLDFAST_LISTEN_TLS_KEY: '/k.pem', HOLDFAST_LISTEN_TLS_CERTIFICATE: '/c.pem' };
    expect((await load({ ...tls, HOLDFAST_LISTEN_HOST: '0.0.0.0' })).listen.host).toBe('0.0.0.0');
    for (const host of ['::1', '127.0.0.2', 'localhost']) {
      expect((await load({ HOLDFAST_LISTEN_HOST: host })).listen.host).toBe(host);
    }
  });

  it('a runtime directory too long for the sockets in it, counted in bytes', async () => {
    expect((await load({ HOLDFAST_RUNTIME_DIRECTORY: `/${'a'.repeat(46)}` })).runtimeDirectory).toHaveLength(
      47,
    );
    for (const runtimeDirectory of [`/${'a'.repeat(47)}`, `/${'ä'.repeat(24)}`]) {
      await expect(load({ HOLDFAST_RUNTIME_DIRECTORY: runtimeDirectory })).rejects.toMatchObject({
        code: 'CONFIG_INVALID',
        details: { key: 'runtimeDirectory', maxBytes: 47 },
      });
    }
    await expect(load({ HOLDFAST_REDIS_SOCKET_PATH: `/${'a'.repeat(107)}` })).rejects.toMatchObject({
      details: { key: 'redis.socketPath' },
    });
  });

  it('more ports than there are above the first one', async () => {
    const from = (first: number, count: number) =>
      load({
        HOLDFAST_EXPORTS_OWN_PORTS_FROM: String(first),
        HOLDFAST_EXPORTS_OWN_PORTS: String(count),
      });
    expect((await from(65_534, 2)).exports).toMatchObject({ ownPortsFrom: 65_534, ownPorts: 2 });
    await expect(from(65_534, 3)).rejects.toMatchObject({
      code: 'CONFIG_INVALID',
      details: { key: 'exports.ownPorts' },
    });
  });

  it('servers that are not named, and times that cannot work together', async () => {
    await expect(load({ HOLDFAST_DATABASE_KIND: 'mysql' })).rejects.toMatchObject({
      details: { key: 'database.url' },
    });
    await expect(load({ HOLDFAST_REDIS_KIND: 'given' })).rejects.toMatchObject({
      details: { key: 'redis.url' },
    });
    await expect(load({ HOLDFAST_RUNS_HEARTBEAT_MS: '20000' })).rejects.toMatchObject({
      details: { key: 'runs.abandonedAfterMs' },
    });
  });
});

describe('secrets', () => {
  const SECRET = 'pa55-w0rd';

  it('are read from a file, and masked in what is shown', async () => {
    const urlFile = path.join(directory, 'database-url');
    await writeFile(urlFile, `mysql://holdfast:${SECRET}@db.example:3306/holdfast?token=${SECRET}\n`);
    const config = await load({
      HOLDFAST_DATABASE_KIND: 'mysql',
      HOLDFAST_DATABASE_URL_FILE: urlFile,
      HOLDFAST_REDIS_URL: `redis://:${SECRET}@redis.example/0`,
    });
    expect(config.database.url).toContain(`:${SECRET}@db.example`);
    const rows = describeConfig(config);
    expect(JSON.stringify(rows)).not.toContain(SECRET);
    expect(rows.find((row) => row.name === 'database.url')?.value).toBe(
      'mysql://holdfast:***@db.example:3306/holdfast?token=***',
    );
  });

  it('are not repeated by errors', async () => {
    const urlFile = path.join(directory, 'redis-url');
    await writeFile(urlFile, `postgres://user:${SECRET}@db/x`);
    const error = await load({ HOLDFAST_REDIS_URL_FILE: urlFile }).catch((e: unknown) => e);
    expect(error).toMatchObject({ code: 'CONFIG_INVALID', details: { key: 'redis.urlFile', file: urlFile } });
    expect(`${String(error)} ${JSON.stringify(error)}`).not.toContain(SECRET);
    const direct = await load({ HOLDFAST_REDIS_URL: `x://${SECRET}` }).catch((e: unknown) => e);
    expect(`${String(direct)} ${JSON.stringify(direct)}`).not.toContain(SECRET);
  });

  it('given twice, or in a file that is absent, are refused', async () => {
    const urlFile = path.join(directory, 'none');
    await expect(load({ HOLDFAST_REDIS_URL_FILE: urlFile })).rejects.toMatchObject({
      code: 'CONFIG_INVALID',
      details: { key: 'redis.urlFile' },
    });
    await expect(
      load({ HOLDFAST_REDIS_URL_FILE: urlFile, HOLDFAST_REDIS_URL: 'redis://h/0' }),
    ).rejects.toMatchObject({ code: 'CONFIG_INVALID' });
  });
});

describe('describeConfig', () => {
  it('names value, default, unit, comment, variable and source of every setting', async () => {
    await writeFile(file, 'runs: { workers: 3 }\n');
    const rows = describeConfig(await load({ HOLDFAST_RUNS_ATTEMPTS: '1' }));
    expect(rows.find((row) => row.name === 'runs.workers')).toEqual({
      name: 'runs.workers',
      variable: 'HOLDFAST_RUNS_WORKERS',
      value: '3',
      default: '2',
      unit: 'runs',
      comment: 'Runs this process executes at the same time.',
      source: file,
    });
    expect(rows.find((row) => row.name === 'runs.attempts')?.source).toBe('HOLDFAST_RUNS_ATTEMPTS');
    expect(rows.find((row) => row.name === 'roles')).toMatchObject({
      value: 'api, scheduler, worker',
      source: 'default',
    });
    expect(rows.every((row) => row.comment.endsWith('.'))).toBe(true);
  });

  it('gives every setting a variable of its own', async () => {
    const variables = describeConfig(await load()).map((row) => row.variable);
    expect(new Set(variables).size).toBe(variables.length);
    expect(environmentName('nbd.requestsInFlight')).toBe('HOLDFAST_NBD_REQUESTS_IN_FLIGHT');
  });
});
