import type { ExportRow } from '../db/database.js';
import type { ExportStatus } from '../exports/index.js';
import { AppError } from '../lib/errors.js';
import { alignUp, SECTOR_BYTES } from '../lib/units.js';
import type { EngineContext } from './context.js';
import { factsOf } from './export-record.js';
import { entryOf, refusal, urisOf } from './export-serving.js';
import type { ExportView } from './types.js';
import { toRunError } from './views.js';

/** An export as it is now; `daemon` is what `lookAtDaemon` answered. */
export function toExportView(
  context: EngineContext,
  row: ExportRow,
  daemon: { status: ExportStatus | null; problem: AppError | null },
): ExportView {
  const { isReadOnly, sizeBytes, identity, imagePath, materialization } = factsOf(row);
  const served = row.state === 'published' ? servedNow(context, row, daemon) : NOWHERE;
  return {
    ...{ id: row.id, name: row.name, kind: row.kind, state: row.state },
    ...{ pointId: row.pointId, diskId: row.diskId, runId: row.runId, volumeId: row.volumeId },
    isReadOnly,
    sizeBytes: row.state === 'publishing' ? null : alignUp(sizeBytes, SECTOR_BYTES),
    uris: served.uris,
    identity,
    imagePath,
    createdAt: row.createdAt,
    expiresAt: row.expiresAt,
    materialization,
    problem: served.problem === null ? null : toRunError(served.problem),
  };
}

interface Served {
  uris: string[];
  problem: AppError | null;
}

const NOWHERE: Served = { uris: [], problem: null };

function servedNow(
  context: EngineContext,
  row: ExportRow,
  { status, problem }: { status: ExportStatus | null; problem: AppError | null },
): Served {
  if (problem !== null || status === null) return { uris: [], problem };
  const entry = entryOf(status, row);
  if (entry === undefined) {
    return {
      uris: [],
      problem: new AppError('EXPORT_REFUSED', `the export file of ${row.name} is not there`),
    };
  }
  if (entry.error !== null) return { uris: [], problem: refusal(entry) };
  const uris = urisOf(context, status, entry);
  if (uris.length > 0) return { uris, problem: null };
  const down = status.listeners.filter(({ state }) => state === 'down').map(({ id }) => id);
  return {
    uris,
    problem: new AppError('EXPORT_DAEMON_UNAVAILABLE', 'the addresses of the export are down', {
      details: { listeners: down },
    }),
  };
}
