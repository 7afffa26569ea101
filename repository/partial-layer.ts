import { open } from 'node:fs/promises';
import { constants } from 'node:fs';
import { AppError } from '../src/lib/errors.js';
import type { DiskId, LayerId, PointId, RunId, VmId } from '../src/lib/id.js';
import { SECTOR_BYTES, alignUp } from '../src/lib/units.js';
import { TEMPORARY_PREFIX, toStorageError } from './backend.js';
import { headerProblem } from './chain.js';
import type { RepositoryContext } from './context.js';
import { LayerTables } from './layer-tables.js';
import {
  diskDirectory,
  layerName,
  layersDirectory,
  manifestFile,
  parsePartialName,
  partialLayerName,
  partialSumsName,
  sumsName,
  vmDirectory,
} from './layout.js';
import type { Lease } from './lease.js';
import { requireWritable } from './marker.js';
import { Qcow2File } from './qcow2.js';
import { createImage } from './qemu-img.js';
import type { NewLayer, PartialLayer } from './repository.js';
import { SumsFileWriter } from './sums.js';
import { readVm } from './vm-record.js';

/** A layer under way with what the commit needs to know of it. Names are backend paths. */
export class OpenLayer implements PartialLayer {
  readonly vmId: VmId;
  readonly diskId: DiskId;
  readonly runId: RunId;
  readonly layerId: LayerId;
  readonly parentLayerId: LayerId | null;
  readonly sizeBytes: number;
  readonly virtualBytes: number;
  readonly directory: string;
  readonly path: string;
  readonly sums: SumsFileWriter;
  /** Set when the files were about to take their final names for this point. */
  committingPointId: PointId | undefined;

  constructor(context: RepositoryContext, layer: NewLayer, sums: SumsFileWriter) {
    this.vmId = layer.vmId;
    this.diskId = layer.diskId;
    this.runId = layer.runId;
    this.layerId = layer.layerId;
    this.parentLayerId = layer.parentLayerId;
    this.sizeBytes = layer.sizeBytes;
    this.virtualBytes = alignUp(layer.sizeBytes, SECTOR_BYTES);
    this.directory = diskDirectory(layer.vmId, layer.diskId);
    this.path = context.backend.localPath(this.partialFile);
    this.sums = sums;
  }

  openTables(): Promise<LayerTables> {
    return LayerTables.open(this.path);
  }

  get partialFile(): string {
    return `${this.directory}/${partialLayerName(this.runId, this.layerId)}`;
  }
  get partialSums(): string {
    return `${this.directory}/${partialSumsName(this.runId, this.layerId)}`;
  }
  get finalFile(): string {
    return `${this.directory}/${layerName(this.layerId)}`;
  }
  get finalSums(): string {
    return `${this.directory}/${sumsName(this.layerId)}`;
  }
}

export function requireLeaseOf(lease: Lease, vmId: VmId): void {
  if (lease.vmId === vmId) return;
  throw new AppError('LEASE_LOST', 'the lease is that of another VM', {
    details: { vmId, leaseOf: lease.vmId },
  });
}

export async function createLayer(
  context: RepositoryContext,
  layer: NewLayer,
  lease: Lease,
): Promise<OpenLayer> {
  if (!Number.isSafeInteger(layer.sizeBytes) || layer.sizeBytes <= 0) {
    throw new AppError('INVALID_INPUT', 'a disk has a size of at least one byte', { details: { ...layer } });
  }
  requireLeaseOf(lease, layer.vmId);
  await requireWritable(context);
  await lease.verify();
  await readVm(context, layer.vmId);
  await requireParent(context, layer);
  const directory = diskDirectory(layer.vmId, layer.diskId);
  await context.backend.makeDirectory(directory);
  const file = context.backend.localPath(`${directory}/${partialLayerName(layer.runId, layer.layerId)}`);
  const sumsFile = context.backend.localPath(`${directory}/${partialSumsName(layer.runId, layer.layerId)}`);
  const sums = await SumsFileWriter.create(sumsFile, {
    hash: context.marker.hash,
    clusterBytes: context.marker.clusterBytes,
    layerId: layer.layerId,
    diskBytes: layer.sizeBytes,
  });
  const made = new OpenLayer(context, layer, sums);
  try {
    await createEmptyFile(file);
    const backingName = layer.parentLayerId === null ? null : layerName(layer.parentLayerId);
    await createImage(context.backend, { file, virtualBytes: made.virtualBytes, backingName });
    await requireDraftHeader(made);
    return made;
  } catch (error) {
    await discardLayer(context, made);
    throw error;
  }
}

