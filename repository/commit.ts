import { throwIfAborted } from '../src/lib/deadline.js';
import { AppError } from '../src/lib/errors.js';
import { toTimestamp } from '../src/lib/clock.js';
import { requireAgreement } from './agreement.js';
import { splitBackendPath } from './backend.js';
import { planCommit, type CommitDisk } from './commit-plan.js';
import type { RepositoryContext } from './context.js';
import { configDirectory, manifestFile, pointsDirectory } from './layout.js';
import { encodeManifest, readAllManifests, type StoredManifest } from './manifest.js';
import { requireWritable } from './marker.js';
import { requireDraftHeader, requireLeaseOf, type OpenLayer } from './partial-layer.js';
import { Qcow2File } from './qcow2.js';
import { checkImage } from './qemu-img.js';
import { readRemovals } from './removal-record.js';
import type { CommitOptions } from './repository.js';
import { SumsReader } from './sums-reader.js';
import { FORMAT_VERSION, type ManifestDisk, type PointDraft, type PointManifest } from './types.js';

/** Long checks tell that they live this often. */
const HEARTBEAT_MS = 1000;

/**
 * The commit of the design, section 4. Up to the manifest nothing counts: what an interruption leaves
 * is unreferenced. Once the files take their final names a cancel has no effect any more.
 */
export async function commitPoint(
  context: RepositoryContext,
  point: { draft: PointDraft; layers: readonly OpenLayer[] },
  options: CommitOptions,
): Promise<PointManifest> {
  const { draft, layers } = point;
  const { lease } = options;
  const signal = AbortSignal.any([lease.lost, ...(options.signal === undefined ? [] : [options.signal])]);
  requireLeaseOf(lease, draft.vmId);
  await requireWritable(context);
  await lease.verify();
  const stored = await readAllManifests(context, draft.vmId);
  const removals = await readRemovals(context, draft.vmId);
  const disks = await planCommit(draft, layers, stored);

  const entries: ManifestDisk[] = [];
  const report = startReport(options.onProgress, disks.length);
  try {
    for (const disk of disks) {
      throwIfAborted(signal);
      entries.push(await sealLayer(context, disk, signal));
      report.step();
    }
    await options.confirm?.();
    await writeConfig(context, draft, options);
    throwIfAborted(signal);
    await publishLayers(context, draft, { disks, options });
    const taken = [
      0,
      ...stored.map(({ manifest }) => manifest.sequence),
      ...removals.map(({ sequence }) => sequence),
    ];
    const manifest = buildManifest(context, draft, {
      entries,
      sequence: Math.max(...taken) + 1,
      newest: stored.at(-1),
    });
    await publishManifest(context, manifest, options);
    report.finish();
    return manifest;
  } finally {
    report.stop();
  }
}

/** Everything of one disk is on the medium and proven to be what the draft says. */
async function sealLayer(
  context: RepositoryContext,
  disk: CommitDisk,
  signal: AbortSignal,
): Promise<ManifestDisk> {
  const { backend } = context;
  const { layer, draft } = disk;
  const sumsSha256 = await layer.sums.finish();
  await backend.syncFile(layer.partialFile);
  await backend.syncFile(layer.partialSums);
  await requireDraftHeader(layer);
  const { errors } = await checkImage(layer.path, signal);
  if (errors > 0) {
    throw new AppError('LAYER_CORRUPT', 'qemu-img check found errors in a new layer', {
      details: { diskId: layer.diskId, layerId: layer.layerId, errors },
    });
  }
  await using image = await Qcow2File.open(layer.path);
  await using sums = await SumsReader.open(backend.localPath(layer.partialSums));
  await requireAgreement(image, sums, { file: layer.path, signal });
  return { ...draft, layerFileBytes: image.fileBytes, sumsSha256 };
}

async function writeConfig(
  context: RepositoryContext,
  draft: PointDraft,
  options: CommitOptions,
): Promise<void> {
  const files = options.configFiles ?? [];
  if (files.length === 0) return;
  const directory = configDirectory(draft.vmId, draft.pointId);
  await context.backend.makeDirectory(directory);
  for (const { name, content } of files) {
    if (splitBackendPath(name).length !== 1 || name.startsWith('.')) {
      throw new AppError('INVALID_INPUT', 'this is no name for a configuration file', { details: { name } });
    }
    await context.backend.writeDurable(`${directory}/${name}`, content);
  }
}

async function publishLayers(
  context: RepositoryContext,
  draft: PointDraft,
  commit: { disks: readonly CommitDisk[]; options: CommitOptions },
): Promise<void> {
  const { backend } = context;
  await requireWritable(context);
  await commit.options.lease.verify();
  for (const { layer } of commit.disks) {
    layer.committingPointId = draft.pointId;
    await backend.setReadOnly(layer.partialFile);
    await backend.setReadOnly(layer.partialSums);
    await backend.rename(layer.partialSums, layer.finalSums);
    await backend.rename(layer.partialFile, layer.finalFile);
  }
  for (const { layer } of commit.disks) await backend.syncDirectory(layer.directory);
}

function buildManifest(
  context: RepositoryContext,
  draft: PointDraft,
  facts: { entries: ManifestDisk[]; sequence: number; newest: StoredManifest | undefined },
): PointManifest {
  const { newest, entries, sequence } = facts;
  return {
    formatVersion: FORMAT_VERSION,
    repositoryId: context.marker.repositoryId,
    pointId: draft.pointId,
    vmId: draft.vmId,
    vmName: draft.vmName,
    runId: draft.runId,
    sequence,
    type: entries.every((disk) => disk.method === 'full') ? 'full' : 'incremental',
    capturedAt: draft.capturedAt,
    committedAt: toTimestamp(context.clock.nowMs()),
    consistency: draft.consistency,
    hash: context.marker.hash,
    previous: newest === undefined ? null : { pointId: newest.manifest.pointId, sha256: newest.sha256 },
    disks: entries,
  };
}

async function publishManifest(
  context: RepositoryContext,
  manifest: PointManifest,
  options: CommitOptions,
): Promise<void> {
  await context.backend.makeDirectory(pointsDirectory(manifest.vmId));
  const file = manifestFile(manifest.vmId, manifest.pointId);
  await requireWritable(context);
  await options.lease.verify();
  if (await context.backend.createExclusive(file, encodeManifest(manifest), { mode: 0o440 })) return;
  throw new AppError('CONFLICT', 'the recovery point exists already', {
    details: { pointId: manifest.pointId },
  });
}

interface CommitReport {
  step(): void;
  finish(): void;
  stop(): void;
}

/** Shares of a commit: each disk counts the same, the manifest comes last. Repeats the last share while a check runs. */
function startReport(onProgress: ((share: number) => void) | undefined, diskCount: number): CommitReport {
  let share = 0;
  const tell = (): void => {
    onProgress?.(share);
  };
  const timer = setInterval(tell, HEARTBEAT_MS);
  return {
    step: () => {
      share = Math.min(0.95, share + 0.95 / diskCount);
      tell();
    },
    finish: () => {
      share = 1;
      tell();
    },
    stop: () => {
      clearInterval(timer);
    },
  };
}
