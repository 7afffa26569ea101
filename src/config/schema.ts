import { z } from 'zod';
import { GIB, MIB, KIB } from '../lib/units.js';

/** What `holdfast config show` tells about a setting beside its value. */
export interface SettingMeta {
  comment: string;
  /** Of the value, where it has one. */
  unit?: string;
  /** A URL that may carry a password: shown masked. */
  isSecretUrl?: boolean;
}

/** Comments and units of the settings, by schema. */
export const settingMeta = z.registry<SettingMeta>();

function setting<T extends z.ZodType>(schema: T, meta: SettingMeta): T {
  settingMeta.add(schema, meta);
  return schema;
}

const milliseconds = (defaultMs: number, comment: string, minMs = 1): z.ZodDefault<z.ZodNumber> =>
  setting(z.int().min(minMs).max(86_400_000).default(defaultMs), { comment, unit: 'ms' });

const count = (
  defaultCount: number,
  max: number,
  meta: { comment: string; unit?: string },
): z.ZodDefault<z.ZodNumber> => setting(z.int().min(1).max(max).default(defaultCount), meta);

const absolutePath = z
  .string()
  .max(4096)
  .refine((text) => text.startsWith('/') && !text.includes('\0'), 'must be an absolute path');

const optionalPath = (comment: string): z.ZodDefault<z.ZodNullable<typeof absolutePath>> =>
  setting(absolutePath.nullable().default(null), { comment });

const secretUrl = (schemes: string[], comment: string): z.ZodDefault<z.ZodNullable<z.ZodString>> =>
  setting(
    z
      .string()
      .refine((text) => hasScheme(text, schemes), `must be a URL with one of ${schemes.join(', ')}`)
      .nullable()
      .default(null),
    { comment, isSecretUrl: true },
  );

function hasScheme(text: string, schemes: string[]): boolean {
  return URL.canParse(text) && schemes.includes(new URL(text).protocol.slice(0, -1));
}

export const ROLES = ['api', 'scheduler', 'worker'] as const;
export type Role = (typeof ROLES)[number];

const listen = z.strictObject({
  host: setting(z.string().min(1).max(253).default('127.0.0.1'), {
    comment: 'Address the API listens on. Anything but loopback needs listen.tls.',
  }),
  port: setting(z.int().min(0).max(65_535).default(8007), {
    comment: 'TCP port of the API; 0 takes a free one.',
  }),
  tls: z.strictObject({
    certificate: optionalPath('PEM file with the certificate chain of the API.'),
    key: optionalPath('PEM file with the private key of the certificate.'),
  }),
});

const database = z.strictObject({
  kind: setting(z.enum(['sqlite', 'mysql']).default('sqlite'), {
    comment: 'sqlite: a file of this host; mysql: a MariaDB or MySQL server.',
  }),
  file: optionalPath('File of the SQLite database. Default: holdfast.db in the state directory.'),
  url: secretUrl(
    ['mysql', 'mariadb'],
    'mysql://user:password@host:port/database of the server; ?tls=required encrypts and checks its certificate.',
  ),
  urlFile: optionalPath('File that holds database.url, to keep the password out of this configuration.'),
  socketPath: optionalPath('Unix socket of the server, in place of host and port of the URL.'),
  connections: count(10, 200, {
    comment: 'Connections to a mysql server this process opens at the most.',
    unit: 'connections',
  }),
  queryTimeoutMs: milliseconds(30_000, 'A single statement that takes longer fails.', 100),
  connectTimeoutMs: milliseconds(10_000, 'Limit for getting a connection, free or new.', 100),
});

const redis = z.strictObject({
  kind: setting(z.enum(['managed', 'given']).default('managed'), {
    comment:
      'managed: a private redis-server on a Unix socket; given: the server that url or socketPath names.',
  }),
  url: secretUrl(['redis', 'rediss'], 'redis://user:password@host:port/number of the given server.'),
  urlFile: optionalPath('File that holds redis.url, to keep the password out of this configuration.'),
  socketPath: optionalPath('Unix socket of the given server, in place of redis.url.'),
  prefix: setting(
    z
      .string()
      .regex(/^[A-Za-z0-9_-]{1,64}$/)
      .default('holdfast'),
    { comment: 'Begins every key. Appliances that share a Redis server need different ones.' },
  ),
  commandTimeoutMs: milliseconds(5000, 'A command to Redis that takes longer fails.', 100),
});

