import { AppError, isErrorCode } from '../src/lib/errors.js';
import type { DiskId, LayerId, PointId, VmId } from '../src/lib/id.js';
import { SECTOR_BYTES, alignUp } from '../src/lib/units.js';
import type { RepositoryContext } from './context.js';
import { diskDirectory, layerName, parseLayerName, parsePartialName, sumsName } from './layout.js';
import { readManifest, requireDisk } from './manifest.js';
import { Qcow2File } from './qcow2.js';
import type { Qcow2Header } from './qcow2-header.js';
import type { BackingChain, ChainLayer, ManifestDisk, PointManifest } from './types.js';

interface ManifestLayer {
  point: PointManifest;
  disk: ManifestDisk;
}

/**
 * The layers under one disk of a point by the manifests alone, top first. CHAIN_BROKEN when a parent
 * point is missing, is not older, or has another layer than its child says.
 */
export async function resolveManifestChain(
  point: PointManifest,
  diskId: DiskId,
  readPoint: (pointId: PointId) => Promise<PointManifest>,
): Promise<ManifestLayer[]> {
  const layers: ManifestLayer[] = [{ point, disk: requireDisk(point, diskId) }];
  for (;;) {
    const child = layers[layers.length - 1];
    if (child === undefined || child.disk.parentPointId === null) return layers;
    const { parentPointId, parentLayerId } = child.disk;
    const parent = await readParent(child.point, parentPointId, readPoint);
    const disk = parent.disks.find((candidate) => candidate.diskId === diskId);
    if (disk === undefined || disk.layerId !== parentLayerId) {
      throw brokenChain(child, 'its parent point has another layer for this disk');
    }
    if (parent.sequence >= child.point.sequence) throw brokenChain(child, 'its parent point is not older');
    if (disk.sizeBytes > child.disk.sizeBytes) throw brokenChain(child, 'its parent is larger than itself');
    layers.push({ point: parent, disk });
  }
}

async function readParent(
  child: PointManifest,
  parentPointId: PointId,
  readPoint: (pointId: PointId) => Promise<PointManifest>,
): Promise<PointManifest> {
  try {
    return await readPoint(parentPointId);
  } catch (error) {
    if (!isErrorCode(error, 'POINT_NOT_FOUND')) throw error;
    throw new AppError('CHAIN_BROKEN', 'a point stands on a point that is not there', {
      cause: error,
      details: { pointId: child.pointId, parentPointId },
    });
  }
}

function brokenChain(layer: ManifestLayer, problem: string): AppError {
  return new AppError('CHAIN_BROKEN', `the backing chain of a disk is broken: ${problem}`, {
    details: {
      pointId: layer.point.pointId,
      diskId: layer.disk.diskId,
      layerId: layer.disk.layerId,
      problem,
    },
  });
}

/** The chain under one disk of a point, every header read and compared with the manifests. */
export async function openChain(
  context: RepositoryContext,
  point: PointManifest,
  diskId: DiskId,
): Promise<BackingChain> {
  const found = await resolveManifestChain(
    point,
    diskId,
    async (pointId) => (await readManifest(context, point.vmId, pointId)).manifest,
  );
  const layers: ChainLayer[] = [];
  for (const { point: owner, disk } of found) {
    const layer = describeLayer(context, owner, disk);
    await requireLayerHeader(layer.path, { sizeBytes: disk.sizeBytes, parentLayerId: disk.parentLayerId });
    layers.push(layer);
  }
  return { vmId: point.vmId, diskId, layers };
}

export function describeLayer(
  context: RepositoryContext,
  point: PointManifest,
  disk: ManifestDisk,
): ChainLayer {
  const directory = diskDirectory(point.vmId, disk.diskId);
  return {
    layerId: disk.layerId,
    pointId: point.pointId,
    sizeBytes: disk.sizeBytes,
    path: context.backend.localPath(`${directory}/${layerName(disk.layerId)}`),
    sumsPath: context.backend.localPath(`${directory}/${sumsName(disk.layerId)}`),
    sumsSha256: disk.sumsSha256,
  };
}

/** Opens a layer and holds its header against what the manifest says. CHAIN_BROKEN, LAYER_NOT_FOUND, LAYER_CORRUPT. */
export async function requireLayerHeader(
  file: string,
  expected: { sizeBytes: number; parentLayerId: LayerId | null },
): Promise<Qcow2Header> {
  await using layer = await Qcow2File.open(file);
  const problem = headerProblem(layer.header, expected);
  if (problem === undefined) return layer.header;
  throw new AppError('CHAIN_BROKEN', `the header of a layer is not what its manifest says: ${problem}`, {
    details: { file, problem },
  });
}

/** What differs between a header and what it should say, or undefined. */
export function headerProblem(
  header: Qcow2Header,
  expected: { sizeBytes: number; parentLayerId: LayerId | null },
): string | undefined {
  const backing = expected.parentLayerId === null ? null : layerName(expected.parentLayerId);
  if (header.backingFile !== backing) return 'it names another backing file';
  if (backing !== null && header.backingFormat !== 'qcow2')
    return 'it does not state the format of its backing file';
  if (header.virtualBytes !== alignUp(expected.sizeBytes, SECTOR_BYTES)) return 'its disk size is another';
  if (header.clusterBytes !== 65536) return 'its cluster size is another';
  return undefined;
}

/**
 * The names of layer files in a disk's folder whose headers name `layerId` as their backing file. A header
 * that cannot be read tells nothing: a layer that a manifest names (`isNamed`) is counted by that manifest, and a partial
 * file without a header stands on nothing; any other such file rejects with LAYER_CORRUPT.
 */
export async function findHeaderChildren(
  context: RepositoryContext,
  place: { vmId: VmId; diskId: DiskId; layerId: LayerId },
  isNamed: (layerId: LayerId) => boolean,
): Promise<string[]> {
  const directory = diskDirectory(place.vmId, place.diskId);
  const children: string[] = [];
  for (const { name } of (await context.backend.list(directory)) ?? []) {
    if (!name.endsWith('.qcow2') || name === layerName(place.layerId)) continue;
    try {
      await using layer = await Qcow2File.open(context.backend.localPath(`${directory}/${name}`));
      if (layer.header.backingFile === layerName(place.layerId)) children.push(name);
    } catch (error) {
      const layerId = parseLayerName(name, '.qcow2');
      const isCounted = layerId === undefined ? parsePartialName(name) !== undefined : isNamed(layerId);
      if (!isCounted || !isErrorCode(error, 'LAYER_CORRUPT')) throw error;
    }
  }
  return children;
}
