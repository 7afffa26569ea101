import { z } from 'zod';
import { AppError, isErrorCode } from '../src/lib/errors.js';
import type { PointId } from '../src/lib/id.js';
import { resolveManifestChain } from './chain.js';
import { pointDraftSchema, type StoredManifest } from './manifest.js';
import type { OpenLayer } from './partial-layer.js';
import type { DraftDisk, PointDraft, PointManifest } from './types.js';

/** One disk of a point about to be committed. */
export interface CommitDisk {
  draft: DraftDisk;
  layer: OpenLayer;
}

/**
 * Pairs each disk of the draft with its layer and holds both against the points that exist. Nothing
 * is changed. INVALID_INPUT for a draft that contradicts itself or its layers, PARENT_MISMATCH where a
 * layer does not stand on what its change record counts from, CONFLICT when the point exists.
 */
export async function planCommit(
  draft: PointDraft,
  layers: readonly OpenLayer[],
  stored: readonly StoredManifest[],
): Promise<CommitDisk[]> {
  const form = pointDraftSchema.safeParse(draft);
  if (!form.success) {
    throw new AppError(
      'INVALID_INPUT',
      `this is no point that could be committed: ${z.prettifyError(form.error)}`,
    );
  }
  const points = new Map(stored.map(({ manifest }) => [manifest.pointId, manifest]));
  if (points.has(draft.pointId)) {
    throw new AppError('CONFLICT', 'the recovery point exists already', {
      details: { pointId: draft.pointId },
    });
  }
  const disks = pairLayers(draft, layers);
  for (const { draft: disk } of disks) await requireSoundParent(disk, points);
  return disks;
}

function pairLayers(draft: PointDraft, layers: readonly OpenLayer[]): CommitDisk[] {
  if (layers.length !== draft.disks.length) {
    throw new AppError('INVALID_INPUT', 'a point needs one layer for each of its disks');
  }
  return draft.disks.map((disk) => {
    const layer = layers.find((candidate) => candidate.layerId === disk.layerId);
    const isSame =
      layer !== undefined &&
      layer.vmId === draft.vmId &&
      layer.runId === draft.runId &&
      layer.diskId === disk.diskId &&
      layer.sizeBytes === disk.sizeBytes;
    if (!isSame) {
      throw new AppError('INVALID_INPUT', 'a disk of the point has no layer made for it', {
        details: { diskId: disk.diskId, layerId: disk.layerId },
      });
    }
    if (layer.parentLayerId !== disk.parentLayerId) {
      throw parentMismatch(disk, 'the layer was created on another parent than the point says');
    }
    return { draft: disk, layer };
  });
}

async function requireSoundParent(
  disk: DraftDisk,
  points: ReadonlyMap<PointId, PointManifest>,
): Promise<void> {
  if (disk.parentPointId === null) return;
  const parent = points.get(disk.parentPointId);
  const entry = parent?.disks.find((candidate) => candidate.diskId === disk.diskId);
  if (parent === undefined || entry?.layerId !== disk.parentLayerId) {
    throw parentMismatch(disk, 'the parent layer is not the layer of the parent point');
  }
  if (entry.sizeBytes > disk.sizeBytes) throw parentMismatch(disk, 'the parent is larger than the disk');
  if (disk.method !== 'bitmap') return;
  // A record that counts from an ancestor holds more than is needed: safe. Any other proves nothing.
  for (const ancestor of await ancestry(parent, disk, points)) {
    const isSameSource = ancestor.sourceLineage === disk.sourceLineage;
    if (isSameSource && ancestor.changeIdTo === disk.changeIdFrom) return;
  }
  throw parentMismatch(disk, 'the change id is not one the parent layer or an ancestor of it was taken to');
}

async function ancestry(
  parent: PointManifest,
  disk: DraftDisk,
  points: ReadonlyMap<PointId, PointManifest>,
): Promise<DraftDisk[]> {
  try {
    const chain = await resolveManifestChain(parent, disk.diskId, (pointId) => {
      const point = points.get(pointId);
      if (point !== undefined) return Promise.resolve(point);
      return Promise.reject(
        new AppError('POINT_NOT_FOUND', 'an ancestor is missing', { details: { pointId } }),
      );
    });
    return chain.map((layer) => layer.disk);
  } catch (error) {
    if (isErrorCode(error, 'CHAIN_BROKEN'))
      throw parentMismatch(disk, 'the chain of the parent is broken', error);
    throw error;
  }
}

function parentMismatch(disk: DraftDisk, problem: string, cause?: unknown): AppError {
  return new AppError('PARENT_MISMATCH', `a layer does not stand on what it was taken from: ${problem}`, {
    cause,
    details: {
      diskId: disk.diskId,
      layerId: disk.layerId,
      parentLayerId: disk.parentLayerId,
      parentPointId: disk.parentPointId,
      problem,
    },
  });
}
