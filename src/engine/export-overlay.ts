import { link, open, rm, stat } from 'node:fs/promises';
import path from 'node:path';
import type { ExportRow } from '../db/database.js';
import { errnoOf } from '../lib/errors.js';
import { runTool } from '../lib/process.js';
import { alignUp, SECTOR_BYTES } from '../lib/units.js';
import { asTargetError } from '../target/file-target.js';
import type { EngineContext } from './context.js';
import { factsOf, type ExportFacts } from './export-record.js';

const CREATE_TIMEOUT_MS = 30_000;

/**
 * Makes the overlay of an export, synced, and answers the facts of the row, which are stored. The file stands
 * under a name of its own first and is recorded by its inode, so that what somebody else has under the final
 * name is never taken for ours. Codes of targets, or TOOL_FAILED.
 */
export async function makeOverlay(context: EngineContext, row: ExportRow): Promise<ExportFacts> {
  const facts = factsOf(row);
  const { overlay, imagePath, sizeBytes } = facts;
  if (overlay === null) return facts;
  const partial = partialPath(row);
  const handle = await asTargetError(open(partial, 'wx', 0o600));
  try {
    await runTool(
      'qemu-img',
      [
        ...['create', '-q', '-f', 'qcow2', '-F', 'qcow2', '-b', overlay.backingPath],
        ...['--', partial, String(alignUp(sizeBytes, SECTOR_BYTES))],
      ],
      { timeoutMs: CREATE_TIMEOUT_MS },
    );
    await asTargetError(handle.sync());
    const { ino } = await handle.stat({ bigint: true });
    const made = { ...facts, overlay: { ...overlay, inode: String(ino) } };
    await context.db.exports.update(row.id, { facts: made });
    await asTargetError(link(partial, imagePath));
    await asTargetError(rm(partial));
    await asTargetError(syncDirectory(path.dirname(imagePath)));
    return made;
  } finally {
    await handle.close();
  }
}

/** Removes the overlay, unless it was materialized: that image is the user's. None there is fine. */
export async function removeOverlay(row: ExportRow): Promise<void> {
  const { overlay, imagePath, materialization } = factsOf(row);
  if (overlay === null) return;
  await rm(partialPath(row), { force: true });
  if (materialization?.state === 'completed' || overlay.inode === null) return;
  if ((await inodeOf(imagePath)) === overlay.inode) await rm(imagePath, { force: true });
}

function partialPath(row: ExportRow): string {
  return path.join(path.dirname(factsOf(row).imagePath), `.holdfast-export-${row.id}`);
}

async function inodeOf(file: string): Promise<string | null> {
  try {
    return String((await stat(file, { bigint: true })).ino);
  } catch (error) {
    if (errnoOf(error) === 'ENOENT') return null;
    throw error;
  }
}

async function syncDirectory(directory: string): Promise<void> {
  const handle = await open(directory, 'r');
  try {
    await handle.sync();
  } finally {
    await handle.close();
  }
}
