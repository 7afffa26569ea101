import { CleanupStack } from '../../lib/cleanup.js';
import { AppError } from '../../lib/errors.js';
import type { DiskId } from '../../lib/id.js';
import type { Domain } from '../../libvirt/domain.js';
import { VirshSession } from '../../libvirt/virsh-session.js';
import type { DomainDisk } from '../../libvirt/domain-disk.js';
import { measureDisk } from '../measure.js';
import type { SourceOptions } from '../source-settings.js';
import type {
  DiskProbe,
  LibvirtVmSource,
  MachineSource,
  SnapshotDiskRequest,
  SnapshotRequest,
  SourceDisk,
  SourceSnapshot,
} from '../source.js';
import { removeCheckpoint, type CheckpointPlace } from './checkpoints.js';
import { cleanUpDomain } from './clean-up.js';
import { readConfigFiles } from './config-files.js';
import { openConnection, type LibvirtConnection } from './connection.js';
import { discoverDomain, readLibvirtVersion } from './discover.js';
import { diskFacts, lineageOf } from './disk-facts.js';
import type { DomainLink } from './domain-link.js';
import { viewDomain, type DomainView } from './domain-view.js';
import { openLibvirtGuest } from './libvirt-guest.js';
import { takeLiveSnapshot, type LiveDomain } from './live-snapshot.js';
import { offlineDisk, openOffline, takeOfflineSnapshot } from './offline-snapshot.js';

interface Control {
  signal: AbortSignal;
}

/**
 * The disks of a libvirt domain, running or off. One object serves one run: a snapshot must find the machine
 * as the probe before it did, running or off and with the same disks, else it rejects with SNAPSHOT_LOST.
 */
export function openLibvirtSource(source: LibvirtVmSource, options: SourceOptions): MachineSource {
  const { commandTimeoutMs, scratchDirectory } = options.settings.snapshot;
  let wasActive: boolean | null = null;
  const connect = ({ signal }: Control): Promise<LibvirtConnection> =>
    openConnection(source.uri, { place: options.place, timeoutMs: commandTimeoutMs, signal });
  const placeOf = ({ link, host }: LibvirtConnection): CheckpointPlace => ({
    link: { ...link, uuid: source.uuid },
    host,
    runtimeDirectory: options.place.runtimeDirectory,
  });
  const withPlace = async <T>(control: Control, use: (place: CheckpointPlace) => Promise<T>): Promise<T> => {
    await using connection = await connect(control);
    return await use(placeOf(connection));
  };
  const withSession = <T>(control: Control, use: (link: DomainLink) => Promise<T>): Promise<T> =>
    withPlace(control, async ({ link }) => {
      await using session = await VirshSession.open({ ...link, ...control });
      return await use({ ...link, run: session.run });
    });
  return {
    discover: (control) =>
      withSession(control, async (link) => ({ ...(await discoverDomain(link, control)), source })),
    probe: (disks, control) =>
      withSession(control, async (link) => {
        const version = await readLibvirtVersion(link, control);
        const view = await viewDomain(link, control);
        wasActive = view.domain.isActive;
        return new Map(disks.map((disk) => [disk.diskId, probeDisk(view, disk, version)]));
      }),
    async snapshot(request) {
      const { signal } = request;
      await using undo = new CleanupStack();
      const place = placeOf(undo.use(await connect({ signal })));
      const session = undo.use(await VirshSession.open({ ...place.link, signal }));
      const link = { ...place.link, run: session.run };
      const view = await viewDomain(link, { signal });
      refuseChangedState(view.domain, wasActive);
      refuseChangedDisks(view, request);
      const snapshot = await takeSnapshot({ ...place, link, options, view }, request);
      return endingWith(undo.move(), snapshot);
    },
    estimate: (disks, control) =>
      withPlace(control, async (place) => {
        const view = await viewDomain(place.link, control);
        if (view.domain.isActive) return estimateLive(view, disks);
        return await estimateOffline({ ...place, options, view }, disks, control);
      }),
    removeRecords: (names, control) =>
      withPlace(control, async (place) => {
        for (const name of names) await removeCheckpoint(place, name, control);
      }),
    cleanUp: (leftover, control) =>
      withPlace(control, (place) => cleanUpDomain({ ...place, base: scratchDirectory }, leftover)),
  };
}

function refuseChangedState({ isActive }: Domain, wasActive: boolean | null): void {
  if (wasActive === null || wasActive === isActive) return;
  const sentence = isActive ? 'was started' : 'was stopped';
  throw new AppError('SNAPSHOT_LOST', `the machine ${sentence} since its disks were looked at`);
}

