import { z } from 'zod';
import { AppError } from '../src/lib/errors.js';
import type { DiskId, LayerId, PointId, RepositoryId, RunId, VmId } from '../src/lib/id.js';
import type { RepositoryContext } from './context.js';
import { manifestFile, parseManifestName, pointsDirectory } from './layout.js';
import {
  idSchema,
  requireSealed,
  sealJson,
  sha256Hex,
  sha256Schema,
  sizeSchema,
  timestampSchema,
} from './sealed-json.js';
import { FORMAT_VERSION, type ManifestDisk, type PointManifest } from './types.js';

/** Manifests read at once: a directory of years of points is read in seconds, also over a network. */
const READ_TOGETHER = 16;
const MAX_MANIFEST_BYTES = 16 * 1024 * 1024;

const reasonCodes = [
  'REQUESTED',
  'FIRST_POINT',
  'BITMAP',
  'BITMAP_MISSING',
  'BITMAP_INCONSISTENT',
  'BITMAP_UNPROVEN',
  'NO_CHANGE_RECORD',
  'DISK_SHRANK',
  'DISK_REPLACED',
  'PARENT_DAMAGED',
] as const;

const shortText = z.string().max(4096);

const diskShape = {
  diskId: idSchema<DiskId>(),
  number: sizeSchema,
  name: shortText,
  sizeBytes: sizeSchema.min(1),
  sourceLineage: shortText,
};

export const vmDiskRecordSchema = z.strictObject(diskShape);

const draftDiskShape = {
  ...diskShape,
  layerId: idSchema<LayerId>(),
  parentLayerId: idSchema<LayerId>().nullable(),
  parentPointId: idSchema<PointId>().nullable(),
  method: z.enum(['full', 'bitmap', 'compare']),
  reason: z.strictObject({ code: z.enum(reasonCodes), sentence: shortText }),
  changeIdFrom: shortText.nullable(),
  changeIdTo: shortText,
  bytesRead: sizeSchema,
  bytesWritten: sizeSchema,
  bytesZeroed: sizeSchema,
  bytesSkipped: sizeSchema,
};

const pointShape = {
  pointId: idSchema<PointId>(),
  vmId: idSchema<VmId>(),
  vmName: shortText,
  runId: idSchema<RunId>(),
  capturedAt: timestampSchema,
  consistency: z.enum(['application', 'crash', 'offline']),
};

/** What a caller of commitPoint supplies, checked like everything that becomes a file. */
export const pointDraftSchema = z
  .strictObject({ ...pointShape, disks: z.array(z.strictObject(draftDiskShape)).min(1).max(1024) })
  .superRefine((draft, issues) => {
    for (const problem of diskProblems(draft.disks)) issues.addIssue({ code: 'custom', message: problem });
  });

const manifestSchema = z
  .strictObject({
    formatVersion: z.literal(FORMAT_VERSION),
    repositoryId: idSchema<RepositoryId>(),
    ...pointShape,
    sequence: sizeSchema.min(1),
    type: z.enum(['full', 'incremental']),
    committedAt: timestampSchema,
    hash: z.enum(['xxh3-128', 'sha-256']),
    previous: z.strictObject({ pointId: idSchema<PointId>(), sha256: sha256Schema }).nullable(),
    disks: z
      .array(z.strictObject({ ...draftDiskShape, layerFileBytes: sizeSchema, sumsSha256: sha256Schema }))
      .min(1)
      .max(1024),
  })
  .superRefine((manifest, issues) => {
    for (const problem of diskProblems(manifest.disks)) issues.addIssue({ code: 'custom', message: problem });
  });

type MethodFacts = Pick<
  ManifestDisk,
  'diskId' | 'number' | 'layerId' | 'method' | 'parentLayerId' | 'parentPointId' | 'changeIdFrom'
>;

