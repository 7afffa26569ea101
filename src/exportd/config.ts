import { readFile } from 'node:fs/promises';
import { isIP } from 'node:net';
import path from 'node:path';
import { parse } from 'yaml';
import { z } from 'zod';
import { AppError } from '../lib/errors.js';
import { MIB } from '../lib/units.js';

export const DEFAULT_CONFIG_FILE = '/etc/holdfast/exportd.yaml';

/** sun_path of a Unix socket, without the closing NUL (unix(7)). */
export const MAX_SOCKET_PATH_BYTES = 107;

const absolutePath = z
  .string()
  .refine((text) => path.isAbsolute(text) && !text.includes('\0'), 'must be an absolute path');

const socketPath = absolutePath.refine(
  (text) => Buffer.byteLength(text) <= MAX_SOCKET_PATH_BYTES,
  `must have at most ${MAX_SOCKET_PATH_BYTES} bytes`,
);

/** A name would be looked up, and could lead elsewhere than it says. */
const host = z
  .string()
  .refine((text) => isIP(text) !== 0 || text === 'localhost', 'must be an IP address or localhost');

const tcpSchema = z.strictObject({
  host: host.default('127.0.0.1'),
  port: z.int().min(1).max(65_535).default(10_809),
  /** What the shared port asks of clients. */
  tls: z.enum(['none', 'psk', 'x509']).default('none'),
});

const pskSchema = z.strictObject({
  /** Lines `user:hexadecimal key`, as psktool writes them: who may use the shared port. */
  keysFile: absolutePath.nullable().default(null),
  /** Files `<user>.psk` of one such line: who may be named by an export's `identity`. */
  identitiesDirectory: absolutePath.nullable().default(null),
});

const x509Schema = z.strictObject({
  /** With ca-cert.pem, server-cert.pem and server-key.pem. */
  directory: absolutePath,
  /** Distinguished names that may use the shared port; null for every client with a certificate of the CA. */
  clientNames: z.array(z.string().min(1)).nullable().default(null),
});

const configSchema = z.strictObject({
  exportsDirectory: absolutePath.default('/etc/holdfast/exports.d'),
  /** Where images and their backing files may lie, links resolved; null for anywhere. */
  imageDirectories: z.array(absolutePath).min(1).nullable().default(null),
  /** Sockets, status and pid file. Emptied by a restart of the host. */
  runtimeDirectory: absolutePath.default('/run/holdfast-exportd'),
  statusFile: absolutePath.optional(),
  pidFile: absolutePath.optional(),
  tcp: tcpSchema.nullable().prefault({}),
  unix: z.strictObject({ path: socketPath.optional() }).nullable().prefault({}),
  tls: z
    .strictObject({ psk: pskSchema.nullable().default(null), x509: x509Schema.nullable().default(null) })
    .prefault({}),
  log: z
    .strictObject({ level: z.enum(['debug', 'info', 'warn', 'error', 'silent']).default('info') })
    .prefault({}),
});

type Parsed = z.infer<typeof configSchema>;

export type TlsSettings = Parsed['tls'];

/** The settings of the export daemon; docs/reference/exportd.md explains each. */
export type ExportdConfig = Omit<Parsed, 'statusFile' | 'pidFile' | 'unix'> & {
  statusFile: string;
  pidFile: string;
  unix: { path: string } | null;
};

/**
 * Reads the daemon's own settings. Without a file named, /etc/holdfast/exportd.yaml, which may be absent.
 * CONFIG_INVALID for the first thing that is wrong, also for a port that others reach without TLS.
 */
export async function loadExportdConfig(file: string | undefined): Promise<ExportdConfig> {
  const named = path.resolve(file ?? DEFAULT_CONFIG_FILE);
  const text = await readText(named, file === undefined);
  const result = configSchema.safeParse(text === null ? {} : parseYaml(text, named));
  if (!result.success) {
    const issue = result.error.issues[0];
    throw invalid(named, `${issue?.path.join('.') ?? ''}: ${issue?.message ?? 'not valid'}`);
  }
  const { data } = result;
  const config: ExportdConfig = {
    ...data,
    statusFile: data.statusFile ?? path.join(data.runtimeDirectory, 'status.json'),
    pidFile: data.pidFile ?? path.join(data.runtimeDirectory, 'exportd.pid'),
    unix: data.unix && { path: data.unix.path ?? path.join(data.runtimeDirectory, 'nbd.sock') },
  };
  checkTogether(config, (problem) => invalid(named, problem));
  return config;
}

/** True for what can only be loopback; `localhost` is defined to be (RFC 6761). */
export function isLoopback(address: string): boolean {
  return isIP(address) === 4 ? address.startsWith('127.') : address === '::1' || address === 'localhost';
}

function checkTogether({ tcp, unix, tls }: ExportdConfig, bad: (problem: string) => AppError): void {
  if (tcp === null && unix === null) throw bad('tcp and unix are both off: nothing would be served');
  if (unix !== null && Buffer.byteLength(unix.path) > MAX_SOCKET_PATH_BYTES) {
    throw bad('unix.path: runtimeDirectory is too long for a socket in it');
  }
  if (tcp?.tls === 'none' && !isLoopback(tcp.host)) {
    throw bad(`tcp.host ${tcp.host} is not loopback: set tcp.tls to psk or x509, or listen on 127.0.0.1`);
  }
  if (tcp?.tls === 'psk' && (tls.psk?.keysFile ?? null) === null)
    throw bad('tcp.tls psk needs tls.psk.keysFile');
  if (tcp?.tls === 'x509' && tls.x509 === null) throw bad('tcp.tls x509 needs tls.x509.directory');
}

async function readText(file: string, mayBeAbsent: boolean): Promise<string | null> {
  let text: string;
  try {
    text = await readFile(file, 'utf8');
  } catch (error) {
    if (mayBeAbsent && (error as NodeJS.ErrnoException).code === 'ENOENT') return null;
    throw new AppError('CONFIG_INVALID', `${file} cannot be read`, { cause: error, details: { file } });
  }
  if (text.length > MIB) throw invalid(file, 'larger than 1 MiB');
  return text;
}

function parseYaml(text: string, file: string): unknown {
  try {
    // YAML aliases are of no use here and can blow up a small file.
    return parse(text, { maxAliasCount: 0, uniqueKeys: true, logLevel: 'error' }) ?? {};
  } catch (error) {
    throw invalid(file, error instanceof Error ? (error.message.split('\n')[0] ?? '') : String(error));
  }
}

function invalid(file: string, problem: string): AppError {
  return new AppError('CONFIG_INVALID', `${file}: ${problem}`, { details: { file } });
}
