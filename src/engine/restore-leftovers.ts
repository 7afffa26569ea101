import { mkdir, open, readFile, rm } from 'node:fs/promises';
import path from 'node:path';
import { z } from 'zod';
import { errnoOf } from '../lib/errors.js';
import type { RunId } from '../lib/id.js';
import { partialPath } from '../target/file-target.js';
import type { TargetSpec } from '../target/target.js';
import type { EngineContext } from './context.js';
import type { RestoreTargetSpec, RunRequest } from './types.js';

const recordSchema = z.strictObject({ partialFiles: z.array(z.string()) });

/**
 * Records where a machine's disks will be written, durably and before the first byte: only the run knows, and
 * recovery must find what it leaves. Dispose it after the targets.
 */
export async function rememberTargets(
  context: EngineContext,
  runId: RunId,
  targets: readonly TargetSpec[],
): Promise<AsyncDisposable> {
  const partialFiles = partialFilesOf(runId, targets);
  const file = recordFile(context, runId);
  await mkdir(path.dirname(file), { recursive: true, mode: 0o700 });
  const handle = await open(file, 'w', 0o600);
  try {
    await handle.writeFile(JSON.stringify({ partialFiles }));
    await handle.sync();
  } finally {
    await handle.close();
  }
  return { [Symbol.asyncDispose]: () => rm(file, { force: true }) };
}

/**
 * Removes what a restore that died left unfinished beside its targets. Disks of a machine that had their names
 * already are whole and stay: nobody can tell whether they were taken into use.
 */
export async function removeRestoreLeftovers(
  context: EngineContext,
  runId: RunId,
  request: Extract<RunRequest, { kind: 'restore' }>,
): Promise<void> {
  const file = recordFile(context, runId);
  const named = partialFilesOf(
    runId,
    request.disks.map(({ target }) => target),
  );
  for (const partial of [...named, ...(await readRecord(file))]) await rm(partial, { force: true });
  await rm(file, { force: true });
}

function partialFilesOf(runId: RunId, targets: readonly RestoreTargetSpec[]): string[] {
  return targets.flatMap((target) => (target.kind === 'file' ? [partialPath(target.path, runId)] : []));
}

/** A record cut short by a crash was written before any file it would name. */
async function readRecord(file: string): Promise<string[]> {
  try {
    return recordSchema.parse(JSON.parse(await readFile(file, 'utf8'))).partialFiles;
  } catch (error) {
    if (errnoOf(error) === 'ENOENT' || error instanceof SyntaxError) return [];
    throw error;
  }
}

function recordFile(context: EngineContext, runId: RunId): string {
  return path.join(context.stateDirectory, 'restores', `${runId}.json`);
}
