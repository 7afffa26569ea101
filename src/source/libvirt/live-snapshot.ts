import { CleanupStack } from '../../lib/cleanup.js';
import { systemClock } from '../../lib/clock.js';
import { throwIfAborted } from '../../lib/deadline.js';
import { AppError, toAppError } from '../../lib/errors.js';
import type { DiskId } from '../../lib/id.js';
import type { Domain } from '../../libvirt/domain.js';
import { virsh } from '../../libvirt/virsh.js';
import { BASE_ALLOCATION, DIRTY_BITMAP_PREFIX } from '../../nbd/extents.js';
import { connectNbd } from '../../nbd/index.js';
import { bitmapNameFor } from '../bitmap-name.js';
import { trackingOf } from '../disk-source.js';
import { takeFrozen, type FreezableGuest } from '../guest-freeze.js';
import type { SourceSettings } from '../source-settings.js';
import type {
  ConfigFile,
  SnapshotDisk,
  SnapshotDiskRequest,
  SnapshotRequest,
  SourceSnapshot,
} from '../source.js';
import { BackupJob, socketOf, type JobPlace } from './backup-job.js';
import { backupXml, CHANGES, checkpointXml, type JobDisk } from './backup-xml.js';
import { removeCheckpoint, withXmlFile, type CheckpointPlace } from './checkpoints.js';
import { refuseOtherJob } from './domain-job.js';
import { askDomain } from './domain-link.js';
import type { ReachedSocket } from './hypervisor-host.js';
import { refuseDeadlyThreads } from './iothread.js';
import { checkScratch } from './scratch-watch.js';

/** A running or paused domain, and what it takes to back it up; its link has a session. */
export interface LiveDomain extends CheckpointPlace {
  /** Of its active XML. */
  domain: Domain;
  /** The guest, reached through this virsh. */
  openGuest: (run: typeof virsh) => FreezableGuest;
  settings: SourceSettings;
  /** Kept with the point as they are. */
  configFiles: readonly ConfigFile[];
}

interface Plan {
  place: JobPlace;
  jobDisks: JobDisk[];
  scratch: { name: string; sizeBytes: number }[];
  /** Null when no disk can have one. */
  checkpoint: { name: string; xml: string } | null;
}

/** Longest path of a Unix socket, without its NUL (unix(7)). */
const MAX_SOCKET_BYTES = 107;

/**
 * All chosen disks of a live domain at one instant, by libvirt's pull mode, with one new checkpoint for those
 * that can have one. SOURCE_BUSY while any other job runs there, SCRATCH_FULL without room to begin,
 * SOURCE_REFUSED for what libvirt or QEMU cannot do safely. After a failure nothing of it is left.
 */
export async function takeLiveSnapshot(live: LiveDomain, request: SnapshotRequest): Promise<SourceSnapshot> {
  const { signal, brokenRecords } = request;
  const { host, settings } = live;
  const plan = planBackup(live, request);
  const { place, checkpoint } = plan;
  await refuseDeadlyThreads(live, request.disks.map(targetOf), { signal });
  await refuseOtherJob(live.link, { signal });
  for (const name of brokenRecords) await removeCheckpoint(live, name, { signal });
  await using undo = new CleanupStack();
  const directory = await host.makeRunDirectory(
    { base: place.base, runId: place.runId, owner: live.domain.runsAs, scratch: plan.scratch },
    { signal },
  );
  const limits = settings.snapshot;
  const job = new BackupJob(place, limits);
  if (checkpoint !== null) undo.defer(() => removeCheckpoint(live, checkpoint.name));
  undo.defer(() => job.end());
  await checkScratch({ host, directory, limits }, { signal });
  try {
    const instant = await begin(live, plan, request);
    job.began();
    const reached = undo.use(await host.reach(socketOf(place), { signal }));
    const disks = await openExports(live, plan, { request, socket: reached.path });
    throwIfAborted(job.lost);
    undo.release();
    return hold({ live, request, job, reached, checkpoint: checkpoint?.name ?? null }, { ...instant, disks });
  } catch (error) {
    // What failed may have failed because the job had been ended.
    throwIfAborted(job.lost);
    throw error;
  }
}

