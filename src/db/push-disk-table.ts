import type { DiskId, RunId } from '../lib/id.js';
import { chunks, CHUNK_ROWS, fromJson, toJson } from './columns.js';
import type { PushDiskRow, PushDiskTable } from './database.js';
import type { Session } from './session.js';

interface PushDiskRecord {
  run_id: RunId;
  disk_id: DiskId;
  seen_at: string;
  progress: string;
  /** Null, and not JSON's null, until the disk is completed: a condition of updates. */
  completion: string | null;
}

export function createPushDiskTable(session: Session): PushDiskTable {
  return {
    replace: (runId, rows) => replace(session, runId, rows),
    async list(runId) {
      const records = await session.run('reading the disks of a push', (db) =>
        db<PushDiskRecord>('push_disks').where({ run_id: runId }).orderBy('disk_id'),
      );
      return records.map(toRow);
    },
    async report(runId, diskId, { progress, at }) {
      const count = await session.run('recording the progress of a push', (db) =>
        db<PushDiskRecord>('push_disks')
          .where({ run_id: runId, disk_id: diskId })
          .whereNull('completion')
          .update({ progress: toJson(progress), seen_at: at }),
      );
      return count === 1;
    },
    complete: (runId, diskId, completion) => complete(session, { runId, diskId, ...completion }),
  };
}

/** The run's row is locked, so that of two replacements at once the later one stays, whole. */
async function replace(session: Session, runId: RunId, rows: PushDiskRow[]): Promise<void> {
  const records = rows.map(toRecord);
  await session.transaction(
    'recording the disks of a push',
    async (trx) => {
      await trx('runs').where({ id: runId }).forUpdate().first('id');
      await trx<PushDiskRecord>('push_disks').where({ run_id: runId }).delete();
      for (const some of chunks(records, CHUNK_ROWS)) await trx<PushDiskRecord>('push_disks').insert(some);
    },
    {
      foreignKey: {
        code: 'NOT_FOUND',
        message: `there is no run ${runId}`,
        details: { runId },
      },
    },
  );
}

/** Of two at once the second waits for the row, finds its condition false, and reads what the first wrote. */
async function complete(
  session: Session,
  { runId, diskId, completion, at }: { runId: RunId; diskId: DiskId; completion: unknown; at: string },
): Promise<PushDiskRow | null> {
  const disk = { run_id: runId, disk_id: diskId };
  const record = await session.transaction('completing a disk of a push', async (trx) => {
    await trx<PushDiskRecord>('push_disks')
      .where(disk)
      .whereNull('completion')
      .update({ completion: toJson(completion), seen_at: at });
    return trx<PushDiskRecord>('push_disks').where(disk).first();
  });
  return record === undefined ? null : toRow(record);
}

function toRecord(row: PushDiskRow): PushDiskRecord {
  return {
    run_id: row.runId,
    disk_id: row.diskId,
    seen_at: row.seenAt,
    progress: toJson(row.progress),
    completion: row.completion === null ? null : toJson(row.completion),
  };
}

function toRow(record: PushDiskRecord): PushDiskRow {
  return {
    runId: record.run_id,
    diskId: record.disk_id,
    seenAt: record.seen_at,
    progress: fromJson(record.progress),
    completion: fromJson(record.completion ?? 'null'),
  };
}
