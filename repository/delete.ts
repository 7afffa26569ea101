import path from 'node:path';
import { AppError, isErrorCode } from '../src/lib/errors.js';
import type { PointId, VmId } from '../src/lib/id.js';
import { findHeaderChildren } from './chain.js';
import type { RepositoryContext } from './context.js';
import {
  configDirectory,
  diskDirectory,
  layerName,
  manifestFile,
  pointsDirectory,
  stateFile,
  sumsName,
  trashDirectory,
} from './layout.js';
import type { Lease } from './lease.js';
import { readAllManifests, readManifest, type StoredManifest } from './manifest.js';
import { requireWritable } from './marker.js';
import { requireLeaseOf } from './partial-layer.js';
import { pruneRemovals, readRemovals, writeRemoval } from './removal-record.js';
import type { DeleteResult } from './repository.js';
import type { PointManifest } from './types.js';

/** Points whose layers stand on this point's, directly or through others, by sequence. */
export async function dependents(
  context: RepositoryContext,
  vmId: VmId,
  pointId: PointId,
): Promise<PointId[]> {
  return findDependents(await readAllManifests(context, vmId), pointId);
}

function findDependents(stored: readonly StoredManifest[], pointId: PointId): PointId[] {
  if (!stored.some(({ manifest }) => manifest.pointId === pointId)) {
    throw new AppError('POINT_NOT_FOUND', 'there is no such recovery point', { details: { pointId } });
  }
  const found = new Set<PointId>([pointId]);
  // By sequence, so a parent has been met before its children.
  for (const { manifest } of stored) {
    if (manifest.disks.some((disk) => disk.parentPointId !== null && found.has(disk.parentPointId))) {
      found.add(manifest.pointId);
    }
  }
  found.delete(pointId);
  return [...found];
}

/** See Repository.deletePoint. A crash after the tombstone leaves files without a manifest, which sweep takes. */
export async function deletePoint(
  context: RepositoryContext,
  point: { vmId: VmId; pointId: PointId },
  lease: Lease,
): Promise<DeleteResult> {
  const { vmId, pointId } = point;
  requireLeaseOf(lease, vmId);
  await requireWritable(context);
  await lease.verify();
  const { manifest, sha256 } = await readManifest(context, vmId, pointId);
  await requireNoDependents(context, manifest);
  const removals = await readRemovals(context, vmId);
  if (!removals.some((record) => record.pointId === pointId))
    await writeRemoval(context, { manifest, sha256 });
  await buryManifest(context, manifest, lease);
  const result = await removeFiles(context, manifest, lease);
  await pruneRemovals(context, vmId);
  return result;
}

/** Counted twice, over the manifests and over what the files' own headers say. */
async function requireNoDependents(context: RepositoryContext, manifest: PointManifest): Promise<void> {
  const { vmId, pointId } = manifest;
  const stored = await readAllManifests(context, vmId);
  const points = findDependents(stored, pointId);
  const named = new Set(stored.flatMap((item) => item.manifest.disks.map((disk) => disk.layerId)));
  const files: string[] = [];
  for (const { diskId, layerId } of manifest.disks) {
    const children = await findHeaderChildren(context, { vmId, diskId, layerId }, (id) => named.has(id));
    files.push(...children.map((name) => `${diskDirectory(vmId, diskId)}/${name}`));
  }
  if (points.length === 0 && files.length === 0) return;
  throw new AppError('POINT_HAS_DEPENDENTS', 'other layers stand on this recovery point', {
    details: { pointId, dependents: points, files },
  });
}

/** The tombstone: the manifest leaves its place in one durable step, and from then on the point does not exist. */
async function buryManifest(
  context: RepositoryContext,
  manifest: PointManifest,
  lease: Lease,
): Promise<void> {
  const { vmId, pointId } = manifest;
  const directory = `${trashDirectory(context.clock.nowMs())}/${vmId}`;
  await context.backend.makeDirectory(directory);
  await requireWritable(context);
  await lease.verify();
  await context.backend.rename(manifestFile(vmId, pointId), `${directory}/${pointId}.json`);
  await context.backend.syncDirectory(pointsDirectory(vmId));
  await context.backend.syncDirectory(directory);
}

async function removeFiles(
  context: RepositoryContext,
  manifest: PointManifest,
  lease: Lease,
): Promise<DeleteResult> {
  const { vmId, pointId } = manifest;
  const result: DeleteResult = { removedFiles: [], freedBytes: 0 };
  const files = manifest.disks.flatMap(({ diskId, layerId }) => {
    const directory = diskDirectory(vmId, diskId);
    return [`${directory}/${layerName(layerId)}`, `${directory}/${sumsName(layerId)}`];
  });
  files.push(stateFile(vmId, pointId));
  const config = configDirectory(vmId, pointId);
  for (const entry of (await context.backend.list(config)) ?? []) files.push(`${config}/${entry.name}`);
  for (const file of files) {
    await lease.verify();
    await removeCounted(context, file, result);
  }
  await context.backend.removeDirectory(config);
  const directories = new Set(files.map((file) => path.posix.dirname(file)));
  directories.delete(config);
  for (const directory of directories) await syncIfThere(context, directory);
  return result;
}

async function removeCounted(context: RepositoryContext, file: string, result: DeleteResult): Promise<void> {
  const facts = await context.backend.stat(file);
  if (facts === undefined || !(await context.backend.remove(file))) return;
  result.removedFiles.push(file);
  result.freedBytes += facts.sizeBytes;
}

async function syncIfThere(context: RepositoryContext, directory: string): Promise<void> {
  try {
    await context.backend.syncDirectory(directory);
  } catch (error) {
    // A disk folder that never existed has nothing to make durable; an absent root says REPOSITORY_OFFLINE instead.
    const isThere = (await context.backend.stat(directory)) !== undefined;
    if (isThere || !isErrorCode(error, 'REPOSITORY_IO')) throw error;
  }
}
