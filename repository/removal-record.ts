import { z } from 'zod';
import { newUlid, type PointId, type VmId } from '../src/lib/id.js';
import { toTimestamp } from '../src/lib/clock.js';
import type { RepositoryContext } from './context.js';
import { parseManifestName, recordFile, recordsDirectory } from './layout.js';
import { readAllManifests, type StoredManifest } from './manifest.js';
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

export interface StoredRemoval extends RemovalRecord {
  /** The record's own id, its file name. */
  recordId: string;
}

/** All records of a VM. MANIFEST_UNREADABLE when any one cannot be read, REPOSITORY_FORMAT when newer. */
export async function readRemovals(context: RepositoryContext, vmId: VmId): Promise<StoredRemoval[]> {
  const entries = (await context.backend.list(recordsDirectory(vmId))) ?? [];
  const records: StoredRemoval[] = [];
  for (const entry of entries) {
    const id = parseManifestName(entry.name);
    if (id === undefined) continue;
    const file = recordFile(vmId, id);
    const data = await context.backend.read(file, { maxBytes: 1024 * 1024 });
    if (data === undefined) throw new AppError('MANIFEST_UNREADABLE', `${file} vanished while it was read`);
    const record = requireSealed(data, {
      schema: removalSchema,
      what: file,
      formatVersion: FORMAT_VERSION,
      code: 'MANIFEST_UNREADABLE',
    });
    records.push({ ...record, recordId: id });
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

/**
 * Removes the records that nothing needs any more: no manifest names their point as the one before it,
 * and a higher sequence number is known. Keeps `merges/` from growing with every deleted point.
 */
export async function pruneRemovals(context: RepositoryContext, vmId: VmId): Promise<void> {
  const stored = await readAllManifests(context, vmId);
  const records = await readRemovals(context, vmId);
  const named = new Set(stored.map(({ manifest }) => manifest.previous?.pointId));
  const sequences = [
    ...stored.map(({ manifest }) => manifest.sequence),
    ...records.map(({ sequence }) => sequence),
  ];
  const highest = Math.max(0, ...sequences);
  for (const { recordId, pointId, sequence } of records) {
    if (named.has(pointId) || sequence === highest) continue;
    await context.backend.remove(recordFile(vmId, recordId));
  }
}
