import { readFile } from 'node:fs/promises';
import { isIP } from 'node:net';
import path from 'node:path';
import { AppError } from '../lib/errors.js';
import { configInvalid, listDropIns, readEnvironmentLayer, readFileLayer, type Layer } from './layers.js';
import { configSchema, environmentName, SETTINGS, type Config } from './schema.js';

export const DEFAULT_CONFIG_FILE = '/etc/holdfast/holdfast.yaml';

/** sun_path of a Unix socket, without the closing NUL (unix(7)). */
const MAX_SOCKET_PATH_BYTES = 107;
/** Room for the names below the runtime directory: a directory and a socket named by a ULID each. */
const SOCKET_NAME_BYTES = 60;

const MAX_PORT = 65_535;

/** Where each setting of a loaded configuration came from: a file, a variable, or absent for the default. */
const sources = new WeakMap<Config, ReadonlyMap<string, string>>();

export interface LoadOptions {
  /** A file that must exist. Default: /etc/holdfast/holdfast.yaml, which may be absent. */
  file?: string | undefined;
  env: Readonly<Record<string, string | undefined>>;
}

/**
 * Reads the settings: defaults < file < conf.d/*.yaml beside it, sorted by name < HOLDFAST_…
 * variables. Rejects with CONFIG_INVALID (details.key, details.file) on the first thing that is wrong.
 */
export async function loadConfig(options: LoadOptions): Promise<Config> {
  const merged = mergeLayers(await readLayers(options));
  const parsed = parseSettings(merged);
  const secrets = await readSecretFiles(parsed);
  const config: Config = {
    ...parsed,
    database: {
      ...parsed.database,
      url: secrets.databaseUrl,
      file: parsed.database.file ?? path.join(parsed.stateDirectory, 'holdfast.db'),
    },
    redis: { ...parsed.redis, url: secrets.redisUrl },
  };
  checkTogether(config);
  sources.set(config, new Map([...merged].map(([name, { source }]) => [name, source])));
  return deepFreeze(config);
}

/** Where a setting came from: a file, an environment variable, or `default`. */
export function sourceOf(config: Config, name: string): string {
  const known = sources.get(config);
  if (known === undefined) throw new TypeError('the configuration was not made by loadConfig');
  return known.get(name) ?? 'default';
}

async function readLayers(options: LoadOptions): Promise<Layer[]> {
  const file = path.resolve(options.file ?? DEFAULT_CONFIG_FILE);
  const layers: Layer[] = [];
  const main = await readFileLayer(file);
  if (main !== undefined) layers.push(main);
  else if (options.file !== undefined) throw configInvalid(`${file} does not exist`, { file });
  for (const dropIn of await listDropIns(file)) {
    const layer = await readFileLayer(dropIn);
    if (layer !== undefined) layers.push(layer);
  }
  layers.push(readEnvironmentLayer(options.env));
  return layers;
}

type Merged = Map<string, { value: unknown; source: string }>;

function mergeLayers(layers: Layer[]): Merged {
  const merged: Merged = new Map();
  for (const { source, values } of layers) {
    for (const [name, value] of values) {
      const where = source === 'environment' ? environmentName(name) : source;
      merged.set(name, { value, source: where });
    }
  }
  return merged;
}

function parseSettings(merged: Merged): ReturnType<typeof configSchema.parse> {
  const result = configSchema.safeParse(nest(merged));
  if (result.success) return result.data;
  const issue = result.error.issues[0];
  const key = settingOfIssue(issue?.path ?? []);
  const source = merged.get(key)?.source ?? 'default';
  throw configInvalid(`${key} in ${source} is not valid: ${issue?.message ?? 'unknown'}`, {
    key,
    file: source,
  });
}

/** An issue inside a list is an issue of the list's setting. */
function settingOfIssue(issuePath: PropertyKey[]): string {
  const parts = issuePath.map(String);
  const names = parts.map((_part, index) => parts.slice(0, index + 1).join('.'));
  return names.find((name) => SETTINGS.some((setting) => setting.name === name)) ?? parts.join('.');
}

interface Section {
  [key: string]: unknown;
}

function nest(merged: Merged): Section {
  const root: Section = {};
  for (const { name } of SETTINGS) {
    const parts = name.split('.');
    let section = root;
    for (const part of parts.slice(0, -1)) {
      section = (section[part] ??= {}) as Section;
    }
    const given = merged.get(name);
    if (given !== undefined) section[parts.at(-1) ?? ''] = given.value;
  }
  return root;
}

async function readSecretFiles(
  config: ReturnType<typeof configSchema.parse>,
): Promise<{ databaseUrl: string | null; redisUrl: string | null }> {
  return {
    databaseUrl: await readUrl('database', config.database, configSchema.shape.database.shape.url),
    redisUrl: await readUrl('redis', config.redis, configSchema.shape.redis.shape.url),
  };
}