const runs = z.strictObject({
  workers: count(2, 64, { comment: 'Runs this process executes at the same time.', unit: 'runs' }),
  attendedWorkers: count(64, 1000, {
    comment:
      'Runs this process executes beside those, which mostly wait for others: pushed backups, operations.',
    unit: 'runs',
  }),
  attempts: count(3, 20, { comment: 'How often a run is tried that fails for a passing reason.' }),
  backoffMs: milliseconds(10_000, 'Wait before the second attempt; doubled for each further one.'),
  heartbeatMs: milliseconds(5000, 'How often a worker proves in the database that it lives.'),
  abandonedAfterMs: milliseconds(
    30_000,
    'A running run without heartbeat for this long is ended as interrupted.',
  ),
  progressIntervalMs: milliseconds(2000, 'How often the progress of a run is stored.'),
  stalledAfterMs: milliseconds(60_000, 'A run without progress for this long is shown as stalled.'),
  failStalledAfterMs: milliseconds(300_000, 'A run without progress for this long is failed and cleaned up.'),
});

const nbd = z.strictObject({
  connectTimeoutMs: milliseconds(10_000, 'Limit for connecting to an NBD server, handshake included.'),
  requestTimeoutMs: milliseconds(30_000, 'Limit for the answer to one NBD request outside a copy.'),
  stallTimeoutMs: milliseconds(60_000, 'A copy in which nothing completes for this long fails.'),
  connections: count(2, 64, {
    comment: 'Connections to one export where the server allows several.',
    unit: 'connections',
  }),
  requestBytes: setting(
    z
      .int()
      .min(64 * KIB)
      .max(32 * MIB)
      .multipleOf(64 * KIB)
      .default(512 * KIB),
    { comment: 'Largest read or write of a copy; a multiple of 65536.', unit: 'bytes' },
  ),
  requestsInFlight: count(8, 64, {
    comment: 'Requests under way on each connection of a copy.',
    unit: 'requests',
  }),
});

const snapshot = z.strictObject({
  scratchDirectory: setting(absolutePath.default('/var/tmp/holdfast'), {
    comment:
      'Where hypervisors of this host keep what running guests overwrite during a backup, and their sockets. Needs room.',
  }),
  scratchKeepFreePercent: setting(z.int().min(1).max(90).default(20), {
    comment:
      'A backup ends before less than this of the scratch filesystem is free; see scratchKeepFreeBytes.',
    unit: 'percent',
  }),
  scratchKeepFreeBytes: setting(
    z
      .int()
      .min(MIB)
      .max(1024 * GIB)
      .default(2 * GIB),
    { comment: 'Of this and scratchKeepFreePercent the smaller one is kept free.', unit: 'bytes' },
  ),
  commandTimeoutMs: milliseconds(60_000, 'Limit for one command to a hypervisor.', 1000),
  agentTimeoutMs: milliseconds(
    5000,
    'A guest agent that does not answer for this long counts as absent.',
    100,
  ),
  freezeLimitMs: milliseconds(
    10_000,
    'A guest frozen for this long is thawed, whatever the backup does.',
    500,
  ),
  cbwTimeoutMs: milliseconds(
    5000,
    'qemu sources: saving old data takes the guest no longer than this; then the backup fails.',
    1000,
  ),
});

const repository = z.strictObject({
  leaseRenewMs: milliseconds(10_000, 'How often a held lease is renewed in the repository.'),
  leaseExpiresMs: milliseconds(60_000, 'A lease not renewed for this long may be taken by another run.'),
});

