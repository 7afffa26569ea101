import type { Knex } from 'knex';
import { AppError } from '../lib/errors.js';
import type { PointId, RepositoryId, RunId, VmId } from '../lib/id.js';
import { chunks, CHUNK_ROWS, toJson } from './columns.js';
import { decodeCursor, toPage, whereBefore } from './cursor.js';
import type { RowPage, RowPageRequest, RunRow, RunTable, RunTurn } from './database.js';
import { isUniqueViolation } from './database-errors.js';
import { toRunRecord, toRunRow, type RunRecord } from './run-record.js';
import type { Session } from './session.js';

const LIST = 'runs';
const ACTIVE = ['queued', 'running'];

export function createRunTable(session: Session): RunTable {
  return {
    insert: (row, options) => insert(session, row, options),
    async get(id) {
      const record = await session.run('reading a run', (db) => db<RunRecord>('runs').where({ id }).first());
      return record === undefined ? null : toRunRow(record);
    },
    list: (filter, page) => list(session, filter, page),
    claim: (id, claimed) => claim(session, id, claimed),
    update: (id, workerId, change) =>
      changeOne(session, 'updating a run', (db) =>
        runningUnder(db, id, workerId).update({ worker_id: workerId, ...toColumns(change) }),
      ),
    end: (id, workerId, end) =>
      changeOne(session, 'ending a run', (db) =>
        runningUnder(db, id, workerId).update({
          ...endColumns(end),
          ...(end.progress === undefined ? {} : { progress: toJson(end.progress) }),
        }),
      ),
    requeue: (id, workerId) =>
      changeOne(session, 'queueing a run again', (db) =>
        runningUnder(db, id, workerId).update({
          state: 'queued',
          running_key: null,
          stage: null,
          started_at: null,
          progress_at: null,
          worker_id: null,
          heartbeat_at: null,
          attempt: db.raw('attempt + 1'),
        }),
      ),
    requestCancel: (id, at) => requestCancel(session, id, at),
    isCancelRequested: (ids) =>
      session.run('reading cancel requests', (db) =>
        db<RunRecord>('runs').whereIn('id', ids).where('is_cancel_requested', 1).pluck('id'),
      ),
    listAbandoned: (options) => listAbandoned(session, options),
    endAbandoned: (id, expectedHeartbeatAt, end) =>
      changeOne(session, 'ending an abandoned run', (db) =>
        db<RunRecord>('runs')
          .where({ id, state: 'running', heartbeat_at: expectedHeartbeatAt })
          .update(endColumns(end)),
      ),
    async listQueued() {
      const records = await session.run('listing queued runs', (db) =>
        db<RunRecord>('runs').where({ state: 'queued' }).orderBy('created_at').orderBy('id'),
      );
      return records.map(toRunRow);
    },
    findPointRepositories: (vmId, pointIds) => findPointRepositories(session, vmId, pointIds),
    countActiveForPoint: (pointId) =>
      session.run('looking for runs of a point', (db) =>
        db<RunRecord>('runs').where({ point_id: pointId }).whereIn('state', ACTIVE).orderBy('id').pluck('id'),
      ),
  };
}

async function findPointRepositories(
  session: Session,
  vmId: VmId,
  pointIds: PointId[],
): Promise<{ pointId: PointId; repositoryId: RepositoryId }[]> {
  const found: { pointId: PointId; repositoryId: RepositoryId }[] = [];
  for (const some of chunks(pointIds, CHUNK_ROWS)) {
    const records = await session.run('looking whose points these are', (db) =>
      db<RunRecord>('runs')
        .where({ vm_id: vmId, kind: 'backup' })
        .whereIn('point_id', some)
        .select('point_id', 'repository_id'),
    );
    for (const { point_id: pointId, repository_id: repositoryId } of records) {
      if (pointId !== null && repositoryId !== null) found.push({ pointId, repositoryId });
    }
  }
  return found;
}

/** The VM's row is locked first, so that of two requests at once that refuse one sees the other. */
async function insert(session: Session, row: RunRow, { turn }: { turn: RunTurn }): Promise<void> {
  const record = toRunRecord(row, { takesTurns: turn !== 'none' });
  await session.transaction(
    'recording a run',
    async (trx) => {
      if (record.vm_id !== null) await trx('vms').where({ id: record.vm_id }).forUpdate().first('id');
      if (turn === 'refuse' && record.pair_key !== null) await refuseSecond(trx, record.pair_key);
      await trx<RunRecord>('runs').insert(record);
    },
    {
      foreignKey: {
        code: 'NOT_FOUND',
        message: 'the VM or the repository of the run does not exist',
        details: { vmId: row.vmId, repositoryId: row.repositoryId },
      },
    },
  );
}

/** Names the run that is running, else the oldest queued one. */
async function refuseSecond(trx: Knex, pairKey: string): Promise<void> {
  const active = await trx<RunRecord>('runs')
    .where({ pair_key: pairKey })
    .whereIn('state', ACTIVE)
    .orderBy([{ column: 'state', order: 'desc' }, 'created_at', 'id'])
    .first('id');
  if (active !== undefined) {
    throw new AppError('RUN_ACTIVE', 'another run of this VM and repository is queued or running', {
      details: { runId: active.id },
    });
  }
}