async function readUrl(
  section: string,
  given: { url: string | null; urlFile: string | null },
  schema: typeof configSchema.shape.database.shape.url,
): Promise<string | null> {
  const { url, urlFile } = given;
  if (urlFile === null) return url;
  const details = { key: `${section}.urlFile`, file: urlFile };
  if (url !== null) throw configInvalid(`${section}.url and ${section}.urlFile exclude each other`, details);
  let text: string;
  try {
    text = await readFile(urlFile, 'utf8');
  } catch (error) {
    throw new AppError('CONFIG_INVALID', `${section}.urlFile ${urlFile} cannot be read`, {
      cause: error,
      details,
    });
  }
  // What is wrong with the content is not repeated: it is a secret.
  const parsed = schema.safeParse(text.trim());
  if (!parsed.success) {
    throw configInvalid(`${section}.urlFile ${urlFile} does not hold a valid URL`, details);
  }
  return parsed.data;
}

/** What no field can tell alone. */
function checkTogether(config: Config): void {
  checkListen(config.listen);
  checkServers(config);
  checkSocketPaths(config);
  checkTimes(config);
  checkPorts(config.exports);
}

function checkListen({ host, tls }: Config['listen']): void {
  if ((tls.certificate === null) !== (tls.key === null)) {
    const key = tls.certificate === null ? 'listen.tls.certificate' : 'listen.tls.key';
    throw configInvalid(`${key} is missing: certificate and key belong together`, { key });
  }
  if (!isLoopback(host) && tls.certificate === null) {
    throw configInvalid(
      `listen.host ${host} is not loopback: set listen.tls.certificate and listen.tls.key, or listen on 127.0.0.1`,
      { key: 'listen.tls' },
    );
  }
}

/** True for what can only be loopback; `localhost` is defined to be (RFC 6761). */
export function isLoopback(host: string): boolean {
  if (isIP(host) === 4) return host.startsWith('127.');
  return host === '::1' || host === 'localhost';
}

function checkServers({ database, redis }: Config): void {
  if (database.kind === 'mysql' && database.url === null) {
    throw configInvalid('database.kind mysql needs database.url or database.urlFile', {
      key: 'database.url',
    });
  }
  if (redis.kind === 'given' && redis.url === null && redis.socketPath === null) {
    throw configInvalid('redis.kind given needs redis.url, redis.urlFile or redis.socketPath', {
      key: 'redis.url',
    });
  }
}

function checkSocketPaths(config: Config): void {
  const limits: [string, string | null, number][] = [
    ['runtimeDirectory', config.runtimeDirectory, MAX_SOCKET_PATH_BYTES - SOCKET_NAME_BYTES],
    ['database.socketPath', config.database.socketPath, MAX_SOCKET_PATH_BYTES],
    ['redis.socketPath', config.redis.socketPath, MAX_SOCKET_PATH_BYTES],
  ];
  for (const [key, value, maxBytes] of limits) {
    const bytes = value === null ? 0 : Buffer.byteLength(value);
    if (bytes > maxBytes) {
      throw configInvalid(
        `${key} has ${bytes} bytes and may have ${maxBytes}: the path of a Unix socket ends at ${MAX_SOCKET_PATH_BYTES} bytes`,
        { key, bytes, maxBytes },
      );
    }
  }
}

/** Times that only work in this order: a live holder must be able to prove itself several times. */
function checkTimes({ runs, repository }: Config): void {
  const rules: [string, number, string, number][] = [
    ['runs.abandonedAfterMs', runs.abandonedAfterMs, 'runs.heartbeatMs', runs.heartbeatMs * 2],
    ['runs.failStalledAfterMs', runs.failStalledAfterMs, 'runs.stalledAfterMs', runs.stalledAfterMs],
    [
      'repository.leaseExpiresMs',
      repository.leaseExpiresMs,
      'repository.leaseRenewMs',
      repository.leaseRenewMs * 2,
    ],
  ];
  for (const [key, value, other, atLeast] of rules) {
    if (value < atLeast) {
      throw configInvalid(`${key} is too short beside ${other}: it must be at least ${atLeast} ms`, { key });
    }
  }
}

function checkPorts({ ownPortsFrom, ownPorts }: Config['exports']): void {
  const last = ownPortsFrom + ownPorts - 1;
  if (last <= MAX_PORT) return;
  throw configInvalid(
    `exports.ownPorts is too large: the last port would be ${last}, and none is above ${MAX_PORT}`,
    {
      key: 'exports.ownPorts',
    },
  );
}

function deepFreeze<T extends object>(value: T): T {
  for (const inner of Object.values(value) as unknown[]) {
    if (typeof inner === 'object' && inner !== null) deepFreeze(inner);
  }
  return Object.freeze(value);
}
