import type { PointId } from '../src/lib/id.js';
import type { StoredManifest } from './manifest.js';
import type { RemovalRecord } from './removal-record.js';

export interface DigestProblem {
  pointId: PointId;
  message: string;
}

/**
 * Follows the digest that each manifest keeps of the one before it. A manifest that is gone without a
 * removal record, or is not the file it was, shows at the next one; only the loss of the newest
 * manifests cannot be seen this way. `stored` is ordered by sequence.
 */
export function digestChainProblems(
  stored: readonly StoredManifest[],
  removals: readonly RemovalRecord[],
): DigestProblem[] {
  const known = new Map<PointId, { sha256: string; sequence: number }>();
  for (const { pointId, sha256, sequence } of removals) known.set(pointId, { sha256, sequence });
  for (const { manifest, sha256 } of stored)
    known.set(manifest.pointId, { sha256, sequence: manifest.sequence });
  const problems: DigestProblem[] = [];
  stored.forEach(({ manifest }, index) => {
    const problem = linkProblem(manifest, known, index === 0);
    if (problem !== undefined) problems.push({ pointId: manifest.pointId, message: problem });
  });
  return problems;
}

function linkProblem(
  manifest: StoredManifest['manifest'],
  known: ReadonlyMap<PointId, { sha256: string; sequence: number }>,
  isFirst: boolean,
): string | undefined {
  const { previous, sequence } = manifest;
  if (previous === null) return isFirst ? undefined : 'it names no manifest before it, but there are some';
  const before = known.get(previous.pointId);
  if (before === undefined)
    return `the manifest before it, ${previous.pointId}, is missing and was never removed`;
  if (before.sha256 !== previous.sha256)
    return `the manifest before it, ${previous.pointId}, is not the file it was`;
  return before.sequence < sequence ? undefined : 'the manifest it names as the one before it is a later one';
}