async function list(
  session: Session,
  filter: Parameters<RunTable['list']>[0],
  { limit, cursor }: RowPageRequest,
): Promise<RowPage<RunRow>> {
  const before = cursor === null ? null : decodeCursor(LIST, cursor, 2);
  const records = await session.run('listing runs', (db) => {
    const query = db<RunRecord>('runs')
      .select('*')
      .orderBy('created_at', 'desc')
      .orderBy('id', 'desc')
      .limit(limit + 1);
    if (filter.kind !== undefined) void query.where('kind', filter.kind);
    if (filter.state !== undefined) void query.where('state', filter.state);
    if (filter.vmId !== undefined) void query.where('vm_id', filter.vmId);
    if (before !== null) whereBefore(query, 'created_at', before);
    return query;
  });
  const rows = records.map(toRunRow);
  return toPage(rows, { list: LIST, limit, key: (row) => [row.createdAt, row.id] });
}

/**
 * The condition is part of the update. What it compares with (pair and age of the run) never changes
 * and may be read before. Should an older run appear in the same instant, the unique running_key
 * still lets only one of a pair run.
 */
async function claim(
  session: Session,
  id: RunId,
  { workerId, at }: { workerId: string; at: string },
): Promise<boolean> {
  const run = await session.run('reading a run', (db) =>
    db<RunRecord>('runs').where({ id }).first('kind', 'vm_id', 'pair_key', 'created_at'),
  );
  if (run === undefined) return false;
  return changeOne(session, 'claiming a run', async (db) => {
    const query = db<RunRecord>('runs').where({ id, state: 'queued' });
    if (run.pair_key !== null) {
      void query.whereNotExists(blockingRuns(db, { id, pairKey: run.pair_key, createdAt: run.created_at }));
      if (run.kind === 'backup') void query.whereNotExists(runningBackups(db, run.vm_id));
    }
    try {
      return await query.update({
        state: 'running',
        running_key: run.pair_key,
        worker_id: workerId,
        started_at: at,
        heartbeat_at: at,
        progress_at: at,
      });
    } catch (error) {
      if (isUniqueViolation(error)) return 0;
      throw error;
    }
  });
}

/** A machine is read by one backup at a time, whatever the repository: a hypervisor holds one snapshot of it. */
function runningBackups(db: Knex, vmId: VmId | null): Knex.QueryBuilder {
  const running = db<RunRecord>('runs')
    .distinct('id')
    .where({ vm_id: vmId, kind: 'backup', state: 'running' })
    .whereNotNull('running_key');
  return db.select(db.raw('1')).from(running.as('running_backups'));
}

/** Runs of the same pair that go first. `distinct` makes MySQL compute it apart from the table being updated (error 1093). */
function blockingRuns(db: Knex, run: { id: RunId; pairKey: string; createdAt: string }): Knex.QueryBuilder {
  const blocking = db<RunRecord>('runs')
    .distinct('id')
    .where('pair_key', run.pairKey)
    .whereNot('id', run.id)
    .where(
      (any) =>
        void any.where('state', 'running').orWhere(
          (older) =>
            void older
              .where('state', 'queued')
              .where('created_at', '<=', run.createdAt)
              .where(
                (either) => void either.where('created_at', '<', run.createdAt).orWhere('id', '<', run.id),
              ),
        ),
    );
  return db.select(db.raw('1')).from(blocking.as('blocking'));
}

async function requestCancel(session: Session, id: RunId, at: string): Promise<string | null> {
  return session.transaction('cancelling a run', async (trx) => {
    const run = await trx<RunRecord>('runs').where({ id }).forUpdate().first('state');
    if (run === undefined || !ACTIVE.includes(run.state)) return null;
    await trx<RunRecord>('runs')
      .where({ id })
      .update({
        is_cancel_requested: 1,
        ...(run.state === 'queued' ? { state: 'cancelled', ended_at: at } : {}),
      });
    return run.state;
  });
}

async function listAbandoned(
  session: Session,
  { heartbeatBefore, workerIds }: { heartbeatBefore: string; workerIds: string[] },
): Promise<RunRow[]> {
  const records = await session.run('listing abandoned runs', (db) =>
    db<RunRecord>('runs')
      .where({ state: 'running' })
      .where(
        (any) =>
          void any
            .where('heartbeat_at', '<', heartbeatBefore)
            .orWhereNull('heartbeat_at')
            .orWhereIn('worker_id', workerIds),
      )
      .orderBy('created_at'),
  );
  return records.map(toRunRow);
}

function runningUnder(db: Knex, id: RunId, workerId: string): Knex.QueryBuilder<RunRecord, number> {
  return db<RunRecord, number>('runs').where({ id, state: 'running', worker_id: workerId });
}

type RunChange = Parameters<RunTable['update']>[2];

function toColumns(change: RunChange): Partial<RunRecord> {
  return {
    ...(change.stage === undefined ? {} : { stage: change.stage }),
    ...(change.progress === undefined ? {} : { progress: toJson(change.progress) }),
    ...(change.progressAt === undefined ? {} : { progress_at: change.progressAt }),
    ...(change.heartbeatAt === undefined ? {} : { heartbeat_at: change.heartbeatAt }),
    ...(change.pointId === undefined ? {} : { point_id: change.pointId }),
  };
}

function endColumns(end: { state: string; at: string; error: unknown; result: unknown }): Partial<RunRecord> {
  return {
    state: end.state,
    running_key: null,
    ended_at: end.at,
    error: toJson(end.error),
    result: toJson(end.result),
  };
}

/** True when the conditional update hit its row. */
async function changeOne(
  session: Session,
  what: string,
  work: (db: Knex) => PromiseLike<number>,
): Promise<boolean> {
  return (await session.run(what, async (db) => work(db))) === 1;
}
