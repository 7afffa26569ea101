import { CleanupStack } from '../src/lib/cleanup.js';
import { EXPECT_HASH, EXPECT_ZERO } from '../src/nbd/index.js';
import { MARK_HASH, MARK_ZERO } from './agreement.js';
import { ENTRY_INDEX_BYTES, entryIndex, entryIsZero, hashBytesOf } from './sums-format.js';
import type { SumsReader } from './sums-reader.js';
import { openVerifiedSums } from './verified-sums.js';
import type { BackingChain } from './types.js';

/** No layer of the chain has the cluster: it reads as zero. */
export const LAYER_ABSENT = 0xffff;
export const MAX_CHAIN_LAYERS = LAYER_ABSENT;

/** Which layer supplies each cluster of a window. */
export interface ComposedWindow {
  startCluster: number;
  clusterCount: number;
  /** Index into the chain (0 is the top), or LAYER_ABSENT. */
  layers: Uint16Array;
  /** EXPECT_HASH or EXPECT_ZERO for each cluster, as a copy session expects it; what no layer has reads as zero. */
  kinds: Uint8Array;
  /** One hash for each cluster, in order; meaningless unless the kind is EXPECT_HASH. */
  hashes: Buffer;
}

export function emptyWindow(startCluster: number, clusterCount: number, hashBytes: number): ComposedWindow {
  return {
    startCluster,
    clusterCount,
    layers: new Uint16Array(clusterCount).fill(LAYER_ABSENT),
    kinds: new Uint8Array(clusterCount).fill(EXPECT_ZERO),
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
  const { startCluster, clusterCount, layers, kinds, hashes } = window;
  const hashBytes = hashBytesOf(sums.header.hash);
  const own = new Uint8Array(clusterCount);
  for await (const { data, entryBytes } of sums.window(startCluster, clusterCount)) {
    for (let offset = 0; offset < data.length; offset += entryBytes) {
      const slot = entryIndex(data, offset) - startCluster;
      const mark = entryIsZero(data, offset) ? MARK_ZERO : MARK_HASH;
      own[slot] = mark;
      if (layers[slot] !== LAYER_ABSENT) continue;
      layers[slot] = layerIndex;
      kinds[slot] = mark === MARK_HASH ? EXPECT_HASH : EXPECT_ZERO;
      if (mark === MARK_HASH)
        data.copy(hashes, slot * hashBytes, offset + ENTRY_INDEX_BYTES, offset + entryBytes);
    }
  }
  return own;
}

/**
 * The sums of a chain, verified against their manifests: what every cluster of the disk holds, known
 * without reading data. For compare runs. The caller disposes it.
 */
export async function openComposedSums(
  chain: BackingChain,
  options: { signal?: AbortSignal | undefined } = {},
): Promise<ComposedSums> {
  await using undo = new CleanupStack();
  const sums: SumsReader[] = [];
  for (const layer of chain.layers) sums.push(undo.use(await openVerifiedSums(layer, options.signal)));
  undo.release();
  return new ComposedSums(sums);
}

/**
 * The sums of a whole chain, top first, as one. Windows in ascending order stream the files; one call at
 * a time. Disposing it closes the readers. A cluster at the end of a smaller layer carries the hash of
 * that layer's part of it: a longer cluster never equals it, so a compare stores it anew.
 */
export class ComposedSums implements AsyncDisposable {
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

  async [Symbol.asyncDispose](): Promise<void> {
    const undo = new CleanupStack();
    for (const sums of this.#sums) undo.use(sums);
    await undo.run();
  }
}
