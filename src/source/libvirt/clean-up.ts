import { CleanupStack } from '../../lib/cleanup.js';
import type { PointId, RunId } from '../../lib/id.js';
import { bitmapNameFor } from '../bitmap-name.js';
import { socketOf } from './backup-job.js';
import { removeCheckpoint, type CheckpointPlace } from './checkpoints.js';
import { endBackup } from './domain-job.js';

/**
 * Ends what a run that died left at a domain: its job, known by the socket in the run's directory, that
 * directory, and the checkpoint begun for its point unless the point was committed. Nothing of anybody else;
 * a domain that is off or gone is fine. Both are tried; a job that goes on keeps its directory.
 */
export async function cleanUpDomain(
  place: CheckpointPlace & { base: string },
  leftover: { runId: RunId; pointId: PointId; isCommitted: boolean },
): Promise<void> {
  const { link, host, base } = place;
  const { runId, pointId, isCommitted } = leftover;
  await using steps = new CleanupStack();
  if (!isCommitted) steps.defer(() => removeCheckpoint(place, bitmapNameFor(pointId)));
  steps.defer(async () => {
    await endBackup(link, socketOf({ base, runId }));
    await host.removeRunDirectory({ base, runId }, { signal: AbortSignal.timeout(link.timeoutMs) });
  });
}