/** What the entries of one point say wrongly about themselves, without looking at other points. */
function diskProblems(disks: readonly MethodFacts[]): string[] {
  const problems: string[] = [];
  for (const key of ['diskId', 'number', 'layerId'] as const) {
    if (new Set(disks.map((disk) => disk[key])).size !== disks.length)
      problems.push(`two disks have one ${key}`);
  }
  for (const disk of disks) {
    const hasParent = disk.parentLayerId !== null;
    if (hasParent !== (disk.parentPointId !== null))
      problems.push('parent layer and parent point do not go together');
    if (hasParent !== (disk.method !== 'full'))
      problems.push('a full has no parent, everything else has one');
    if ((disk.method === 'bitmap') !== (disk.changeIdFrom !== null)) {
      problems.push('a change id to count from goes with the bitmap method and no other');
    }
  }
  return problems;
}

/** A manifest with the SHA-256 of its file, which the next manifest names. */
export interface StoredManifest {
  manifest: PointManifest;
  sha256: string;
}

export function encodeManifest(manifest: PointManifest): Buffer {
  return sealJson(manifest);
}

/** Parses and verifies one manifest file. Throws MANIFEST_UNREADABLE, or REPOSITORY_FORMAT when newer. */
export function decodeManifest(
  data: Buffer,
  place: { repositoryId: RepositoryId; vmId: VmId; pointId: PointId },
): StoredManifest {
  const file = manifestFile(place.vmId, place.pointId);
  const manifest = requireSealed<PointManifest>(data, {
    schema: manifestSchema,
    what: file,
    formatVersion: FORMAT_VERSION,
    code: 'MANIFEST_UNREADABLE',
  });
  for (const key of ['repositoryId', 'vmId', 'pointId'] as const) {
    if (manifest[key] === place[key]) continue;
    throw new AppError('MANIFEST_UNREADABLE', `${file} belongs elsewhere: its ${key} is another`, {
      details: { file, found: manifest[key] },
    });
  }
  return { manifest, sha256: sha256Hex(data) };
}

/** One stored manifest. POINT_NOT_FOUND when absent. */
export async function readManifest(
  context: RepositoryContext,
  vmId: VmId,
  pointId: PointId,
): Promise<StoredManifest> {
  const file = manifestFile(vmId, pointId);
  const data = await context.backend.read(file, { maxBytes: MAX_MANIFEST_BYTES });
  if (data === undefined) {
    throw new AppError('POINT_NOT_FOUND', 'there is no such recovery point', { details: { vmId, pointId } });
  }
  return decodeManifest(data, { repositoryId: context.marker.repositoryId, vmId, pointId });
}

/** The ids of the VM's points as the directory has them, unread. */
export async function listPointIds(context: RepositoryContext, vmId: VmId): Promise<PointId[]> {
  const entries = (await context.backend.list(pointsDirectory(vmId))) ?? [];
  const ids = entries.map((entry) => parseManifestName(entry.name));
  return ids.filter((id): id is PointId => id !== undefined).sort();
}

/** All manifests of a VM by sequence. Rejects when any one cannot be read or verified, or two claim one place. */
export async function readAllManifests(context: RepositoryContext, vmId: VmId): Promise<StoredManifest[]> {
  const stored: StoredManifest[] = [];
  const ids = await listPointIds(context, vmId);
  for (let at = 0; at < ids.length; at += READ_TOGETHER) {
    const batch = ids.slice(at, at + READ_TOGETHER);
    stored.push(...(await Promise.all(batch.map((pointId) => readManifest(context, vmId, pointId)))));
  }
  stored.sort((a, b) => a.manifest.sequence - b.manifest.sequence);
  stored.forEach((item, index) => {
    const before = stored[index - 1];
    if (before?.manifest.sequence !== item.manifest.sequence) return;
    throw new AppError('MANIFEST_UNREADABLE', 'two points of a VM have the same sequence number', {
      details: { vmId, points: [before.manifest.pointId, item.manifest.pointId] },
    });
  });
  return stored;
}

/** The entry of one disk in a point. NOT_FOUND when the point has no such disk. */
export function requireDisk(manifest: PointManifest, diskId: DiskId): ManifestDisk {
  const disk = manifest.disks.find((candidate) => candidate.diskId === diskId);
  if (disk !== undefined) return disk;
  throw new AppError('NOT_FOUND', 'the recovery point has no such disk', {
    details: { pointId: manifest.pointId, diskId },
  });
}
