import { stat } from 'node:fs/promises';
import { systemClock } from '../../lib/clock.js';
import { CleanupStack } from '../../lib/cleanup.js';
import { AppError, errnoOf } from '../../lib/errors.js';
import type { DiskId } from '../../lib/id.js';
import type { DomainDisk } from '../../libvirt/domain-disk.js';
import { BASE_ALLOCATION, DIRTY_BITMAP_PREFIX } from '../../nbd/extents.js';
import { serveLocked } from '../../nbd/locked-image.js';
import { bitmapNameFor } from '../bitmap-name.js';
import type { OpenDisk } from '../disk-reader.js';
import type { SourceOptions } from '../source-settings.js';
import type { ConfigFile, SnapshotDisk, SnapshotRequest, SourceSnapshot } from '../source.js';
import { removeCheckpoint, type CheckpointPlace } from './checkpoints.js';
import { SAVED } from './domain-stats.js';
import type { DomainView } from './domain-view.js';
import { checkImageChain } from './image-info.js';
import { watchPower } from './power-watch.js';

/** A domain that is off, and what it takes to back it up. */
export interface OfflineDomain extends CheckpointPlace {
  view: DomainView;
  options: SourceOptions;
  /** Kept with the point as they are. */
  configFiles: readonly ConfigFile[];
}

/**
 * The chosen disks of a domain that is off, each read through a private read-only `qemu-nbd` under QEMU's image
 * lock, with its persistent bitmap where one is asked for. Nothing is started at the hypervisor, and no record can
 * begin: the one counted from goes on. While it is open QEMU refuses to start the machine; as soon as somebody
 * tried, `lost` aborts, so that the next start succeeds. SOURCE_BUSY when an image is in use, SOURCE_REFUSED
 * for disks that are no files or devices of this host.
 */
export async function takeOfflineSnapshot(
  offline: OfflineDomain,
  request: SnapshotRequest,
): Promise<SourceSnapshot> {
  const { signal, pointId } = request;
  const isSaved = offline.view.stats.reason === SAVED;
  if (isSaved) noteSaved(request);
  await using undo = new CleanupStack();
  const disks = new Map<DiskId, SnapshotDisk>();
  const looks: (() => Promise<void>)[] = [];
  for (const { disk, bitmap } of request.disks) {
    const found = offlineDisk(offline.view, disk);
    const { endpoint, dirtyContext } = undo.use(await openOffline(offline, found, { bitmap, signal }));
    looks.push(await rememberFile(found.path));
    disks.set(disk.diskId, { endpoint, dirtyContext, changeIdTo: bitmap ?? bitmapNameFor(pointId) });
  }
  const watch = undo.use(watchPower(offline.link, offline.view.stats));
  await watch.look();
  const steps = undo.move();
  const close = async (): Promise<void> => {
    try {
      await watch.look();
      for (const look of looks) await look();
    } finally {
      await steps.run();
    }
  };
  let closing: Promise<void> | undefined;
  return {
    capturedAtMs: systemClock.nowMs(),
    consistency: isSaved ? 'crash' : 'offline',
    disks,
    configFiles: offline.configFiles,
    lost: watch.lost,
    close: () => (closing ??= close()),
    commit: (obsolete) => removeObsolete(offline, obsolete, request),
    [Symbol.asyncDispose]: () => steps.run(),
  };
}

/** Its memory is kept, so its filesystems are as those of a running machine. */
function noteSaved({ consistency, note }: SnapshotRequest): void {
  const message = 'the machine was saved while it ran: its disks are as after a power failure';
  if (consistency === 'require') throw new AppError('FREEZE_FAILED', message);
  note({ level: 'warning', code: 'MACHINE_SAVED', message });
}

interface OfflineDisk {
  disk: DomainDisk;
  path: string;
  format: 'raw' | 'qcow2';
}

/** The image of a disk as this host can read it. SOURCE_REFUSED when it cannot. */
export function offlineDisk(view: DomainView, wanted: SnapshotRequest['disks'][number]['disk']): OfflineDisk {
  const target = wanted.source.kind === 'libvirt' ? wanted.source.target : '';
  const disk = view.domain.disks.find((candidate) => candidate.target === target);
  const refused = (why: string): AppError =>
    new AppError('SOURCE_REFUSED', `disk ${wanted.name} cannot be read while the machine is off: ${why}`, {
      details: { disk: wanted.name, target, location: disk?.location.text ?? null },
    });
  if (disk === undefined) throw refused(`the machine has no disk ${target}`);
  const path = view.paths.get(target);
  if (path === undefined) throw refused(`${disk.location.text} is neither a file nor a block device`);
  if (disk.isEncrypted) throw refused('it is encrypted with a key that only libvirt has');
  if (disk.isSliced) throw refused('it is a part of its image');
  if (disk.format !== 'raw' && disk.format !== 'qcow2') throw refused(`its format is ${disk.format}`);
  return { disk, path, format: disk.format };
}

/** One disk, locked and served until disposal. */
export async function openOffline(
  place: Pick<OfflineDomain, 'link' | 'host' | 'options'>,
  { disk, path, format }: OfflineDisk,
  { bitmap, signal }: { bitmap: string | null; signal: AbortSignal },
): Promise<OpenDisk> {
  const { place: serverPlace, settings } = place.options;
  if (place.host.kind !== 'local') {
    throw new AppError(
      'SOURCE_REFUSED',
      `disk ${disk.target} is on another host and cannot be read while the machine is off; start the machine, or run Holdfast on its host`,
      { details: { target: disk.target, location: path } },
    );
  }
  if (format === 'qcow2') await checkImageChain(path, { timeoutMs: place.link.timeoutMs, signal });
  const { connections } = settings.nbd;
  const server = await serveLocked({ ...serverPlace, path, format, connections, bitmap, signal });
  const dirtyContext = bitmap === null ? null : `${DIRTY_BITMAP_PREFIX}${bitmap}`;
  const metaContexts = [BASE_ALLOCATION, ...(dirtyContext === null ? [] : [dirtyContext])];
  return {
    endpoint: { kind: 'nbd', uri: server.uri, connections, metaContexts },
    dirtyContext,
    [Symbol.asyncDispose]: () => server.stop(),
  };
}

/**
 * For filesystems on which QEMU's locks do not reach other hosts (some NFS): whoever wrote to the file left a
 * newer time on it. Rejects with SNAPSHOT_LOST then. A block device has no such time.
 */
async function rememberFile(path: string): Promise<() => Promise<void>> {
  const facts = async (): Promise<string> => {
    try {
      const file = await stat(path, { bigint: true });
      return file.isFile() ? [file.dev, file.ino, file.size, file.mtimeNs].join(' ') : 'device';
    } catch (error) {
      return errnoOf(error) ?? 'unreadable';
    }
  };
  const before = await facts();
  return async () => {
    if ((await facts()) === before) return;
    throw new AppError('SNAPSHOT_LOST', `${path} was written to while it was read`, { details: { path } });
  };
}

async function removeObsolete(
  place: CheckpointPlace,
  names: readonly string[],
  request: SnapshotRequest,
): Promise<void> {
  for (const name of names) {
    try {
      await removeCheckpoint(place, name, { signal: request.signal });
    } catch (error) {
      if (!(error instanceof AppError)) throw error;
      const message = `The record ${name} stays for now: ${error.message}`;
      request.note({ level: 'warning', code: 'RECORD_KEPT', message });
    }
  }
}
