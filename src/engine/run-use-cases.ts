import type { RunRow, RunTurn } from '../db/database.js';
import { toTimestamp } from '../lib/clock.js';
import { pause } from '../lib/deadline.js';
import { AppError, isErrorCode } from '../lib/errors.js';
import { newId, type PointId, type RepositoryId, type RunId, type VmId } from '../lib/id.js';
import { audit } from './audit.js';
import type { EngineContext } from './context.js';
import type { Actor, Engine } from './engine.js';
import type { ActiveRuns } from './execute-run.js';
import { laneOf } from './run-queue.js';
import { ENDED_STATES, type RunEvent, type RunKind, type RunRequest, type RunView } from './types.js';
import { toRunView } from './views.js';

type RunUseCases = Pick<Engine, 'listRuns' | 'getRun' | 'getRunLog' | 'cancelRun' | 'watchRun'>;

const WATCH_INTERVAL_MS = 500;

export interface NewRun {
  kind: RunKind;
  repositoryId: RepositoryId | null;
  vmId: VmId | null;
  pointId: PointId | null;
  request: RunRequest;
  /** Runs that write to one VM in one repository take turns; what only reads has none to wait for. */
  turn: RunTurn;
}

/** Records a run and puts it into the queue; when the queue is away the run waits in the database. */
export async function startRun(context: EngineContext, run: NewRun, actor: Actor): Promise<RunView> {
  const row: RunRow = {
    id: newId<RunId>(context.clock.nowMs()),
    kind: run.kind,
    state: 'queued',
    stage: null,
    vmId: run.vmId,
    repositoryId: run.repositoryId,
    pointId: run.pointId,
    attempt: 1,
    createdAt: toTimestamp(context.clock.nowMs()),
    startedAt: null,
    endedAt: null,
    progressAt: null,
    cancelRequested: false,
    workerId: null,
    heartbeatAt: null,
    request: run.request,
    progress: null,
    error: null,
    result: null,
  };
  await context.db.runs.insert(row, { turn: run.turn });
  await audit(context, actor, {
    action: `${run.kind}.request`,
    subject: row.id,
    details: { request: run.request },
  });
  try {
    await context.queue.add({
      runId: row.id,
      kind: run.kind,
      lane: laneOf(run.request),
      attempt: row.attempt,
    });
  } catch (error) {
    if (!isErrorCode(error, 'QUEUE_UNAVAILABLE')) throw error;
    context.logger.warn({ err: error, runId: row.id }, 'the queue is away, the run waits in the database');
  }
  return view(context, row);
}

function view(context: EngineContext, row: RunRow): RunView {
  return toRunView(row, {
    nowMs: context.clock.nowMs(),
    stalledAfterMs: context.settings.runs.stalledAfterMs,
  });
}

export function createRunUseCases(context: EngineContext, active: ActiveRuns): RunUseCases {
  const { db } = context;
  const getRun = async (id: RunId): Promise<RunView> => {
    const row = await db.runs.get(id);
    if (row === null) throw new AppError('NOT_FOUND', `there is no run ${id}`);
    const stored = view(context, row);
    const here = active.get(id);
    if (here === undefined || row.state !== 'running') return stored;
    return { ...stored, stage: here.stage, progress: here.progress };
  };
  return {
    getRun,
    async listRuns(filter, page) {
      const { rows, nextCursor } = await db.runs.list(filter, page);
      return { items: rows.map((row) => view(context, row)), nextCursor };
    },
    async getRunLog(id, afterSequence, limit) {
      await getRun(id);
      const rows = await db.runEvents.list(id, { afterSequence, limit });
      return rows.map(({ sequence, at, level, code, message, details }) => ({
        sequence,
        at,
        level: level as RunEvent['level'],
        code,
        message,
        details: details as RunEvent['details'],
      }));
    },
    async cancelRun(id, actor) {
      await getRun(id);
      const before = await db.runs.requestCancel(id, toTimestamp(context.clock.nowMs()));
      if (before === null) throw new AppError('RUN_NOT_ACTIVE', `run ${id} has ended`);
      active.get(id)?.abort(new AppError('CANCELLED', `cancelled by ${actor.tokenName}`));
      await audit(context, actor, { action: 'run.cancel', subject: id, details: {} });
      return getRun(id);
    },
    async *watchRun(id, signal) {
      let shown = '';
      while (!signal.aborted) {
        const run = await getRun(id);
        const text = JSON.stringify(run);
        if (text !== shown) yield run;
        shown = text;
        if (ENDED_STATES.includes(run.state)) return;
        await pauseUnlessAborted(signal);
      }
    },
  };
}

/** Whoever watches looks at the signal itself: leaving is no error. */
async function pauseUnlessAborted(signal: AbortSignal): Promise<void> {
  try {
    await pause(WATCH_INTERVAL_MS, signal);
  } catch (error) {
    if (!signal.aborted) throw error;
  }
}
