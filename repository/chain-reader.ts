import { throwIfAborted } from '../src/lib/deadline.js';
import { AppError } from '../src/lib/errors.js';
import { CleanupStack } from '../src/lib/cleanup.js';
import { EXPECT_HASH, EXPECT_UNKNOWN, EXPECT_ZERO, type HashAlgorithm } from '../src/nbd/index.js';
import { agrees, disagreement } from './agreement.js';
import {
  ComposedSums,
  LAYER_ABSENT,
  MAX_CHAIN_LAYERS,
  composeLayer,
  emptyWindow,
  type ComposedWindow,
} from './composed-sums.js';
import { PlanRows } from './plan-rows.js';
import { CLUSTER_DATA, Qcow2File } from './qcow2.js';
import { qcow2Problem } from './qcow2-header.js';
import { hashBytesOf } from './sums-format.js';
import type { SumsReader } from './sums-reader.js';
import { openVerifiedSums } from './verified-sums.js';
import type { BackingChain, ChainLayer } from './types.js';

/**
 * The cluster at the end of a layer whose disk was smaller than the chain's: its hash covers only the
 * bytes up to `layerBytes`, so it is verified apart, by a session over that file with that disk size.
 */
export interface ShortCluster {
  cluster: number;
  fileIndex: number;
  fileOffset: number;
  /** Exact disk size of the layer. */
  layerBytes: number;
  hash: Buffer;
}

/** A part of the disk: what a copy session over the chain's files needs to read and verify it. */
export interface ChainWindow {
  startCluster: number;
  clusterCount: number;
  /** Rows of a `CopyWindow` for a `files` source with `ChainReader.paths`. */
  rows: Float64Array;
  /** Expected hashes of the rows' clusters. */
  expect: Buffer;
  /** What reads as zero and has no row: [offset, length] × n, ascending, disjoint. */
  zeroRanges: Float64Array;
  copyBytes: number;
  zeroBytes: number;
  shortClusters: ShortCluster[];
}

/** Reads the plan of one disk's chain. One call at a time. Whoever opened it closes it. */
export interface ChainReader extends AsyncDisposable {
  /** Layer files, top first; rows name them by index. */
  readonly paths: string[];
  readonly diskBytes: number;
  readonly clusterBytes: number;
  readonly clusterCount: number;
  readonly hash: HashAlgorithm;
  /** No more than this has rows: all layers' data together, at most the disk. */
  readonly maxCopyBytes: number;
  /** Any window; ascending order is fast. LAYER_CORRUPT where a layer file and its sums differ. */
  window(startCluster: number, clusterCount: number): Promise<ChainWindow>;
  /** The window after the last one, or undefined at the end. A region no layer has comes as one window however large it is. */
  next(windowClusters: number): Promise<ChainWindow | undefined>;
}

interface OpenLayerFiles {
  layer: ChainLayer;
  image: Qcow2File;
  sums: SumsReader;
}

/** Opens every layer with its sums, whose digests are verified first. LAYER_NOT_FOUND, LAYER_CORRUPT. */
export async function openChainReader(
  chain: BackingChain,
  options: { signal?: AbortSignal | undefined } = {},
): Promise<ChainReader> {
  if (chain.layers.length > MAX_CHAIN_LAYERS) {
    throw new AppError('CHAIN_BROKEN', 'the backing chain has too many layers', {
      details: { layers: chain.layers.length },
    });
  }
  await using undo = new CleanupStack();
  const files: OpenLayerFiles[] = [];
  for (const layer of chain.layers) {
    throwIfAborted(options.signal);
    const image = undo.use(await Qcow2File.open(layer.path));
    const sums = undo.use(await openVerifiedSums(layer, options.signal));
    requireSameForm(files[0], { layer, image, sums });
    files.push({ layer, image, sums });
  }
  const reader = new OpenChainReader(chain, files);
  undo.release();
  return reader;
}

function requireSameForm(top: OpenLayerFiles | undefined, files: OpenLayerFiles): void {
  const { header } = files.sums;
  const isSame = top === undefined || top.sums.header.hash === header.hash;
  if (isSame && header.clusterBytes === files.image.header.clusterBytes && header.clusterBytes === 65536)
    return;
  throw qcow2Problem(files.layer.path, 'its cluster size or hash is not that of the chain', {
    layerId: files.layer.layerId,
  });
}

