import { CleanupStack } from '../lib/cleanup.js';
import { systemClock } from '../lib/clock.js';
import { AppError } from '../lib/errors.js';
import type { DiskId } from '../lib/id.js';
import { bitmapNameFor } from './bitmap-name.js';
import type { DiskReader } from './disk-reader.js';
import { openImageReader } from './image/image-reader.js';
import { measureDisk } from './measure.js';
import { openNbdReader } from './nbd/nbd-reader.js';
import type { SourceOptions } from './source-settings.js';
import type {
  DiskProbe,
  DiskSource,
  SnapshotDisk,
  SnapshotRequest,
  Source,
  SourceDisk,
  SourceSnapshot,
} from './source.js';

/**
 * Disks that stand for themselves. Their servers and files belong to somebody else: what they show must
 * not change during a run, one instant for all of them is the user's to provide, and records of changes
 * are made and removed by the user too.
 */
export function openDisksSource(options: SourceOptions): Source {
  return {
    async probe(disks, { signal }) {
      const probes = new Map<DiskId, DiskProbe>();
      for (const disk of disks) probes.set(disk.diskId, await readerOf(disk, options).probe({ signal }));
      return probes;
    },
    snapshot: (request) => openDisks(request, options),
    async estimate(disks, { signal }) {
      const bytes = new Map<DiskId, number | null>();
      for (const { disk, probe, bitmap } of disks) {
        await using open = await readerOf(disk, options).open({ bitmap, signal });
        const { sizeBytes } = probe;
        bytes.set(disk.diskId, await measureDisk(open, { ...options.settings.nbd, sizeBytes, signal }));
      }
      return bytes;
    },
    removeRecords: () => Promise.resolve(),
    cleanUp: () => Promise.resolve(),
  };
}

/** The reader of a disk by the kind of its source. Rejects what is malformed; touches nothing yet. */
function readerOf({ name, source }: SourceDisk, { settings, place }: SourceOptions): DiskReader {
  switch (source.kind) {
    case 'nbd':
      return openNbdReader(source, settings.nbd);
    case 'image':
      return openImageReader(source, { connections: settings.nbd.connections, ...place });
    case 'push':
      throw new AppError(
        'CONFLICT',
        `disk ${name} is only pushed by an agent: nothing can be read of it here`,
      );
    default:
      throw machineDisk(name, source);
  }
}

function machineDisk(name: string, source: DiskSource): AppError {
  return new AppError('CONFLICT', `disk ${name} belongs to a ${source.kind} machine that is not known`);
}

async function openDisks(request: SnapshotRequest, options: SourceOptions): Promise<SourceSnapshot> {
  const { signal, pointId } = request;
  if (request.consistency === 'require') {
    throw new AppError('FREEZE_FAILED', 'disks without a machine have no guest that could be frozen');
  }
  await using undo = new CleanupStack();
  const disks = new Map<DiskId, SnapshotDisk>();
  let isOffline = true;
  for (const { disk, bitmap } of request.disks) {
    const reader = readerOf(disk, options);
    const { endpoint, dirtyContext } = undo.use(await reader.open({ bitmap, signal }));
    isOffline &&= reader.consistency === 'offline';
    disks.set(disk.diskId, { endpoint, dirtyContext, changeIdTo: bitmapNameFor(pointId) });
  }
  const steps = undo.move();
  return {
    capturedAtMs: systemClock.nowMs(),
    consistency: isOffline ? 'offline' : 'crash',
    disks,
    configFiles: [],
    lost: new AbortController().signal,
    close: () => steps.run(),
    commit: () => Promise.resolve(),
    [Symbol.asyncDispose]: () => steps.run(),
  };
}
