import type { RunRow } from '../db/database.js';
import { AppError } from '../lib/errors.js';
import type { VmId, VolumeId } from '../lib/id.js';
import type { DiskSource } from '../source/source.js';
import type { EngineContext } from './context.js';
import type { RunRequest } from './types.js';

/** What a use of a volume does with it. */
export type VolumeUse = 'read' | 'write' | 'export' | 'detach';

/** Beside which uses of others each use must not be. Readers share; qemu's locks keep a writing export from them. */
const EXCLUDES: Record<VolumeUse, { runs: readonly VolumeUse[]; exports: boolean }> = {
  read: { runs: ['write', 'detach'], exports: false },
  export: { runs: ['write', 'detach'], exports: false },
  write: { runs: ['read', 'write', 'detach'], exports: true },
  detach: { runs: ['read', 'write', 'detach'], exports: true },
};

/**
 * VOLUME_IN_USE, with `details.runIds` and `details.exportIds`, when others use the volume in a way that this use must not
 * be beside. Who uses it writes its row (a run that runs, an export) first and then asks: of two that start
 * together at least one sees the other.
 */
export async function requireVolumeFree(
  context: EngineContext,
  volumeId: VolumeId,
  { use, self }: { use: VolumeUse; self: string | null },
): Promise<void> {
  const { runs: others, exports } = EXCLUDES[use];
  const runIds: string[] = [];
  for (const row of await listRunning(context)) {
    if (row.id === self) continue;
    const its = await useBy(context, row, volumeId);
    if (its !== null && others.includes(its)) runIds.push(row.id);
  }
  const rows = exports ? await context.db.exports.listAll({ volumeId }) : [];
  const exportIds = rows.map(({ id }) => id);
  if (runIds.length === 0 && exportIds.length === 0) return;
  const users = [...runIds.map((id) => `run ${id}`), ...exportIds.map((id) => `export ${id}`)];
  throw new AppError('VOLUME_IN_USE', `the volume is in use by ${users.join(', ')}`, {
    details: { volumeId, runIds, exportIds },
  });
}

async function listRunning(context: EngineContext): Promise<RunRow[]> {
  const running: RunRow[] = [];
  let cursor: string | null = null;
  do {
    const page = await context.db.runs.list({ state: 'running' }, { limit: 200, cursor });
    running.push(...page.rows);
    cursor = page.nextCursor;
  } while (cursor !== null);
  return running;
}

/** Null when the run does not touch the volume. */
async function useBy(context: EngineContext, row: RunRow, volumeId: VolumeId): Promise<VolumeUse | null> {
  const request = row.request as RunRequest;
  switch (request.kind) {
    case 'backup':
      return row.vmId !== null && (await isDiskOf(context, row.vmId, volumeId)) ? 'read' : null;
    case 'restore':
      return request.disks.some(({ target }) => target.kind === 'volume' && target.volumeId === volumeId)
        ? 'write'
        : null;
    case 'detach-volume':
      return request.volumeId === volumeId ? 'detach' : null;
    default:
      return null;
  }
}

async function isDiskOf(context: EngineContext, vmId: VmId, volumeId: VolumeId): Promise<boolean> {
  const vm = await context.db.vms.get(vmId);
  return vm?.disks.some(({ source }) => isVolume(source, volumeId)) ?? false;
}

/** CONFLICT, with `details.vmIds`, while a machine has a disk whose source is the volume. */
export async function requireNoDisk(context: EngineContext, volumeId: VolumeId): Promise<void> {
  const vmIds: VmId[] = [];
  let cursor: string | null = null;
  do {
    const page = await context.db.vms.list({ limit: 200, cursor });
    for (const { id, disks } of page.rows) {
      if (disks.some(({ source }) => isVolume(source, volumeId))) vmIds.push(id);
    }
    cursor = page.nextCursor;
  } while (cursor !== null);
  if (vmIds.length === 0) return;
  throw new AppError('CONFLICT', 'the volume is the source of a disk', { details: { volumeId, vmIds } });
}

/** The column was written by this engine; its shape is the code's own. */
function isVolume(source: unknown, volumeId: VolumeId): boolean {
  const disk = source as DiskSource | null;
  return disk?.kind === 'volume' && disk.volumeId === volumeId;
}