interface Held {
  live: LiveDomain;
  request: SnapshotRequest;
  job: BackupJob;
  reached: ReachedSocket;
  checkpoint: string | null;
}

function hold(
  { live, request, job, reached, checkpoint }: Held,
  facts: Pick<SourceSnapshot, 'capturedAtMs' | 'consistency' | 'disks'>,
): SourceSnapshot {
  let isCommitted = false;
  const end = async (): Promise<void> => {
    await using steps = new CleanupStack();
    steps.defer(() => job.end());
    steps.use(reached);
  };
  let closing: Promise<void> | undefined;
  const close = async (): Promise<void> => {
    const reason = await job.whyLost();
    await end();
    if (reason !== null) throw reason;
  };
  return {
    ...facts,
    configFiles: live.configFiles,
    lost: job.lost,
    close: () => (closing ??= close()),
    async commit(obsolete) {
      isCommitted = true;
      for (const name of obsolete) {
        try {
          await removeCheckpoint(live, name);
        } catch (error) {
          const message = `the old checkpoint ${name} was not removed: ${toAppError(error).message}`;
          request.note({ level: 'warning', code: 'CHECKPOINT_KEPT', message });
        }
      }
    },
    async [Symbol.asyncDispose]() {
      await using steps = new CleanupStack();
      if (!isCommitted && checkpoint !== null) steps.defer(() => removeCheckpoint(live, checkpoint));
      steps.defer(end);
      // Whoever called it knows how it ended; a second end beside it would only be in its way.
      steps.defer(() => Promise.allSettled([closing]));
    },
  };
}

function targetOf({ disk }: SnapshotDiskRequest): string {
  if (disk.source.kind === 'libvirt') return disk.source.target;
  throw new AppError('INTERNAL', `disk ${disk.name} is not one of a libvirt machine`);
}

function planBackup(live: LiveDomain, request: SnapshotRequest): Plan {
  const place = {
    link: live.link,
    host: live.host,
    base: live.settings.snapshot.scratchDirectory,
    runId: request.runId,
  };
  if (Buffer.byteLength(socketOf(place)) > MAX_SOCKET_BYTES) {
    throw new AppError(
      'CONFIG_INVALID',
      'the path of snapshot.scratchDirectory is too long for a socket in it',
    );
  }
  const chosen = new Map(request.disks.map((wanted) => [targetOf(wanted), wanted]));
  const scratch: Plan['scratch'] = [];
  const jobDisks = live.domain.disks.map(({ target, format }): JobDisk => {
    const wanted = chosen.get(target);
    if (wanted === undefined) return { target, backup: null };
    chosen.delete(target);
    scratch.push({ name: `${target}.qcow2`, sizeBytes: wanted.probe.sizeBytes });
    const file = `${place.base}/${place.runId}/${target}.qcow2`;
    return { target, backup: { scratch: file, since: wanted.bitmap, isCounted: isCounted(wanted, format) } };
  });
  const [missing] = chosen.keys();
  if (missing !== undefined) {
    throw new AppError('SOURCE_REFUSED', `the machine has no disk ${missing}`, {
      details: { target: missing },
    });
  }
  const name = bitmapNameFor(request.pointId);
  const description = `holdfast repository=${request.repositoryId} vm=${request.vmId}`;
  const xml = checkpointXml({ name, description }, jobDisks);
  return { place, jobDisks, scratch, checkpoint: xml === null ? null : { name, xml } };
}

/** A disk that is always compared gets no record: nobody would read it. */
function isCounted({ disk, probe }: SnapshotDiskRequest, format: string): boolean {
  return format === 'qcow2' && probe.noRecordReason === null && trackingOf(disk.source) !== 'compare';
}

