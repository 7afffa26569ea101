import { z } from 'zod';
import { newUlid, type PointId, type VmId } from '../src/lib/id.js';
import { toTimestamp } from '../src/lib/clock.js';
import type { RepositoryContext } from './context.js';
import { parseManifestName, recordFile, recordsDirectory } from './layout.js';
import type { StoredManifest } from './manifest.js';
import { AppError } from '../src/lib/errors.js';
import {
  idSchema,
  requireSealed,
  sealJson,
  sha256Schema,
  sizeSchema,
  timestampSchema,
} from './sealed-json.js';
import { FORMAT_VERSION } from './types.js';

const removalSchema = z.strictObject({
  formatVersion: z.literal(FORMAT_VERSION),
  kind: z.literal('removal'),
  vmId: idSchema<VmId>(),
  pointId: idSchema<PointId>(),
  sequence: sizeSchema.min(1),
  sha256: sha256Schema,
  removedAt: timestampSchema,
});

/**
 * What a removed point leaves behind in `merges/`: its sequence number, so that no later point takes it
 * again, and the digest of its manifest, so that the chain of digests can still be followed across it.
 */
export type RemovalRecord = z.infer<typeof removalSchema>;

/** All records of a VM. MANIFEST_UNREADABLE when any one cannot be read, REPOSITORY_FORMAT when newer. */
export async function readRemovals(context: RepositoryContext, vmId: VmId): Promise<RemovalRecord[]> {
  const entries = (await context.backend.list(recordsDirectory(vmId))) ?? [];
  const records: RemovalRecord[] = [];
  for (const entry of entries) {
    const id = parseManifestName(entry.name);
    if (id === undefined) continue;
    const file = recordFile(vmId, id);
    const data = await context.backend.read(file, { maxBytes: 1024 * 1024 });
    if (data === undefined) throw new AppError('MANIFEST_UNREADABLE', `${file} vanished while it was read`);
    records.push(
      requireSealed(data, {
        schema: removalSchema,
        what: file,
        formatVersion: FORMAT_VERSION,
        code: 'MANIFEST_UNREADABLE',
      }),
    );
  }
  return records;
}

export async function writeRemoval(context: RepositoryContext, point: StoredManifest): Promise<void> {
  const { vmId, pointId, sequence } = point.manifest;
  const nowMs = context.clock.nowMs();
  const record: RemovalRecord = {
    formatVersion: FORMAT_VERSION,
    kind: 'removal',
    vmId,
    pointId,
    sequence,
    sha256: point.sha256,
    removedAt: toTimestamp(nowMs),
  };
  await context.backend.makeDirectory(recordsDirectory(vmId));
  await context.backend.writeDurable(recordFile(vmId, newUlid(nowMs)), sealJson(record));
}