/** What was decided upon another image must not be done with this one. */
function refuseChangedDisks(view: DomainView, { disks }: SnapshotRequest): void {
  for (const { disk, probe } of disks) {
    if (lineageOf(view.domain, findDisk(view, disk)) === probe.lineage) continue;
    throw new AppError('SNAPSHOT_LOST', `disk ${disk.name} is another one since it was looked at`);
  }
}

async function takeSnapshot(
  facts: CheckpointPlace & { options: SourceOptions; view: DomainView },
  request: SnapshotRequest,
): Promise<SourceSnapshot> {
  const { options, view, ...place } = facts;
  const { settings } = options;
  const { domain } = view;
  const configFiles = await readConfigFiles({ ...place, domain }, request);
  const { agentTimeoutMs } = settings.snapshot;
  const openGuest: LiveDomain['openGuest'] = (run) =>
    openLibvirtGuest({ ...place.link, agentTimeoutMs, run });
  return domain.isActive
    ? takeLiveSnapshot({ ...place, configFiles, domain, openGuest, settings }, request)
    : takeOfflineSnapshot({ ...place, configFiles, options, view }, request);
}

function endingWith(resource: AsyncDisposable, snapshot: SourceSnapshot): SourceSnapshot {
  return {
    ...snapshot,
    [Symbol.asyncDispose]: async () => {
      try {
        await snapshot[Symbol.asyncDispose]();
      } finally {
        await resource[Symbol.asyncDispose]();
      }
    },
  };
}

/** The disk of the domain that a disk of ours is. SOURCE_REFUSED when the machine has none at that target. */
function findDisk({ domain }: DomainView, { name, source }: SourceDisk): DomainDisk {
  const found = domain.disks.find(({ target }) => source.kind === 'libvirt' && target === source.target);
  if (found !== undefined) return found;
  throw new AppError('SOURCE_REFUSED', `the machine has no disk ${name} any more`, {
    details: { disk: name },
  });
}

function probeDisk(view: DomainView, wanted: SourceDisk, libvirtVersion: number): DiskProbe {
  const { domain, sizes, records, images } = view;
  const disk = findDisk(view, wanted);
  const sizeBytes = sizes.get(disk.target);
  if (sizeBytes === undefined) {
    throw new AppError('SOURCE_REFUSED', `the size of disk ${wanted.name} cannot be told now`, {
      details: { disk: wanted.name, location: disk.location.text },
    });
  }
  const canHaveBitmaps = images.get(disk.target)?.canHaveBitmaps ?? null;
  return {
    sizeBytes,
    lineage: lineageOf(domain, disk),
    records: (records.byTarget.get(disk.target) ?? []).map(({ name, isInconsistent }) => ({
      bitmap: name,
      isInconsistent,
    })),
    recordKeeper: 'managed',
    noRecordReason: diskFacts(disk, { canHaveBitmaps, libvirtVersion }).incremental.reason,
  };
}

/** Without a bitmap all that is allocated is read; what lies in backing images is not told by the hypervisor. */
function estimateLive(view: DomainView, disks: readonly SnapshotDiskRequest[]): Map<DiskId, number | null> {
  return new Map(
    disks.map(({ disk: wanted, probe, bitmap }) => {
      const disk = findDisk(view, wanted);
      const record = view.records.byTarget.get(disk.target)?.find(({ name }) => name === bitmap);
      if (bitmap !== null) return [wanted.diskId, record?.dirtyBytes ?? null];
      const allocated = disk.backing.length > 0 ? undefined : view.stats.physical.get(disk.target);
      return [wanted.diskId, allocated === undefined ? null : Math.min(allocated, probe.sizeBytes)];
    }),
  );
}

async function estimateOffline(
  place: CheckpointPlace & { options: SourceOptions; view: DomainView },
  disks: readonly SnapshotDiskRequest[],
  control: Control,
): Promise<Map<DiskId, number | null>> {
  const bytes = new Map<DiskId, number | null>();
  for (const { disk, probe, bitmap } of disks) {
    const found = offlineDisk(place.view, disk);
    await using open = await openOffline(place, found, { bitmap, signal: control.signal });
    const limits = { ...place.options.settings.nbd, ...control, sizeBytes: probe.sizeBytes };
    bytes.set(disk.diskId, await measureDisk(open, limits));
  }
  return bytes;
}