class OpenChainReader implements ChainReader {
  readonly paths: string[];
  readonly diskBytes: number;
  readonly clusterBytes: number;
  readonly clusterCount: number;
  readonly hash: HashAlgorithm;
  readonly maxCopyBytes: number;
  readonly #chain: BackingChain;
  readonly #files: readonly OpenLayerFiles[];
  readonly #composed: ComposedSums;
  #position = 0;
  #closing: Promise<void> | undefined;

  constructor(chain: BackingChain, files: readonly OpenLayerFiles[]) {
    const [top] = files;
    if (top === undefined) throw new AppError('CHAIN_BROKEN', 'the backing chain has no layer');
    this.#chain = chain;
    this.#files = files;
    this.#composed = new ComposedSums(files.map(({ sums }) => sums));
    this.paths = files.map(({ layer }) => layer.path);
    this.diskBytes = top.layer.sizeBytes;
    this.clusterBytes = top.sums.header.clusterBytes;
    this.clusterCount = Math.ceil(this.diskBytes / this.clusterBytes);
    this.hash = top.sums.header.hash;
    const entries = files.reduce((sum, { sums }) => sum + sums.entryCount, 0);
    this.maxCopyBytes = Math.min(this.diskBytes, entries * this.clusterBytes);
  }

  async next(windowClusters: number): Promise<ChainWindow | undefined> {
    const start = this.#position;
    if (start >= this.clusterCount) return undefined;
    const used = Math.min(this.clusterCount, await this.#composed.nextCluster(start));
    if (used - start < windowClusters) {
      const count = Math.min(windowClusters, this.clusterCount - start);
      this.#position = start + count;
      return this.window(start, count);
    }
    await this.#requireUnallocated(start, used);
    this.#position = used;
    return this.#emptyRegion(start, used);
  }

  async window(startCluster: number, clusterCount: number): Promise<ChainWindow> {
    if (startCluster < 0 || clusterCount <= 0 || startCluster + clusterCount > this.clusterCount) {
      throw new AppError('INVALID_INPUT', 'the window lies outside the disk', {
        details: { startCluster, clusterCount },
      });
    }
    const composed = emptyWindow(startCluster, clusterCount, hashBytesOf(this.hash));
    const hostOffsets = new Float64Array(clusterCount);
    for (const [index, files] of this.#files.entries()) {
      await this.#layLayer(files, { composed, hostOffsets, index });
    }
    return this.#plan(composed, hostOffsets);
  }

  [Symbol.asyncDispose](): Promise<void> {
    return (this.#closing ??= this.#close());
  }

  async #close(): Promise<void> {
    const undo = new CleanupStack();
    for (const { image, sums } of this.#files) {
      undo.use(image);
      undo.use(sums);
    }
    await undo.run();
  }

  /** Adds one layer to the window, holding the file's own allocation against its sums. */
  async #layLayer(
    files: OpenLayerFiles,
    into: { composed: ComposedWindow; hostOffsets: Float64Array; index: number },
  ): Promise<void> {
    const { composed, hostOffsets, index } = into;
    const { startCluster, clusterCount, layers } = composed;
    const own = await composeLayer(composed, files.sums, index);
    const { kinds, hostOffsets: ownOffsets } = await files.image.window(startCluster, clusterCount);
    for (let i = 0; i < clusterCount; i += 1) {
      if (!agrees(kinds[i], own[i])) throw this.#disagreement(files, startCluster + i);
      if (layers[i] === index && kinds[i] === CLUSTER_DATA) hostOffsets[i] = ownOffsets[i] ?? 0;
    }
  }

