import { throwIfAborted } from '../src/lib/deadline.js';
import type { AppError } from '../src/lib/errors.js';
import { CLUSTER_DATA, CLUSTER_UNALLOCATED, CLUSTER_ZERO, type Qcow2File } from './qcow2.js';
import { qcow2Problem } from './qcow2-header.js';
import { entryIndex, entryIsZero } from './sums-format.js';
import type { SumsReader } from './sums-reader.js';

/** What the sums of one layer know about a cluster. */
export const MARK_NONE = 0;
export const MARK_HASH = 1;
export const MARK_ZERO = 2;

const WINDOW_CLUSTERS = 8192;

/**
 * True when a layer file and its sums agree on one cluster: no entry, no cluster; a hash needs data;
 * zero may be a ZERO cluster or data (QEMU stores zeroes that do not fill whole sectors of the disk's end as data).
 */
export function agrees(kind: number | undefined, mark: number | undefined): boolean {
  if (mark === MARK_NONE) return kind === CLUSTER_UNALLOCATED;
  if (mark === MARK_HASH) return kind === CLUSTER_DATA;
  return kind === CLUSTER_ZERO || kind === CLUSTER_DATA;
}

/** LAYER_CORRUPT naming layer file and disk offset of a cluster on which file and sums differ. */
export function disagreement(file: string, offset: number): AppError {
  return qcow2Problem(file, 'its clusters are not those its sums file lists', { offset });
}

/** Marks the clusters of a window that the sums have entries for. */
export async function markWindow(
  sums: SumsReader,
  startCluster: number,
  clusterCount: number,
): Promise<Uint8Array> {
  const marks = new Uint8Array(clusterCount);
  for await (const { data, entryBytes } of sums.window(startCluster, clusterCount)) {
    for (let offset = 0; offset < data.length; offset += entryBytes) {
      marks[entryIndex(data, offset) - startCluster] = entryIsZero(data, offset) ? MARK_ZERO : MARK_HASH;
    }
  }
  return marks;
}

/** Rejects with LAYER_CORRUPT unless exactly the allocated clusters of the layer have entries. Sparse regions cost nothing. */
export async function requireAgreement(
  layer: Qcow2File,
  sums: SumsReader,
  options: { file: string; signal?: AbortSignal | undefined },
): Promise<void> {
  const total = layer.clusterCount;
  let at = 0;
  while (at < total) {
    throwIfAborted(options.signal);
    at = Math.min(layer.nextPossible(at, total), await sums.nextCluster(at));
    if (at >= total) return;
    const count = Math.min(WINDOW_CLUSTERS, total - at);
    const { kinds } = await layer.window(at, count);
    const marks = await markWindow(sums, at, count);
    for (let i = 0; i < count; i += 1) {
      if (!agrees(kinds[i], marks[i])) throw disagreement(options.file, (at + i) * layer.header.clusterBytes);
    }
    at += count;
  }
}
