import { createHash, type Hash } from 'node:crypto';
import { throwIfAborted } from '../src/lib/deadline.js';
import { AppError } from '../src/lib/errors.js';
import { COPY_OP, openCopySession, type CopySession } from '../src/nbd/index.js';
import type { RepositoryContext } from './context.js';
import { requireDraftHeader, type OpenLayer } from './partial-layer.js';
import { CLUSTER_UNALLOCATED, CLUSTER_ZERO, Qcow2File } from './qcow2.js';
import { qcow2Problem } from './qcow2-header.js';
import { requireClosed } from './qemu-img.js';
import type { HashLayerOptions, LayerHash } from './repository.js';
import { entryBytesOf, entryIsZero } from './sums-format.js';

/** 128 MiB of disk in one window; two are outstanding, so that the reader never waits for the planner. */
const WINDOW_CLUSTERS = 2048;
const STALL_TIMEOUT_MS = 300_000;

interface HashRun {
  layer: OpenLayer;
  image: Qcow2File;
  session: CopySession;
  digest: Hash;
  entryBytes: number;
  options: HashLayerOptions;
}

/** Reads back the own clusters of a layer that somebody else wrote, and fills its sums. */
export async function hashLayer(
  context: RepositoryContext,
  layer: OpenLayer,
  options: HashLayerOptions,
): Promise<LayerHash> {
  if (layer.sums.entryCount > 0) throw new AppError('INTERNAL', 'the layer has sums already');
  await requireClosed(layer.path, options.signal);
  await requireDraftHeader(layer);
  const { hash, clusterBytes } = context.marker;
  await using image = await Qcow2File.open(layer.path);
  await requireZeroTail(layer, image);
  await using session = await openCopySession(
    {
      source: { kind: 'files', paths: [layer.path] },
      sink: { kind: 'null' },
      diskBytes: layer.sizeBytes,
      hash,
      clusterBytes,
      connectTimeoutMs: STALL_TIMEOUT_MS,
      stallTimeoutMs: STALL_TIMEOUT_MS,
    },
    { signal: options.signal },
  );
  const digest = createHash('sha256');
  await hashWindows({ layer, image, session, digest, entryBytes: entryBytesOf(hash), options });
  return { digest: digest.digest('hex') };
}

/** QCOW2 holds whole sectors, an agent may have written to the end of the last one; what lies behind the disk is zero. */
async function requireZeroTail(layer: OpenLayer, image: Qcow2File): Promise<void> {
  const { clusterBytes } = image.header;
  const used = layer.sizeBytes % clusterBytes;
  if (used === 0) return;
  const { hostOffsets } = await image.window(image.clusterCount - 1, 1);
  const [hostOffset = 0] = hostOffsets;
  if (hostOffset === 0) return;
  const tail = await image.readBytes(hostOffset + used, clusterBytes - used);
  if (tail.every((byte) => byte === 0)) return;
  throw qcow2Problem(layer.path, 'bytes beyond the end of its disk are not zero', {
    diskId: layer.diskId,
    layerId: layer.layerId,
    offset: layer.sizeBytes,
  });
}

async function hashWindows(run: HashRun): Promise<void> {
  const { image, options } = run;
  const total = image.clusterCount;
  let outstanding: Promise<void> = Promise.resolve();
  for (let at = image.nextPossible(0, total); at < total; at = image.nextPossible(at, total)) {
    throwIfAborted(options.signal);
    const count = Math.min(WINDOW_CLUSTERS, total - at);
    const submitted = submitWindow(run, await planWindow(run, at, count), outstanding);
    // Settled below in order; a failure meanwhile must not count as unhandled.
    submitted.catch(() => undefined);
    await outstanding;
    options.onProgress?.(at / total);
    outstanding = submitted;
    at += count;
  }
  await outstanding;
  options.onProgress?.(1);
}

/** One row for each own cluster; the copy engine joins those that follow each other in disk and file. */
async function planWindow({ image, layer }: HashRun, start: number, count: number): Promise<Float64Array> {
  const { clusterBytes } = image.header;
  const { kinds, hostOffsets } = await image.window(start, count);
  const rows: number[] = [];
  for (let i = 0; i < count; i += 1) {
    if (kinds[i] === CLUSTER_UNALLOCATED) continue;
    const offset = (start + i) * clusterBytes;
    const length = Math.min(clusterBytes, layer.sizeBytes - offset);
    const op = kinds[i] === CLUSTER_ZERO ? COPY_OP.zero : COPY_OP.copy;
    rows.push(offset, length, op, 0, hostOffsets[i] ?? 0);
  }
  return Float64Array.from(rows);
}

/** Entries go into the sums in the order of the windows. */
async function submitWindow(run: HashRun, rows: Float64Array, before: Promise<void>): Promise<void> {
  if (rows.length === 0) return before;
  const { entries } = await run.session.submit({ rows, zeroPolicy: 'write', emitEntries: true });
  await before;
  await run.layer.sums.append(entries);
  addToDigest(run, entries);
}

/** A full leaves zeroes out by itself; where they were written all the same, they say nothing more. */
function addToDigest({ digest, layer, entryBytes }: HashRun, entries: Buffer): void {
  if (layer.parentLayerId !== null) {
    digest.update(entries);
    return;
  }
  for (let at = 0; at < entries.length; at += entryBytes) {
    if (!entryIsZero(entries, at)) digest.update(entries.subarray(at, at + entryBytes));
  }
}
