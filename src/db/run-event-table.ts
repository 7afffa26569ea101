import { AppError } from '../lib/errors.js';
import type { RunId } from '../lib/id.js';
import { fromJson, toJson } from './columns.js';
import type { RunEventRow, RunEventTable } from './database.js';
import type { RunRecord } from './run-record.js';
import type { Session } from './session.js';

interface RunEventRecord {
  run_id: RunId;
  sequence_number: number;
  occurred_at: string;
  level: string;
  code: string;
  message: string;
  details: string;
}

export function createRunEventTable(session: Session): RunEventTable {
  return {
    append: (event) => append(session, event),
    async list(runId, { afterSequence, limit }) {
      const records = await session.run('reading the log of a run', (db) =>
        db<RunEventRecord>('run_events')
          .where({ run_id: runId })
          .where('sequence_number', '>', afterSequence)
          .orderBy('sequence_number')
          .limit(limit),
      );
      return records.map(toRow);
    },
  };
}

/** Counting up in the run's row locks it: events appended at the same time get numbers one after the other. */
async function append(session: Session, event: Omit<RunEventRow, 'sequence'>): Promise<void> {
  await session.transaction('writing the log of a run', async (trx) => {
    const count = await trx<RunRecord>('runs').where({ id: event.runId }).increment('last_event', 1);
    const run = await trx<RunRecord>('runs').where({ id: event.runId }).first('last_event');
    if (count === 0 || run === undefined) {
      throw new AppError('NOT_FOUND', `there is no run ${event.runId}`, { details: { runId: event.runId } });
    }
    await trx<RunEventRecord>('run_events').insert({
      run_id: event.runId,
      sequence_number: run.last_event,
      occurred_at: event.at,
      level: event.level,
      code: event.code,
      message: event.message,
      details: toJson(event.details),
    });
  });
}

function toRow(record: RunEventRecord): RunEventRow {
  return {
    runId: record.run_id,
    sequence: record.sequence_number,
    at: record.occurred_at,
    level: record.level,
    code: record.code,
    message: record.message,
    details: fromJson(record.details),
  };
}
