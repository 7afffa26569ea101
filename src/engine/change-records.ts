import type { PointManifest } from '../../repository/index.js';
import type { DiskId, PointId, RepositoryId, VmId } from '../lib/id.js';
import type { MachineRecord } from '../source/source.js';
import { findHead } from './capture-decision.js';
import type { EngineContext } from './context.js';

/** The records at a machine whose points this appliance made, by repository; what is not in it is somebody else's. */
export type OwnRecords = ReadonlyMap<string, RepositoryId>;

/**
 * Finds out which records at a machine are ours: those named after a point that a run of ours was to make,
 * or that stands in the given manifests of a repository we own. The name alone proves nothing: another
 * appliance protects the machine with names of the same form.
 */
export async function findOwnRecords(
  context: EngineContext,
  vmId: VmId,
  found: { records: readonly MachineRecord[]; points: readonly PointManifest[] },
): Promise<OwnRecords> {
  const named = found.records.flatMap(({ name, pointId }) => (pointId === null ? [] : [{ name, pointId }]));
  const owners = new Map<PointId, RepositoryId>();
  const ofRuns = await context.db.runs.findPointRepositories(
    vmId,
    named.map(({ pointId }) => pointId),
  );
  for (const { pointId, repositoryId } of ofRuns) owners.set(pointId, repositoryId);
  for (const { pointId, repositoryId } of found.points) owners.set(pointId, repositoryId);
  const own = new Map<string, RepositoryId>();
  for (const { name, pointId } of named) {
    const repositoryId = owners.get(pointId);
    if (repositoryId !== undefined) own.set(name, repositoryId);
  }
  return own;
}

/**
 * Our records of one repository that none of the machine's present disks counts from any more, once `points` (all
 * of the VM there, the new one too) exist. A disk that was left out of the last run still counts from an older one.
 */
export function obsoleteRecords(
  own: OwnRecords,
  repositoryId: RepositoryId,
  { points, diskIds }: { points: readonly PointManifest[]; diskIds: readonly DiskId[] },
): string[] {
  const needed = new Set<string>();
  for (const diskId of diskIds) {
    const changeId = findHead(points, diskId)?.ancestors[0]?.changeIdTo;
    if (changeId !== undefined) needed.add(changeId);
  }
  return [...own].flatMap(([name, owner]) => (owner === repositoryId && !needed.has(name) ? [name] : []));
}
