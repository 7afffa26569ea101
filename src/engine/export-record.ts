import type { ExportRow } from '../db/database.js';
import type { ExportDefinition, ExportIdentity } from '../exports/index.js';
import type { LayerId, RunId } from '../lib/id.js';
import type { EngineContext } from './context.js';
import { ENDED_STATES, type RunState } from './types.js';

/** What the row of an export holds as JSON. */
export interface ExportFacts {
  /** Of the layer that is served; null for a volume. */
  layerId: LayerId | null;
  /** What is served: a layer, a device, or the overlay. */
  imagePath: string;
  format: 'raw' | 'qcow2';
  isReadOnly: boolean;
  /** Exact. */
  sizeBytes: number;
  description: string | null;
  identity: ExportIdentity | null;
  /** Its own address, where it has an identity. */
  at: { port: number } | null;
  overlay: Overlay | null;
  materialization: { state: 'running' | 'completed' | 'failed'; runId: RunId } | null;
  /** The process that publishes it. */
  workerId: string;
}

/** `imagePath` is a throw-away QCOW2 file of the export's own that stands on a layer. */
export interface Overlay {
  backingPath: string;
  /** By this the file under that name is known to be ours; null until it was made. */
  inode: string | null;
}

/** The column was written by this engine; its shape is the code's own. */
export function factsOf(row: Pick<ExportRow, 'facts'>): ExportFacts {
  return row.facts as ExportFacts;
}

/** What the file of an export says. */
export function definitionOf(row: Pick<ExportRow, 'name' | 'facts'>): ExportDefinition {
  const { imagePath, format, isReadOnly, sizeBytes, description, identity, at, materialization } =
    factsOf(row);
  return {
    name: row.name,
    imagePath,
    format,
    isReadOnly,
    sizeBytes,
    description,
    materialize: materialization?.state === 'running',
    own: identity === null || at === null ? null : { identity, at },
  };
}

/** False once nothing of the point is needed to serve it. */
export function isPinning(row: ExportRow): boolean {
  return factsOf(row).materialization?.state !== 'completed';
}

/** The run that cannot go on without the export: a push into it, or one that materializes it. */
export async function activeRunOf(context: EngineContext, row: ExportRow): Promise<RunId | null> {
  const { materialization } = factsOf(row);
  const runId = row.runId ?? (materialization?.state === 'running' ? materialization.runId : null);
  const run = runId === null ? null : await context.db.runs.get(runId);
  return run === null || ENDED_STATES.includes(run.state as RunState) ? null : run.id;
}
