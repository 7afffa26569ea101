import { stat } from 'node:fs/promises';
import type { ExportRow, RunRow } from '../db/database.js';
import {
  isExportDaemonAlive,
  readExportStatus,
  replaceExportFile,
  type ExportStatus,
  type MaterializeStatus,
} from '../exports/index.js';
import { CleanupStack } from '../lib/cleanup.js';
import { pollUntil } from '../lib/deadline.js';
import { AppError, isErrorCode } from '../lib/errors.js';
import type { ExportId, RunId } from '../lib/id.js';
import type { ActiveRun } from './active-run.js';
import type { EngineContext } from './context.js';
import { activeRunOf, factsOf } from './export-record.js';
import { entryOf, refusal, reloadDaemon, reloadDaemonIfAlive, writeExportFile } from './export-serving.js';
import type { RunRequest, RunResult } from './types.js';

type MaterializeRequest = Extract<RunRequest, { kind: 'materialize' }>;

const FOLLOW_INTERVAL_MS = 500;

/** CONFLICT for an export without an overlay, or one that is materialized, or about to be by another run. */
export async function requireMaterializable(
  context: EngineContext,
  row: ExportRow,
  self: RunId | null,
): Promise<void> {
  const { overlay, materialization } = factsOf(row);
  if (row.state !== 'published') throw new AppError('CONFLICT', `the export is ${row.state}`);
  if (overlay === null)
    throw new AppError('CONFLICT', 'the export has no overlay that could be materialized');
  if (materialization?.state === 'completed')
    throw new AppError('CONFLICT', 'the export is materialized already');
  const runId = await activeRunOf(context, row);
  if (runId !== null && runId !== self) {
    throw new AppError('CONFLICT', 'the export is being materialized', { details: { runId } });
  }
}

/**
 * Has the export daemon turn the overlay into an image that stands alone, while it is in use. Whatever else
 * ends the run takes the wish back: the overlay stands on the point then as before.
 */
export async function executeMaterialize(context: EngineContext, run: ActiveRun): Promise<RunResult> {
  const { exportId } = run.row.request as MaterializeRequest;
  await run.enter('discover');
  const row = await requireRow(context, exportId);
  await requireMaterializable(context, row, run.id);
  await using undo = new CleanupStack();
  undo.defer(() => run.insist(() => withdraw(context, exportId, run.id)));
  row.facts = { ...factsOf(row), materialization: { state: 'running', runId: run.id } };
  await context.db.exports.update(row.id, { facts: row.facts });
  await writeExportFile(context, row, replaceExportFile);
  await reloadDaemon(context, run.signal);
  await run.enter('transfer');
  // The run's own limit for a standstill ends this.
  await pollUntil(() => follow(context, run, row), {
    timeoutMs: Infinity,
    intervalMs: FOLLOW_INTERVAL_MS,
    what: `${row.name} standing alone`,
    signal: run.signal,
  });
  await run.enter('finalize');
  undo.release();
  return await run.insist(() => complete(context, row, run.id));
}

async function requireRow(context: EngineContext, id: ExportId): Promise<ExportRow> {
  const row = await context.db.exports.get(id);
  if (row === null) throw new AppError('NOT_FOUND', `there is no export ${id}`);
  return row;
}

/** True when it stands alone. A daemon that is away may come back, and goes on then. */
async function follow(context: EngineContext, run: ActiveRun, row: ExportRow): Promise<true | undefined> {
  const status = await livingStatus(context);
  if (status === null) return undefined;
  const progress = progressOf(status, row);
  if (progress?.state === 'failed') {
    throw new AppError('EXPORT_REFUSED', `the image cannot stand alone: ${progress.error?.message ?? ''}`, {
      details: { reason: progress.error },
    });
  }
  if (progress === null) return undefined;
  run.setShare(progress.totalBytes === 0 ? 1 : progress.doneBytes / progress.totalBytes);
  return progress.state === 'completed' ? true : undefined;
}

async function livingStatus(context: EngineContext): Promise<ExportStatus | null> {
  const status = await readExportStatus(context.settings.exports.statusFile);
  return status !== null && status.generation > 0 && (await isExportDaemonAlive(status)) ? status : null;
}

function progressOf(status: ExportStatus, row: ExportRow): MaterializeStatus | null {
  const entry = entryOf(status, row);
  if (entry === undefined) throw new AppError('EXPORT_REFUSED', `the export file of ${row.name} is gone`);
  if (entry.error !== null) throw refusal(entry);
  return entry.materialize;
}

/** The point is not needed any more, and what is valuable now does not expire. */
async function complete(context: EngineContext, row: ExportRow, runId: RunId): Promise<RunResult> {
  const { imagePath } = factsOf(row);
  const facts = { ...factsOf(row), materialization: { state: 'completed', runId } };
  await context.db.exports.update(row.id, { facts, expiresAt: null });
  return { kind: 'materialize', exportId: row.id, imagePath, fileBytes: (await stat(imagePath)).size };
}

/** Takes the wish back; the export may be gone meanwhile. */
async function withdraw(context: EngineContext, exportId: ExportId, runId: RunId): Promise<void> {
  const row = await context.db.exports.get(exportId);
  if (row === null || factsOf(row).materialization?.runId !== runId) return;
  row.facts = { ...factsOf(row), materialization: { state: 'failed', runId } };
  await context.db.exports.update(row.id, { facts: row.facts });
  if (row.state !== 'published') return;
  try {
    await writeExportFile(context, row, replaceExportFile);
  } catch (error) {
    if (!isErrorCode(error, 'NOT_FOUND')) throw error;
  }
  await reloadDaemonIfAlive(context);
}

/** Of a run whose worker died: completed when the daemon finished meanwhile, else the wish is taken back. */
export async function recoverMaterialize(context: EngineContext, run: RunRow): Promise<RunResult | null> {
  const { exportId } = run.request as MaterializeRequest;
  const row = await context.db.exports.get(exportId);
  if (row === null || factsOf(row).materialization?.runId !== run.id) return null;
  const status = await livingStatus(context);
  const entry = status === null ? undefined : entryOf(status, row);
  if (entry?.materialize?.state === 'completed') return complete(context, row, run.id);
  await withdraw(context, exportId, run.id);
  return null;
}
