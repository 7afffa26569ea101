import { MARK_HASH, MARK_ZERO } from './agreement.js';
import { ENTRY_INDEX_BYTES, entryIndex, entryIsZero, hashBytesOf } from './sums-format.js';
import type { SumsReader } from './sums-reader.js';

/** No layer of the chain has the cluster: it reads as zero. */
export const LAYER_ABSENT = 0xffff;
export const MAX_CHAIN_LAYERS = LAYER_ABSENT;

/** Which layer supplies each cluster of a window. */
export interface ComposedWindow {
  startCluster: number;
  clusterCount: number;
  /** Index into the chain (0 is the top), or LAYER_ABSENT. */
  layers: Uint16Array;
  /** MARK_HASH, MARK_ZERO, or 0 where absent. */
  marks: Uint8Array;
  /** One hash for each cluster, in order; meaningless unless the mark is MARK_HASH. */
  hashes: Buffer;
}

export function emptyWindow(startCluster: number, clusterCount: number, hashBytes: number): ComposedWindow {
  return {
    startCluster,
    clusterCount,
    layers: new Uint16Array(clusterCount).fill(LAYER_ABSENT),
    marks: new Uint8Array(clusterCount),
    hashes: Buffer.allocUnsafe(clusterCount * hashBytes),
  };
}

/**
 * Lays one layer under what is already in the window: a cluster that a layer above has is not touched.
 * Answers the marks of this layer alone.
 */
export async function composeLayer(
  window: ComposedWindow,
  sums: SumsReader,
  layerIndex: number,
): Promise<Uint8Array> {
  const { startCluster, clusterCount, layers, marks, hashes } = window;
  const hashBytes = hashBytesOf(sums.header.hash);
  const own = new Uint8Array(clusterCount);
  for await (const { data, entryBytes } of sums.window(startCluster, clusterCount)) {
    for (let offset = 0; offset < data.length; offset += entryBytes) {
      const slot = entryIndex(data, offset) - startCluster;
      const mark = entryIsZero(data, offset) ? MARK_ZERO : MARK_HASH;
      own[slot] = mark;
      if (layers[slot] !== LAYER_ABSENT) continue;
      layers[slot] = layerIndex;
      marks[slot] = mark;
      if (mark === MARK_HASH)
        data.copy(hashes, slot * hashBytes, offset + ENTRY_INDEX_BYTES, offset + entryBytes);
    }
  }
  return own;
}

/** The sums of a whole chain, top first, as one. Windows in ascending order stream the files. */
export class ComposedSums {
  readonly #sums: readonly SumsReader[];
  readonly #hashBytes: number;

  constructor(sums: readonly SumsReader[]) {
    this.#sums = sums;
    this.#hashBytes = sums[0] === undefined ? 0 : hashBytesOf(sums[0].header.hash);
  }

  async window(startCluster: number, clusterCount: number): Promise<ComposedWindow> {
    const window = emptyWindow(startCluster, clusterCount, this.#hashBytes);
    for (const [index, sums] of this.#sums.entries()) await composeLayer(window, sums, index);
    return window;
  }

  /** The first cluster at or after `cluster` that any layer has; Infinity when none. */
  async nextCluster(cluster: number): Promise<number> {
    let next = Infinity;
    for (const sums of this.#sums) next = Math.min(next, await sums.nextCluster(cluster));
    return next;
  }
}
