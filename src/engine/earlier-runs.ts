import type { Source } from '../source/source.js';
import type { ActiveRun } from './active-run.js';
import { isPush } from './backup-steps.js';
import type { EngineContext } from './context.js';

/** More than this many failed in a row are not looked at. */
const MAX_LOOKED_AT = 20;

/**
 * A run that ended while its hypervisor could not be asked left something there, which stands in the way of every
 * later run of the machine, whatever its repository, and of this run's own next attempt; this one can ask.
 */
export async function cleanUpEarlierRuns(
  context: EngineContext,
  run: ActiveRun,
  source: Source,
): Promise<void> {
  const { vmId } = run.row;
  if (vmId === null) return;
  const latest = await context.db.runs.list({ kind: 'backup', vmId }, { limit: MAX_LOOKED_AT, cursor: null });
  for (const row of latest.rows) {
    // It had nothing to do with the hypervisor.
    if (isPush(row)) continue;
    const { id, state, pointId, startedAt } = row;
    // It had cleaned up what was before it.
    if (state === 'completed') return;
    const isOver = id === run.id ? run.row.attempt > 1 : state !== 'running' && startedAt !== null;
    if (!isOver || pointId === null) continue;
    const isCommitted = (await context.db.points.get(pointId)) !== null;
    await source.cleanUp({ runId: id, pointId, isCommitted }, { signal: run.signal });
  }
}