/** The file exists with its mode before qemu-img fills it, and what forbids writing gets its own error code here. */
async function createEmptyFile(file: string): Promise<void> {
  try {
    const flags = constants.O_WRONLY | constants.O_CREAT | constants.O_EXCL | constants.O_NOFOLLOW;
    const handle = await open(file, flags, 0o600);
    await handle.close();
  } catch (error) {
    throw toStorageError(error, 'creating a layer');
  }
}

async function requireParent(context: RepositoryContext, layer: NewLayer): Promise<void> {
  if (layer.parentLayerId === null) return;
  const directory = diskDirectory(layer.vmId, layer.diskId);
  await using parent = await Qcow2File.open(
    context.backend.localPath(`${directory}/${layerName(layer.parentLayerId)}`),
  );
  if (parent.header.virtualBytes <= alignUp(layer.sizeBytes, SECTOR_BYTES)) return;
  throw new AppError(
    'PARENT_MISMATCH',
    'the parent layer is larger than the disk: a disk that shrank gets a full',
    {
      details: {
        parentLayerId: layer.parentLayerId,
        parentBytes: parent.header.virtualBytes,
        sizeBytes: layer.sizeBytes,
      },
    },
  );
}

/** Rejects with PARENT_MISMATCH unless the file's header is what the layer was created as. */
export async function requireDraftHeader(layer: OpenLayer, file: string = layer.path): Promise<void> {
  await using image = await Qcow2File.open(file);
  const problem = headerProblem(image.header, layer);
  if (problem === undefined) return;
  throw new AppError(
    'PARENT_MISMATCH',
    `the header of a layer under way is not what it was created with: ${problem}`,
    {
      details: { layerId: layer.layerId, parentLayerId: layer.parentLayerId, problem },
    },
  );
}

/**
 * Removes the files of a layer under way. After a commit that failed between renaming and the manifest
 * the final names go too, but only while no manifest of that point exists. Idempotent.
 */
export async function discardLayer(context: RepositoryContext, layer: OpenLayer): Promise<void> {
  await layer.sums.close();
  await requireWritable(context);
  if (layer.committingPointId !== undefined) {
    const manifest = manifestFile(layer.vmId, layer.committingPointId);
    if ((await context.backend.stat(manifest)) !== undefined) return;
    await context.backend.remove(layer.finalFile);
    await context.backend.remove(layer.finalSums);
  }
  await context.backend.remove(layer.partialFile);
  await context.backend.remove(layer.partialSums);
}

/** Removes every partial file of a run. Answers their names, relative to the root. */
export async function discardRun(context: RepositoryContext, vmId: VmId, runId: RunId): Promise<string[]> {
  return removePartials(context, vmId, (owner) => owner === runId);
}

/** Removes every partial and temporary file of the VM: the holder of its lease is its only writer, and has not begun. */
export async function discardAbandoned(context: RepositoryContext, lease: Lease): Promise<string[]> {
  await lease.verify();
  const vmId = lease.vmId as VmId;
  const partials = await removePartials(context, vmId, () => true);
  return [...partials, ...(await removeTemporaries(context, vmDirectory(vmId)))];
}

/** What a writer that died had not renamed into place yet, anywhere in the VM's folder. */
async function removeTemporaries(context: RepositoryContext, directory: string): Promise<string[]> {
  const removed: string[] = [];
  for (const { name, kind } of (await context.backend.list(directory)) ?? []) {
    const file = `${directory}/${name}`;
    if (kind === 'directory') removed.push(...(await removeTemporaries(context, file)));
    else if (name.startsWith(TEMPORARY_PREFIX) && (await context.backend.remove(file))) removed.push(file);
  }
  return removed;
}

async function removePartials(
  context: RepositoryContext,
  vmId: VmId,
  isWanted: (owner: RunId) => boolean,
): Promise<string[]> {
  await requireWritable(context);
  const removed: string[] = [];
  for (const disk of (await context.backend.list(layersDirectory(vmId))) ?? []) {
    if (disk.kind !== 'directory') continue;
    const directory = `${layersDirectory(vmId)}/${disk.name}`;
    for (const entry of (await context.backend.list(directory)) ?? []) {
      const owner = parsePartialName(entry.name)?.runId;
      if (owner === undefined || !isWanted(owner)) continue;
      if (await context.backend.remove(`${directory}/${entry.name}`))
        removed.push(`${directory}/${entry.name}`);
    }
  }
  return removed;
}
