import {
  openComposedSums,
  type BackingChain,
  type ChainLayer,
  type ComposedSums,
  type PointManifest,
  type Repository,
} from '../../repository/index.js';
import type { CleanupStack } from '../lib/cleanup.js';
import { AppError, isErrorCode } from '../lib/errors.js';
import type { DiskId } from '../lib/id.js';
import type { CaptureDecision } from './capture-decision.js';

export interface ParentChainOptions {
  repository: Repository;
  /** The newest point that has the disk. */
  head: PointManifest | undefined;
  diskId: DiskId;
  /** Called again with the damage, when more of it shows than the first look told. */
  decide: (damage: string | null) => CaptureDecision;
  cleanup: CleanupStack;
  signal: AbortSignal;
}

export interface ChainDecision {
  decision: CaptureDecision;
  /** The chain, for a compare. */
  known: ComposedSums | null;
  /** The layers above the point that the bitmap counts from, when there are any. */
  newer: ComposedSums | null;
}

/**
 * Decides how a disk is captured over what its chain really is: headers and files for every method, and
 * the sums, verified, that it stands on. Those stay open until the cleanup runs.
 */
export async function decideOverChain(options: ParentChainOptions): Promise<ChainDecision> {
  const { repository, head, diskId, decide, cleanup, signal } = options;
  const chain: Found<BackingChain | null> =
    head === undefined
      ? { found: null, damage: null }
      : await orDamage(() => repository.openChain(head, diskId));
  const decision = decide(chain.damage);
  const layers = layersToKnow(decision, chain.found);
  if (chain.found === null || layers.length === 0) return { decision, known: null, newer: null };
  const part = { ...chain.found, layers };
  const sums = await orDamage(() => openComposedSums(part, { signal }));
  if (sums.damage !== null) return { decision: decide(sums.damage), known: null, newer: null };
  const found = cleanup.use(sums.found);
  return decision.method === 'compare'
    ? { decision, known: found, newer: null }
    : { decision, known: null, newer: found };
}

/**
 * A compare stands on all of them. A bitmap that goes on over later points proves nothing of an image that was put
 * back to a time before those, for that one carries the same bitmap: so what they hold is read again in any case.
 * Of an image that was not, the bitmap has all of that anyway.
 */
function layersToKnow({ method, countsFrom }: CaptureDecision, chain: BackingChain | null): ChainLayer[] {
  const layers = chain?.layers ?? [];
  if (method === 'compare') return layers;
  if (method === 'full') return [];
  const first = layers.findIndex(({ pointId }) => pointId === countsFrom);
  if (first === -1) throw new AppError('INTERNAL', 'the bitmap counts from a point outside of the chain');
  return layers.slice(0, first);
}

type Found<T> = { found: T; damage: null } | { found: null; damage: string };

/** Only what says that stored files are damaged is damage; a storage that does not answer is an error. */
async function orDamage<T>(look: () => Promise<T>): Promise<Found<T>> {
  try {
    return { found: await look(), damage: null };
  } catch (error) {
    const isDamage = isErrorCode(error, 'CHAIN_BROKEN', 'LAYER_NOT_FOUND', 'LAYER_CORRUPT');
    if (isDamage && error instanceof AppError) return { found: null, damage: error.message };
    throw error;
  }
}
