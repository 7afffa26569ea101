import { isDeepStrictEqual } from 'node:util';
import type { RunRow, VmRow } from '../db/database.js';
import { toTimestamp } from '../lib/clock.js';
import { pollUntil } from '../lib/deadline.js';
import { AppError, isErrorCode } from '../lib/errors.js';
import { newId, type DiskId, type PointId, type RunId } from '../lib/id.js';
import { isPush } from './backup-steps.js';
import { requireBackupOf } from './backup-use-cases.js';
import type { EngineContext } from './context.js';
import { chooseDisks } from './disk-choice.js';
import type { Actor, Engine, PushCompletion, PushReport, PushRequest } from './engine.js';
import { startRun } from './run-use-cases.js';
import { ENDED_STATES, type PushDiskRequest, type PushDiskView, type RunView } from './types.js';
import { toRunView, toVmView } from './views.js';

type PushUseCases = Pick<Engine, 'requestPush' | 'reportPush' | 'completePushDisk'>;

/** How long a request waits for the exports. */
const EXPORTS_WAIT_MS = 60_000;
const LOOK_MS = 200;

export function createPushUseCases(context: EngineContext): PushUseCases {
  return {
    requestPush: (input, actor, signal) => requestPush(context, input, { actor, signal }),
    reportPush: (id, reports) => reportPush(context, id, reports),
    completePushDisk: (id, diskId, completion) => completeDisk(context, { id, diskId, completion }),
  };
}

async function requestPush(
  context: EngineContext,
  input: PushRequest,
  { actor, signal }: { actor: Actor; signal: AbortSignal },
): Promise<RunView> {
  const { vmId, repositoryId, type, consistency, identity, whenBusy } = input;
  const vm = await requireBackupOf(context, { vmId, repositoryId, bitmaps: [] });
  const disks = choosePushed(vm, input.disks);
  const pointId = newId<PointId>(context.clock.nowMs());
  const request = { kind: 'push' as const, type, consistency, identity, disks };
  const turn = whenBusy === 'refuse' ? 'refuse' : 'wait';
  const run = await startRun(context, { kind: 'backup', repositoryId, vmId, pointId, request, turn }, actor);
  return waitForExports(context, run.id, signal);
}

function choosePushed(row: VmRow, wanted: PushRequest['disks']): PushDiskRequest[] {
  const vm = toVmView(row);
  const choose = (include: string[]): DiskId[] =>
    chooseDisks(vm, { include, exclude: [] }).chosen.map(({ id }) => id);
  if (wanted.length === 0) {
    return choose([]).map((diskId) => ({ diskId, sizeBytes: null, lineage: null, changeIds: null }));
  }
  const disks = wanted.flatMap(({ disk, ...rest }) => choose([disk]).map((diskId) => ({ diskId, ...rest })));
  if (new Set(disks.map(({ diskId }) => diskId)).size !== disks.length) {
    throw new AppError('INVALID_INPUT', 'a disk is named twice', { details: { field: 'disks' } });
  }
  return disks;
}

/** The run as it is when its exports are there, when it has ended, or when nobody waits any more: it goes on. */
async function waitForExports(context: EngineContext, runId: RunId, signal: AbortSignal): Promise<RunView> {
  const look = async (): Promise<RunView> => view(context, await context.db.runs.get(runId));
  try {
    return await pollUntil(
      async () => {
        const run = await look();
        return run.progress.push !== null || ENDED_STATES.includes(run.state) ? run : undefined;
      },
      { timeoutMs: EXPORTS_WAIT_MS, intervalMs: LOOK_MS, signal, what: 'the exports of a push' },
    );
  } catch (error) {
    if (signal.aborted || isErrorCode(error, 'TIMEOUT')) return look();
    throw error;
  }
}

async function reportPush(context: EngineContext, id: PointId, reports: PushReport[]): Promise<RunView> {
  const row = await requireActivePush(context, id);
  const at = toTimestamp(context.clock.nowMs());
  const disks = disksOf(context, row);
  for (const { diskId } of reports) requireDisk(disks, diskId);
  for (const { diskId, ...progress } of reports) {
    // Of a completed disk there is nothing more to tell.
    await context.db.pushDisks.report(row.id, diskId, { progress, at });
  }
  return view(context, row);
}

async function completeDisk(
  context: EngineContext,
  { id, diskId, completion }: { id: PointId; diskId: DiskId; completion: PushCompletion },
): Promise<PushDiskView> {
  const row = (await findCommittedPush(context, id)) ?? (await requireActivePush(context, id));
  const disk = requireDisk(disksOf(context, row), diskId);
  const at = toTimestamp(context.clock.nowMs());
  const stored = await context.db.pushDisks.complete(row.id, diskId, { completion, at });
  if (!isDeepStrictEqual(stored?.completion, completion)) {
    throw new AppError('CONFLICT', `disk ${disk.diskName} was completed already, and otherwise`, {
      details: { diskId, completion: stored?.completion },
    });
  }
  return { ...disk, isCompleted: true, changeIdTo: completion.changeId };
}

/** The run that pushed a point which is there already: an agent that lost the last answer asks again. */
async function findCommittedPush(context: EngineContext, id: PointId): Promise<RunRow | null> {
  const point = await context.db.points.get(id);
  const row = point === null ? null : await context.db.runs.get(point.runId);
  return row !== null && isPush(row) && disksOf(context, row).length > 0 ? row : null;
}

/** RUN_NOT_ACTIVE unless a push makes this point now and its exports are there. */
async function requireActivePush(context: EngineContext, id: PointId): Promise<RunRow> {
  for (const runId of await context.db.runs.countActiveForPoint(id)) {
    const row = await context.db.runs.get(runId);
    if (row !== null && isPush(row) && disksOf(context, row).length > 0) return row;
  }
  throw new AppError('RUN_NOT_ACTIVE', `no pushed backup makes point ${id} now`);
}

/** Empty until the exports are there. */
function disksOf(context: EngineContext, row: RunRow): PushDiskView[] {
  return view(context, row).progress.push?.disks ?? [];
}

function requireDisk(disks: readonly PushDiskView[], diskId: DiskId): PushDiskView {
  const disk = disks.find((known) => known.diskId === diskId);
  if (disk !== undefined) return disk;
  throw new AppError('NOT_FOUND', `disk ${diskId} is no part of this backup`, { details: { diskId } });
}

function view(context: EngineContext, row: RunRow | null): RunView {
  if (row === null) throw new AppError('NOT_FOUND', 'the run is gone');
  const { stalledAfterMs } = context.settings.runs;
  return toRunView(row, { nowMs: context.clock.nowMs(), stalledAfterMs });
}