/** Everything is prepared before the guest is frozen: what is left is one command to a virsh that is connected. */
async function begin(
  live: LiveDomain,
  { place, jobDisks, checkpoint }: Plan,
  { consistency: wish, note, signal }: SnapshotRequest,
): Promise<Pick<SourceSnapshot, 'capturedAtMs' | 'consistency'>> {
  const { settings, runtimeDirectory } = live;
  const limitMs = settings.snapshot.freezeLimitMs;
  const { link } = live;
  const guest = live.openGuest(link.run ?? virsh);
  const start = async (files: string[]): Promise<number> => {
    await askDomain(link, ['backup-begin', '--reuse-external', ...files], { signal }).catch(explainRefusal);
    return systemClock.nowMs();
  };
  const frozen = (files: string[]): Promise<{ value: number; consistency: 'application' | 'crash' }> =>
    takeFrozen(guest, { wish, limitMs, note, signal }, () => start(files));
  const xml = backupXml(socketOf(place), jobDisks);
  const { value: capturedAtMs, consistency } = await withXmlFile(runtimeDirectory, xml, (file) =>
    checkpoint === null
      ? frozen(['--backupxml', file])
      : withXmlFile(runtimeDirectory, checkpoint.xml, (other) =>
          frozen(['--backupxml', file, '--checkpointxml', other]),
        ),
  );
  return { capturedAtMs, consistency };
}

/** What libvirt 9.0 and 11 (src/qemu/qemu_backup.c) and QEMU (block/backup.c) say. */
function explainRefusal(error: unknown): never {
  if (error instanceof AppError && /missing or broken bitmap|bitmap .* not found/.test(error.message)) {
    throw new AppError('BITMAP_INCONSISTENT', error.message, { cause: error });
  }
  if (error instanceof AppError && /Checkpoint '.*' for incremental backup/.test(error.message)) {
    throw new AppError('BITMAP_MISSING', error.message, { cause: error });
  }
  if (error instanceof AppError && /Source and target image have different sizes/.test(error.message)) {
    throw new AppError('SOURCE_SIZE_MISMATCH', 'a disk has another size than a moment ago', { cause: error });
  }
  if (error instanceof AppError && /domain is not running/.test(error.message)) {
    throw new AppError('SNAPSHOT_LOST', 'the machine was stopped before the backup began', { cause: error });
  }
  throw error;
}

async function openExports(
  { settings }: LiveDomain,
  { jobDisks, checkpoint }: Plan,
  { request, socket }: { request: SnapshotRequest; socket: string },
): Promise<Map<DiskId, SnapshotDisk>> {
  const disks = new Map<DiskId, SnapshotDisk>();
  for (const wanted of request.disks) {
    const target = targetOf(wanted);
    const dirtyContext = wanted.bitmap === null ? null : `${DIRTY_BITMAP_PREFIX}${CHANGES}`;
    const isCounted = jobDisks.some((disk) => disk.target === target && disk.backup?.isCounted === true);
    const disk: SnapshotDisk = {
      endpoint: {
        kind: 'nbd',
        uri: `nbd+unix:///${encodeURIComponent(target)}?socket=${encodeURIComponent(socket)}`,
        connections: settings.nbd.connections,
        metaContexts: [BASE_ALLOCATION, ...(dirtyContext === null ? [] : [dirtyContext])],
      },
      dirtyContext,
      changeIdTo: (isCounted ? checkpoint?.name : wanted.bitmap) ?? bitmapNameFor(request.pointId),
    };
    await checkExport(wanted, disk, { settings, signal: request.signal });
    disks.set(wanted.disk.diskId, disk);
  }
  return disks;
}

/** Before anything is read: the exact size, and the changes that were asked for. */
async function checkExport(
  { disk, probe, bitmap }: SnapshotDiskRequest,
  { endpoint, dirtyContext }: SnapshotDisk,
  { settings, signal }: { settings: SourceSettings; signal: AbortSignal },
): Promise<void> {
  const { uri, metaContexts = [] } = endpoint;
  const { connectTimeoutMs, requestTimeoutMs } = settings.nbd;
  await using handle = await connectNbd(
    { uri, metaContexts, connectTimeoutMs, requestTimeoutMs },
    { signal },
  );
  const { sizeBytes, metaContexts: granted } = handle.info;
  if (sizeBytes !== probe.sizeBytes) {
    throw new AppError('SOURCE_SIZE_MISMATCH', `disk ${disk.name} has another size than a moment ago`, {
      details: { expectedBytes: probe.sizeBytes, actualBytes: sizeBytes },
    });
  }
  if (dirtyContext !== null && !granted.includes(dirtyContext)) {
    throw new AppError('BITMAP_MISSING', `libvirt does not export the changes since ${bitmap ?? ''}`);
  }
}