  async #plan(composed: ComposedWindow, hostOffsets: Float64Array): Promise<ChainWindow> {
    const { startCluster, clusterCount, layers, kinds, hashes } = composed;
    const hashBytes = hashBytesOf(this.hash);
    const facts = { clusterBytes: this.clusterBytes, diskBytes: this.diskBytes, hashBytes };
    const rows = new PlanRows({ ...facts, maxClusters: clusterCount });
    const zeroRanges: number[] = [];
    const shortClusters: ShortCluster[] = [];
    let zeroBytes = 0;
    for (let i = 0; i < clusterCount; i += 1) {
      const cluster = startCluster + i;
      const fileOffset = hostOffsets[i] ?? 0;
      if (fileOffset === 0) {
        zeroBytes += this.#addZero(zeroRanges, cluster);
        continue;
      }
      const fileIndex = layers[i] ?? LAYER_ABSENT;
      const place = {
        cluster,
        fileIndex,
        fileOffset,
        kind: kinds[i] ?? EXPECT_UNKNOWN,
      };
      const layerBytes = this.#files[fileIndex]?.layer.sizeBytes ?? 0;
      if (this.#isShort(cluster, layerBytes)) {
        await this.#requireZeroTail(place, layerBytes);
        const hash = Buffer.from(hashes.subarray(i * hashBytes, (i + 1) * hashBytes));
        if (place.kind === EXPECT_HASH)
          shortClusters.push({ cluster, fileIndex, fileOffset, layerBytes, hash });
        place.kind = place.kind === EXPECT_HASH ? EXPECT_UNKNOWN : EXPECT_ZERO;
      }
      rows.addCluster(place, hashes, i * hashBytes);
    }
    return {
      startCluster,
      clusterCount,
      rows: rows.rows(),
      expect: rows.expect(),
      zeroRanges: Float64Array.from(zeroRanges),
      copyBytes: rows.copyBytes,
      zeroBytes,
      shortClusters,
    };
  }

  /** The layer's disk ended inside this cluster and the chain's disk goes on after that end. */
  #isShort(cluster: number, layerBytes: number): boolean {
    const end = Math.min((cluster + 1) * this.clusterBytes, this.diskBytes);
    return layerBytes < end;
  }

  /** QEMU reads zeroes beyond the end of a smaller backing file; the plan reads the file's bytes, so they must be zero. */
  async #requireZeroTail(
    place: { cluster: number; fileIndex: number; fileOffset: number },
    layerBytes: number,
  ): Promise<void> {
    const files = this.#files[place.fileIndex];
    if (files === undefined) return;
    const used = layerBytes - place.cluster * this.clusterBytes;
    const tail = await files.image.readBytes(place.fileOffset + used, this.clusterBytes - used);
    if (tail.every((byte) => byte === 0)) return;
    throw qcow2Problem(files.layer.path, 'bytes beyond the end of its disk are not zero', {
      diskId: this.#chain.diskId,
      layerId: files.layer.layerId,
      offset: layerBytes,
    });
  }

  #addZero(ranges: number[], cluster: number): number {
    const offset = cluster * this.clusterBytes;
    const length = Math.min(this.clusterBytes, this.diskBytes - offset);
    const last = ranges.length - 2;
    if (last >= 0 && (ranges[last] ?? 0) + (ranges[last + 1] ?? 0) === offset) {
      ranges[last + 1] = (ranges[last + 1] ?? 0) + length;
    } else {
      ranges.push(offset, length);
    }
    return length;
  }

  async #requireUnallocated(start: number, end: number): Promise<void> {
    for (const files of this.#files) {
      const found = await files.image.firstAllocated(start, Math.min(end, files.image.clusterCount));
      if (found !== undefined) throw this.#disagreement(files, found);
    }
  }

  #disagreement(files: OpenLayerFiles, cluster: number): AppError {
    const error = disagreement(files.layer.path, cluster * this.clusterBytes);
    return new AppError(error.code, error.message, {
      details: { ...error.details, diskId: this.#chain.diskId, layerId: files.layer.layerId },
    });
  }

  #emptyRegion(start: number, end: number): ChainWindow {
    const offset = start * this.clusterBytes;
    const length = Math.min(end * this.clusterBytes, this.diskBytes) - offset;
    return {
      startCluster: start,
      clusterCount: end - start,
      rows: new Float64Array(0),
      expect: Buffer.alloc(0),
      zeroRanges: Float64Array.of(offset, length),
      copyBytes: 0,
      zeroBytes: length,
      shortClusters: [],
    };
  }
}