const exportsSection = z.strictObject({
  directory: setting(absolutePath.default('/etc/holdfast/exports.d'), {
    comment: 'Where export files are written; exportsDirectory of holdfast-exportd.',
  }),
  pidFile: setting(absolutePath.default('/run/holdfast-exportd/exportd.pid'), {
    comment: 'pidFile of holdfast-exportd.',
  }),
  statusFile: setting(absolutePath.default('/run/holdfast-exportd/status.json'), {
    comment: 'statusFile of holdfast-exportd.',
  }),
  identitiesDirectory: optionalPath(
    'tls.psk.identitiesDirectory of holdfast-exportd, where keys of identities are written.',
  ),
  overlayDirectory: setting(absolutePath.default('/var/lib/holdfast-overlays'), {
    comment: 'Where writable exports of points keep what is written to them. Needs room.',
  }),
  advertisedHost: setting(
    z
      .string()
      .regex(/^[A-Za-z0-9]([A-Za-z0-9.:-]{0,252})$/)
      .nullable()
      .default(null),
    { comment: 'Name or address that clients use for the port, where the daemon listens on all addresses.' },
  ),
  ownPortsFrom: setting(z.int().min(1).max(65_535).default(10_810), {
    comment: 'First of the TCP ports for exports that only one identity may use.',
  }),
  ownPorts: count(100, 10_000, { comment: 'How many such ports there are.', unit: 'ports' }),
  publishTimeoutMs: milliseconds(30_000, 'Limit for the export daemon to serve a new export.', 100),
  defaultTtlSeconds: setting(z.int().min(0).max(31_536_000).default(86_400), {
    comment: 'An export is removed after this time unless it asks for another; 0: never.',
    unit: 's',
  }),
});

const push = z.strictObject({
  silenceMs: milliseconds(300_000, 'A pushed backup whose agent reports nothing for this long fails.', 1000),
});

const api = z.strictObject({
  maxBodyBytes: setting(
    z
      .int()
      .min(KIB)
      .max(64 * MIB)
      .default(MIB),
    {
      comment: 'Largest request body that is read.',
      unit: 'bytes',
    },
  ),
});

/**
 * Every setting of Holdfast. The dotted path of a field is its name in files; its environment
 * variable is HOLDFAST_ and the path in upper snake case (`runs.backoffMs`: HOLDFAST_RUNS_BACKOFF_MS).
 */
export const configSchema = z.strictObject({
  stateDirectory: setting(absolutePath.default('/var/lib/holdfast'), {
    comment: 'What must survive a reboot: database, Redis data, secrets, records of runs.',
  }),
  runtimeDirectory: setting(absolutePath.default('/run/holdfast'), {
    comment: 'Sockets and what else is of no use after a reboot. Short: socket paths end at 107 bytes.',
  }),
  roles: setting(
    z
      .array(z.enum(ROLES))
      .min(1)
      .default([...ROLES]),
    {
      comment: 'What this process does: any of api, scheduler, worker.',
    },
  ),
  listen,
  log: z.strictObject({
    level: setting(z.enum(['debug', 'info', 'warn', 'error', 'silent']).default('info'), {
      comment: 'What is logged: debug, info, warn, error or silent.',
    }),
  }),
  database,
  redis,
  runs,
  nbd,
  snapshot,
  repository,
  exports: exportsSection,
  push,
  api,
});

type DeepReadonly<T> = T extends readonly (infer Item)[]
  ? readonly Item[]
  : T extends object
    ? { readonly [Key in keyof T]: DeepReadonly<T[Key]> }
    : T;

type Parsed = z.infer<typeof configSchema>;
/**
 * The settings as the process uses them: complete, checked and frozen. `database.file` is set, and
 * `url` of database and Redis has what a `urlFile` held.
 */
export type Config = DeepReadonly<
  Omit<Parsed, 'database'> & {
    database: Omit<Parsed['database'], 'file'> & { file: string };
  }
>;

/** One setting of the schema: its dotted name and the schema of its value. */
export interface Setting {
  name: string;
  schema: z.ZodType;
  meta: SettingMeta;
}

/** Every setting, in the order of the schema. */
export const SETTINGS: readonly Setting[] = listSettings(configSchema, '');

function listSettings(section: z.ZodObject, prefix: string): Setting[] {
  return Object.entries(section.shape).flatMap(([key, schema]) => {
    const name = prefix + key;
    if (schema instanceof z.ZodObject) return listSettings(schema, `${name}.`);
    const meta = settingMeta.get(schema as z.ZodType);
    if (meta === undefined) throw new TypeError(`setting ${name} has no comment`);
    return [{ name, schema: schema as z.ZodType, meta }];
  });
}

/** `runs.backoffMs` → `HOLDFAST_RUNS_BACKOFF_MS`. */
export function environmentName(settingName: string): string {
  const snake = settingName.replaceAll(/([a-z])([A-Z])/g, '$1_$2').replaceAll('.', '_');
  return `HOLDFAST_${snake.toUpperCase()}`;
}
