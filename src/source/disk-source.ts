import { z } from 'zod';
import { isUlid } from '../lib/id.js';
import { parseNbdUri } from '../nbd/uri.js';
import type { ChangeTracking, DiskSource, VmSource } from './source.js';

const changeTracking = z.enum(['auto', 'bitmap', 'compare']);
/** A NUL would cut a path short in C. */
const absolutePath = z
  .string()
  .max(4096)
  .refine((text) => text.startsWith('/') && !text.includes('\u0000'), 'must be an absolute path');

const nbdSchema = z.strictObject({
  kind: z.literal('nbd'),
  uri: z.string(),
  changeTracking: changeTracking.default('auto'),
  tls: z
    .strictObject({
      certificates: absolutePath.optional(),
      pskFile: absolutePath.optional(),
      username: z.string().max(255).optional(),
    })
    .optional(),
});

const imageSchema = z.strictObject({
  kind: z.literal('image'),
  path: absolutePath,
  format: z.enum(['raw', 'qcow2']),
  changeTracking: changeTracking.default('auto'),
});

const volumeSchema = z.strictObject({
  kind: z.literal('volume'),
  volumeId: z.string().refine(isUlid, 'must be the id of a volume'),
  changeTracking: changeTracking.default('auto'),
});

const pushSchema = z.strictObject({ kind: z.literal('push'), sizeBytes: z.int().min(1) });

const machineDiskSchema = z.strictObject({
  kind: z.enum(['libvirt', 'qemu']),
  target: z.string().min(1).max(255),
  serial: z.string().max(255).nullable(),
  changeTracking: changeTracking.default('auto'),
});

const schema = z.discriminatedUnion('kind', [
  nbdSchema,
  imageSchema,
  volumeSchema,
  pushSchema,
  machineDiskSchema,
]);

const vmSchema = z.discriminatedUnion('kind', [
  z.strictObject({ kind: z.literal('libvirt'), uri: z.string().min(1).max(1024), uuid: z.uuid() }),
  z.strictObject({ kind: z.literal('qemu'), socket: absolutePath, agentSocket: absolutePath.nullable() }),
]);

/** Parses a stored source of a VM; null for one whose disks stand for themselves. */
export function parseVmSource(value: unknown): VmSource | null {
  return value === null ? null : vmSchema.parse(value);
}

/** Parses a stored or received source; throws zod's error, or NBD_URI_INVALID. */
export function parseDiskSource(value: unknown): DiskSource {
  const source = schema.parse(value);
  if (source.kind === 'nbd') parseNbdUri(source.uri);
  return dropUndefined(source);
}

/** A disk that is never read here leaves nothing to choose. */
export function trackingOf(source: DiskSource): ChangeTracking {
  return 'changeTracking' in source ? source.changeTracking : 'auto';
}

/** zod marks absent keys as undefined; exact optional types do not allow that. */
function dropUndefined(value: z.infer<typeof schema>): DiskSource {
  return JSON.parse(JSON.stringify(value)) as DiskSource;
}
