import { AppError } from '../lib/errors.js';
import { alignDown } from '../lib/units.js';
import type { BlockStatus } from './index.js';

export const BASE_ALLOCATION = 'base:allocation';
export const DIRTY_BITMAP_PREFIX = 'qemu:dirty-bitmap:';

/** Bits of `base:allocation` (NBD protocol, "base metadata context") and of `qemu:dirty-bitmap` (qemu docs/interop/nbd.txt). */
const STATE_ZERO = 2;
const STATE_DIRTY = 1;

/** What is known of each cluster of a stretch of the disk. */
export interface ClusterMap {
  offset: number;
  /** End of the stretch: cluster-aligned, or the end of the disk. */
  end: number;
  /** 1 where the cluster is known to read as zeroes throughout. All 0 when the server says nothing. */
  isZero: Uint8Array;
  /** 1 where any byte of the cluster is dirty. All 1 without a dirty context. */
  isDirty: Uint8Array;
}

export interface ClusterMapOptions {
  /** Exact size of the disk. */
  diskBytes: number;
  clusterBytes: number;
  /** Context whose dirty bit counts, null to treat everything as dirty. */
  dirtyContext: string | null;
  /** The contexts the server granted; block status is not asked when there are none. */
  grantedContexts: readonly string[];
  /** Upper bound of one stretch. */
  windowBytes: number;
  /** Where to begin, cluster-aligned; default 0. */
  fromBytes?: number;
}

export type AskBlockStatus = (offset: number, length: number) => Promise<BlockStatus>;

/**
 * Walks the disk in bounded stretches and says of each cluster what the source knows.
 *
 *     asked     |----------------------------------|
 *     base      |--data--|------zero------|             ends early: legal
 *     dirty     |-----------clean-----------------------------|   ends late: legal
 *     used      |-------------------------|             the shortest, cut to whole clusters
 *
 * Only the ZERO flag makes a cluster zero, and only when it covers the whole cluster; HOLE alone says
 * nothing about content. A cluster is dirty when any byte of it is. An answer without progress is a
 * protocol error, never a loop.
 */
export async function* walkClusters(
  ask: AskBlockStatus,
  options: ClusterMapOptions,
): AsyncGenerator<ClusterMap> {
  const { diskBytes, clusterBytes, dirtyContext, grantedContexts } = options;
  if (dirtyContext !== null && !grantedContexts.includes(dirtyContext)) {
    throw new AppError('BITMAP_MISSING', `the server does not offer ${dirtyContext}`);
  }
  const contexts = [BASE_ALLOCATION, ...(dirtyContext === null ? [] : [dirtyContext])].filter((name) =>
    grantedContexts.includes(name),
  );
  for (let offset = options.fromBytes ?? 0; offset < diskBytes;) {
    const wanted = Math.min(options.windowBytes, diskBytes - offset);
    if (contexts.length === 0) {
      yield emptyMap(offset, offset + wanted, clusterBytes);
      offset += wanted;
      continue;
    }
    const status = await askWholeCluster(ask, { offset, wanted, clusterBytes, contexts });
    const known = offset + Math.min(status.covered, wanted);
    const end = known >= diskBytes ? diskBytes : alignDown(known, clusterBytes);
    const map = emptyMap(offset, end, clusterBytes);
    const base = status.byContext.get(BASE_ALLOCATION);
    if (base !== undefined) markZero(map, base, clusterBytes);
    const dirty = dirtyContext === null ? undefined : status.byContext.get(dirtyContext);
    if (dirty !== undefined) markDirty(map, dirty, clusterBytes);
    yield map;
    offset = end;
  }
}

/** Everything dirty, nothing known to be zero. */
function emptyMap(offset: number, end: number, clusterBytes: number): ClusterMap {
  const clusters = Math.ceil((end - offset) / clusterBytes);
  return { offset, end, isZero: new Uint8Array(clusters), isDirty: new Uint8Array(clusters).fill(1) };
}

/** [length, flags] pairs from one offset on, possibly of several answers. */
type Extents = Float64Array[];

interface WindowStatus {
  covered: number;
  byContext: Map<string, Extents>;
}

/**
 * Asks until every context covers at least one whole cluster (or the wanted length): a server may
 * answer with extents as small as it likes.
 */
async function askWholeCluster(
  ask: AskBlockStatus,
  request: { offset: number; wanted: number; clusterBytes: number; contexts: readonly string[] },
): Promise<WindowStatus> {
  const { offset, wanted, contexts } = request;
  const enough = Math.min(request.clusterBytes, wanted);
  const byContext = new Map<string, Extents>(contexts.map((name) => [name, []]));
  let covered = 0;
  while (covered < enough) {
    const answer = await ask(offset + covered, wanted - covered);
    let shortest = Infinity;
    for (const name of contexts) {
      const extents = answer[name];
      if (extents === undefined) {
        throw new AppError('NBD_PROTOCOL', `the server left ${name} out of a block-status answer`);
      }
      shortest = Math.min(shortest, totalLength(extents));
    }
    if (shortest <= 0) {
      throw new AppError('NBD_PROTOCOL', 'the server answered block status with nothing');
    }
    for (const name of contexts) byContext.get(name)?.push(clip(answer[name], shortest));
    covered += shortest;
  }
  return { covered, byContext };
}

function totalLength(extents: Float64Array): number {
  let total = 0;
  for (let i = 0; i < extents.length; i += 2) total += extents[i] ?? 0;
  return total;
}

/** The extents cut to `length`, so that the next answer continues where every context stands. */
function clip(extents: Float64Array | undefined, length: number): Float64Array {
  if (extents === undefined) return new Float64Array();
  let rest = length;
  let used = 0;
  while (used < extents.length && rest > 0) {
    rest -= extents[used] ?? 0;
    used += 2;
  }
  const cut = extents.slice(0, used);
  if (rest < 0) cut[used - 2] = (cut[used - 2] ?? 0) + rest;
  return cut;
}

/** A cluster is zero when extents with ZERO cover all of it: start from zero and take away what is not. */
function markZero(map: ClusterMap, extents: Extents, clusterBytes: number): void {
  map.isZero.fill(1);
  forEachExtent(map, extents, (start, end, flags) => {
    if ((flags & STATE_ZERO) === 0) fillTouched(map.isZero, { start, end, clusterBytes, value: 0 });
  });
}

function markDirty(map: ClusterMap, extents: Extents, clusterBytes: number): void {
  map.isDirty.fill(0);
  forEachExtent(map, extents, (start, end, flags) => {
    if ((flags & STATE_DIRTY) !== 0) fillTouched(map.isDirty, { start, end, clusterBytes, value: 1 });
  });
}

/** Calls with positions relative to the map, clipped to it. */
function forEachExtent(
  map: ClusterMap,
  extents: Extents,
  visit: (start: number, end: number, flags: number) => void,
): void {
  const limit = map.end - map.offset;
  let position = 0;
  for (const part of extents) {
    for (let i = 0; i < part.length && position < limit; i += 2) {
      const end = Math.min(position + (part[i] ?? 0), limit);
      if (end > position) visit(position, end, part[i + 1] ?? 0);
      position = end;
    }
  }
}

function fillTouched(
  marks: Uint8Array,
  range: { start: number; end: number; clusterBytes: number; value: number },
): void {
  const first = Math.floor(range.start / range.clusterBytes);
  const last = Math.ceil(range.end / range.clusterBytes);
  marks.fill(range.value, first, last);
}
