import path from 'node:path';
import { AppError } from '../../lib/errors.js';
import type { RunId } from '../../lib/id.js';
import type { QemuDisk } from './disk-facts.js';
import { QmpError, type QmpClient } from '../../lib/qmp.js';

/*
 * One disk while a snapshot of it is held:
 *
 *     guest device → filter (copy-before-write) ──file──→ root … image
 *                      ↑  └──target──→ scratch ──backing──┘
 *                    view             ↑
 *                    (health)         export
 *
 * Before a cluster is overwritten for the first time, the filter saves it in the scratch file, whose other
 * clusters read from the disk below. QEMU lets such a save wait for reads of the same cluster that are under way.
 *
 * When saving fails or takes too long, the filter gives the snapshot up and lets the guest write on. Reads of
 * the scratch file show nothing of that, reads of the view (snapshot-access) fail from then on: so the view
 * is read again and again. It is not what is exported for the copy: in QEMU 7.2 its block status is that of the
 * disk as it is now, so that clusters the guest zeroed later read as zeroes over NBD, and before 9.1 two
 * reads of it that overlap abort QEMU, with the guest in it (reqlist_init_req).
 */

/** What a run adds to QEMU is named after it, so that it is found again whoever finds it. */
export function tagOf(runId: RunId): string {
  return `hf-${runId.slice(-12)}`;
}

/** The record of changes as it was at the instant, in a copy that records nothing more. */
export function changesBitmapOf(tag: string): string {
  return `${tag}-changes`;
}

/** One disk of a snapshot. */
export interface FleecedDisk extends QemuDisk {
  /** `<tag>-<n>`; also the id and the name of the export. */
  name: string;
  scratchFile: string;
  /** The record to export, null for none. */
  bitmap: string | null;
}

export const filterOf = (name: string): string => `${name}-filter`;
export const scratchOf = (name: string): string => `${name}-scratch`;
export const viewOf = (name: string): string => `${name}-view`;

export function scratchFileOf(runDirectory: string, name: string): string {
  return path.join(runDirectory, `${name}.qcow2`);
}

/** Adds scratch space and filters, which do nothing yet. All that is slow is here, before the instant. */
export async function addFilters(
  qmp: QmpClient,
  disks: readonly FleecedDisk[],
  cbwTimeoutMs: number,
): Promise<void> {
  // Scratch space is worth nothing after a crash: it is never synced, also not when the machine is stopped.
  const cache = { 'no-flush': true };
  for (const { name, scratchFile, root } of disks) {
    await qmp.execute('blockdev-add', {
      driver: 'qcow2',
      'node-name': scratchOf(name),
      cache,
      file: { driver: 'file', filename: scratchFile, cache },
      backing: root.name,
    });
    await qmp.execute('blockdev-add', {
      driver: 'copy-before-write',
      'node-name': filterOf(name),
      file: root.name,
      target: scratchOf(name),
      'on-cbw-error': 'break-snapshot',
      'cbw-timeout': Math.ceil(cbwTimeoutMs / 1000),
      // Else it would swallow the guest's discards.
      discard: 'unmap',
    });
  }
}

/** Lets the devices write through the filters: from here on the snapshot stands. */
export async function insertFilters(qmp: QmpClient, disks: readonly FleecedDisk[]): Promise<void> {
  const results = await Promise.allSettled(
    disks.map(({ device, name }) => setDrive(qmp, device.qomPath, filterOf(name))),
  );
  const failed = results.find((result) => result.status === 'rejected');
  if (failed !== undefined) throw failed.reason;
}

export async function setDrive(qmp: QmpClient, qomPath: string, node: string): Promise<void> {
  await qmp.execute('qom-set', { path: qomPath, property: 'drive', value: node });
}

/** Begins the point's record on every disk that can keep one. Comes before the instant: what is recorded too much is safe. */
export async function beginRecords(
  qmp: QmpClient,
  disks: readonly FleecedDisk[],
  record: string,
): Promise<void> {
  const actions = disks
    .filter(({ image }) => image.canKeepBitmaps)
    .map(({ image }) => ({
      type: 'block-dirty-bitmap-add',
      data: { node: image.name, name: record, persistent: true },
    }));
  if (actions.length > 0) await qmp.execute('transaction', { actions });
}

/** Copies the records to export. Comes after the instant: a change marked too much is read as it was at the instant. */
export async function freezeRecords(
  qmp: QmpClient,
  disks: readonly FleecedDisk[],
  tag: string,
): Promise<void> {
  const name = changesBitmapOf(tag);
  const actions = disks.flatMap(({ image, bitmap }) => {
    const source = image.bitmaps.find((one) => one.name === bitmap);
    if (source === undefined) return [];
    const { granularity } = source;
    const node = image.name;
    return [
      { type: 'block-dirty-bitmap-add', data: { node, name, granularity, disabled: true } },
      { type: 'block-dirty-bitmap-merge', data: { node, target: name, bitmaps: [source.name] } },
    ];
  });
  if (actions.length > 0) await qmp.execute('transaction', { actions });
}

/** QEMU has one NBD server: SOURCE_BUSY when it serves somebody already. */
export async function startServer(qmp: QmpClient, socket: string): Promise<void> {
  try {
    await qmp.execute('nbd-server-start', {
      addr: { type: 'unix', data: { path: socket } },
      'max-connections': 0,
    });
  } catch (error) {
    if (!(error instanceof QmpError) || !error.description.includes('already running')) throw error;
    throw new AppError('SOURCE_BUSY', "QEMU's NBD server is in use: another backup runs on this machine", {
      cause: error,
    });
  }
}

/** Exports the snapshots, read-only, with the frozen records, and the views for a single reader. */
export async function exportDisks(qmp: QmpClient, disks: readonly FleecedDisk[], tag: string): Promise<void> {
  const addExport = async (
    name: string,
    more: { 'node-name': string; bitmaps?: object[] },
  ): Promise<void> => {
    await qmp.execute('block-export-add', { type: 'nbd', id: name, name, writable: false, ...more });
  };
  for (const { name, image, bitmap } of disks) {
    const bitmaps = bitmap === null ? [] : [{ node: image.name, name: changesBitmapOf(tag) }];
    await addExport(name, { 'node-name': scratchOf(name), bitmaps });
    await qmp.execute('blockdev-add', {
      driver: 'snapshot-access',
      'node-name': viewOf(name),
      file: filterOf(name),
    });
    await addExport(viewOf(name), { 'node-name': viewOf(name) });
  }
}
