import { fromJson, toJson } from './columns.js';
import { decodeCursor, toPage } from './cursor.js';
import type { AuditLogTable, AuditRow } from './database.js';
import type { Session } from './session.js';

interface AuditRecord {
  id: number;
  occurred_at: string;
  actor: string;
  action: string;
  subject: string;
  details: string;
}

const LIST = 'audit';

/** Newest first. */
export function createAuditLogTable(session: Session): AuditLogTable {
  return {
    async append(row) {
      await session.run('writing the audit log', (db) =>
        db<AuditRecord>('audit_log').insert({
          occurred_at: row.at,
          actor: row.actor,
          action: row.action,
          subject: row.subject,
          details: toJson(row.details),
        }),
      );
    },
    async list({ limit, cursor }) {
      const before = cursor === null ? null : decodeCursor(LIST, cursor, 1);
      const records = await session.run('reading the audit log', (db) => {
        const query = db<AuditRecord>('audit_log')
          .select('*')
          .orderBy('id', 'desc')
          .limit(limit + 1);
        return before === null ? query : query.where('id', '<', Number(before[0]));
      });
      const page = toPage(records, { list: LIST, limit, key: (record) => [String(record.id)] });
      return { rows: page.rows.map(toRow), nextCursor: page.nextCursor };
    },
  };
}

function toRow(record: AuditRecord): AuditRow {
  return {
    at: record.occurred_at,
    actor: record.actor,
    action: record.action,
    subject: record.subject,
    details: fromJson(record.details),
  };
}
