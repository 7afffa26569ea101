import type { ClusterMap } from './extents.js';
import { COPY_OP, EXPECT_HASH, EXPECT_ZERO, type CopyWindow } from './index.js';

/** How a disk is captured: all of it, what a bitmap calls dirty, or what differs from the last point. */
export type PlanMethod = 'full' | 'bitmap' | 'compare';

/** What the chain holds of consecutive clusters, for a compare run. */
export interface KnownClusters {
  /** EXPECT_HASH or EXPECT_ZERO for each cluster (what no layer has reads as zero). */
  kinds: Uint8Array;
  /** Hashes, one after the other, of fixed width; ignored for zero clusters. */
  hashes: Buffer;
}

export interface PlannedWindow {
  /** Rows of native `CopyWindow`. */
  rows: Float64Array;
  expect: Buffer | undefined;
  /** Bytes of the disk this window decides about: copied, zeroed or compared. */
  plannedBytes: number;
  /** Of these, the bytes that will be copied, or compared and perhaps copied; the others cost no room. */
  copyBytes: number;
}

const SKIP = 255;

/**
 * Turns what is known of a stretch of the disk into rows for the copy engine (DESIGN.md, section 4):
 *
 *             known zero            anything else
 *   full      leave unallocated     copy
 *   bitmap    dirty: write zeroes   dirty: copy          clean: leave unallocated
 *   compare   chain zero: leave     copy if it differs
 *             else: write zeroes
 */
export function planWindow(
  method: PlanMethod,
  map: ClusterMap,
  options: { clusterBytes: number; hashBytes: number; known?: KnownClusters },
): PlannedWindow {
  const { clusterBytes, hashBytes, known } = options;
  const decide = (index: number): number => {
    if (map.isDirty[index] !== 1) return SKIP;
    if (map.isZero[index] !== 1) return COPY_OP.copy;
    if (method === 'full') return SKIP;
    if (method === 'compare' && known?.kinds[index] === EXPECT_ZERO) return SKIP;
    return COPY_OP.zero;
  };
  const rows: number[] = [];
  const copied: number[] = [];
  let plannedBytes = 0;
  let copyBytes = 0;
  const clusters = map.isZero.length;
  for (let start = nextCandidate(method, map, 0); start < clusters;) {
    const op = decide(start);
    let stop = start + 1;
    while (stop < clusters && decide(stop) === op) stop += 1;
    if (op !== SKIP) {
      const offset = map.offset + start * clusterBytes;
      const length = Math.min(map.offset + stop * clusterBytes, map.end) - offset;
      rows.push(offset, length, op, 0, 0);
      plannedBytes += length;
      if (op === COPY_OP.copy) copyBytes += length;
      if (known !== undefined && op === COPY_OP.copy) for (let i = start; i < stop; i += 1) copied.push(i);
    }
    start = nextCandidate(method, map, stop);
  }
  return {
    rows: Float64Array.from(rows),
    expect: known === undefined ? undefined : packExpected(copied, known, hashBytes),
    plannedBytes,
    copyBytes,
  };
}

/** A planned window for the copy engine: what is read and found zero is left out of a full and written as zeroes otherwise. */
export function captureWindow(method: PlanMethod, planned: PlannedWindow): CopyWindow {
  return {
    rows: planned.rows,
    zeroPolicy: method === 'full' ? 'skip' : 'write',
    emitEntries: true,
    ...(planned.expect === undefined ? {} : { expectPolicy: 'compare', expect: planned.expect }),
  };
}

/** Jumps over what needs no decision, so that a huge sparse disk costs little more than a memchr. */
function nextCandidate(method: PlanMethod, map: ClusterMap, from: number): number {
  const found = method === 'full' ? map.isZero.indexOf(0, from) : map.isDirty.indexOf(1, from);
  return found === -1 ? map.isZero.length : found;
}

function packExpected(clusters: number[], known: KnownClusters, hashBytes: number): Buffer {
  const stride = 1 + hashBytes;
  const packed = Buffer.alloc(clusters.length * stride);
  clusters.forEach((cluster, position) => {
    const kind = known.kinds[cluster] ?? EXPECT_ZERO;
    packed.writeUInt8(kind, position * stride);
    if (kind === EXPECT_HASH) {
      known.hashes.copy(packed, position * stride + 1, cluster * hashBytes, (cluster + 1) * hashBytes);
    }
  });
  return packed;
}

/** Marks every cluster from `fromByte` on as dirty: a record of changes knows nothing of what a disk grew by. */
export function markGrown(map: ClusterMap, fromByte: number, clusterBytes: number): void {
  if (map.end <= fromByte) return;
  const first = Math.max(0, Math.floor((fromByte - map.offset) / clusterBytes));
  map.isDirty.fill(1, first);
}
