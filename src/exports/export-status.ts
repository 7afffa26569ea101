import { open } from 'node:fs/promises';
import { z } from 'zod';
import { AppError, errnoOf } from '../lib/errors.js';
import { MIB } from '../lib/units.js';

const MAX_STATUS_BYTES = 64 * MIB;

const addressSchema = z.discriminatedUnion('kind', [
  z.object({ kind: z.literal('tcp'), host: z.string(), port: z.number().int() }),
  z.object({ kind: z.literal('unix'), path: z.string() }),
]);

const errorSchema = z.object({ code: z.string(), message: z.string() });

const listenerSchema = z.object({
  /** `unix`, `tcp`, or `own:` and the address. */
  id: z.string(),
  address: addressSchema,
  tls: z.enum(['none', 'psk', 'x509']),
  state: z.enum(['up', 'down']),
  /** Of its storage daemon; null while that is down. */
  pid: z.number().int().nullable(),
  /** How often its storage daemon was started again after it had ended by itself. */
  restarts: z.number().int(),
  /** Why it is down. */
  error: errorSchema.nullable(),
});

const materializeSchema = z.object({
  /** `running` also while it waits for its storage daemon; `failed` stays until the key is taken away and set again. */
  state: z.enum(['running', 'completed', 'failed']),
  /** Of the disk: what was looked at so far, and its size. */
  doneBytes: z.number().int(),
  totalBytes: z.number().int(),
  /** Why it failed. */
  error: errorSchema.nullable(),
});

const fileSchema = z.object({
  /** Name in the directory. */
  file: z.string(),
  /** SHA-256 of the content this is about; null when it could not be read. */
  digest: z.string().nullable(),
  /** The export's name; null when the file could not be understood. */
  name: z.string().nullable(),
  state: z.enum(['served', 'failed']),
  /** Ids of the listeners that offer it. */
  listeners: z.array(z.string()),
  /** What clients see: whole sectors. */
  sizeBytes: z.number().int().nullable(),
  format: z.enum(['raw', 'qcow2']).nullable(),
  isReadOnly: z.boolean().nullable(),
  description: z.string().nullable(),
  /** How far the image stands alone; null where the file does not ask for it, or is not served. */
  materialize: materializeSchema.nullable(),
  /** Why it is not served. */
  error: errorSchema.nullable(),
});

const eventSchema = z.object({
  /** RFC 3339, UTC. */
  at: z.string(),
  kind: z.enum([
    'storage-daemon-ended',
    'storage-daemon-restarted',
    'restart-failed',
    'directory-unreadable',
  ]),
  listener: z.string().nullable(),
  message: z.string(),
});

export const exportStatusSchema = z.object({
  version: z.literal(1),
  pid: z.number().int(),
  /** Start time of that process in clock ticks since boot: another process of the same pid has another. */
  processStartTime: z.string(),
  startedAt: z.string(),
  exportsDirectory: z.string(),
  /** Counts the times the directory was read and applied since the daemon started. */
  generation: z.number().int(),
  /** When the last time was applied. */
  appliedAt: z.string(),
  /**
   * When reading it began: milliseconds of the host's monotonic clock, which all processes of the host share
   * (see `hostMonotonicMs`). What was written before is in this status.
   */
  readAtMs: z.number(),
  listeners: z.array(listenerSchema),
  files: z.array(fileSchema),
  /** The last ones, oldest first. */
  events: z.array(eventSchema),
});

export type ExportStatus = z.infer<typeof exportStatusSchema>;
export type ExportListenerStatus = z.infer<typeof listenerSchema>;
export type ExportFileStatus = z.infer<typeof fileSchema>;
export type MaterializeStatus = z.infer<typeof materializeSchema>;
export type ExportDaemonEvent = z.infer<typeof eventSchema>;
export type ListenAddress = z.infer<typeof addressSchema>;

/** Milliseconds of CLOCK_MONOTONIC, the same in every process of this host. */
export function hostMonotonicMs(): number {
  return Number(process.hrtime.bigint()) / 1e6;
}

/**
 * Reads what the export daemon last said of itself. Null when it never wrote the file or removed it when it
 * ended; a daemon that was killed leaves its last word behind (see `isExportDaemonAlive`).
 * EXPORT_DAEMON_UNAVAILABLE when the file is not such a status.
 */
export async function readExportStatus(statusFile: string): Promise<ExportStatus | null> {
  const text = await readBounded(statusFile);
  if (text === null) return null;
  try {
    return exportStatusSchema.parse(JSON.parse(text));
  } catch (error) {
    throw new AppError('EXPORT_DAEMON_UNAVAILABLE', `${statusFile} is not a status of holdfast-exportd`, {
      cause: error,
    });
  }
}

async function readBounded(file: string): Promise<string | null> {
  try {
    const handle = await open(file, 'r');
    try {
      const { size } = await handle.stat();
      if (size > MAX_STATUS_BYTES)
        throw new AppError('EXPORT_DAEMON_UNAVAILABLE', `${file} is larger than any status`);
      return await handle.readFile('utf8');
    } finally {
      await handle.close();
    }
  } catch (error) {
    if (errnoOf(error) === 'ENOENT') return null;
    throw error;
  }
}

/** The URIs at which an export is offered now; for one with TLS, the client adds its credentials. */
export function exportUris(status: ExportStatus, { name, listeners }: ExportFileStatus): string[] {
  if (name === null) return [];
  return status.listeners
    .filter(({ id }) => listeners.includes(id))
    .map(({ address, tls }) => exportUri(address, tls !== 'none', name));
}

function exportUri(address: ListenAddress, isTls: boolean, name: string): string {
  const scheme = isTls ? 'nbds' : 'nbd';
  if (address.kind === 'unix') return `${scheme}+unix:///${name}?socket=${encodeURIComponent(address.path)}`;
  const host = address.host.includes(':') ? `[${address.host}]` : address.host;
  return `${scheme}://${host}:${address.port}/${name}`;
}
