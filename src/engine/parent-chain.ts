import {
  openComposedSums,
  type BackingChain,
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

/**
 * Decides how a disk is captured over what its chain really is: headers and files for every method, and
 * the sums, verified, for a compare, which stands on them. Those stay open until the cleanup runs.
 */
export async function decideOverChain(
  options: ParentChainOptions,
): Promise<{ decision: CaptureDecision; known: ComposedSums | null }> {
  const { repository, head, diskId, decide, cleanup, signal } = options;
  const chain: Found<BackingChain | null> =
    head === undefined
      ? { found: null, damage: null }
      : await orDamage(() => repository.openChain(head, diskId));
  const decision = decide(chain.damage);
  if (decision.method !== 'compare' || chain.found === null) return { decision, known: null };
  const { found } = chain;
  const sums = await orDamage(() => openComposedSums(found, { signal }));
  if (sums.damage !== null) return { decision: decide(sums.damage), known: null };
  return { decision, known: cleanup.use(sums.found) };
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
