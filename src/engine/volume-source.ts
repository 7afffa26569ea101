import { CleanupStack } from '../lib/cleanup.js';
import type { DiskId } from '../lib/id.js';
import { openSource } from '../source/open-source.js';
import type { DiskProbe, Source, SourceDisk, VmSource } from '../source/source.js';
import type { EngineContext } from './context.js';
import { sourceOptions } from './follow-machine.js';
import { holdVolume } from './volume-use.js';

/**
 * The source of a VM, for a run or another owner. A disk that is a volume is read from the volume's device, which is
 * looked for and checked anew for each call and stays the volume's until the call, or the snapshot, ends.
 */
export function openVmSource(context: EngineContext, source: VmSource | null, owner: string): Source {
  const opened = openSource(source, sourceOptions(context, owner));
  return source === null ? withVolumes(context, opened, owner) : opened;
}

function withVolumes(context: EngineContext, inner: Source, self: string): Source {
  const resolve = async (disk: SourceDisk, held: CleanupStack, signal: AbortSignal): Promise<SourceDisk> => {
    if (disk.source.kind !== 'volume') return disk;
    const { volumeId, changeTracking } = disk.source;
    const { device } = held.use(await holdVolume(context, volumeId, { use: 'read', self, signal }));
    return { ...disk, source: { kind: 'image', path: device.devicePath, format: 'raw', changeTracking } };
  };
  return {
    async probe(disks, { signal }) {
      await using held = new CleanupStack();
      const resolved: SourceDisk[] = [];
      for (const disk of disks) resolved.push(await resolve(disk, held, signal));
      return withLineages(disks, await inner.probe(resolved, { signal }));
    },
    async snapshot(request) {
      await using held = new CleanupStack();
      const disks = [];
      for (const each of request.disks) {
        disks.push({ ...each, disk: await resolve(each.disk, held, request.signal) });
      }
      const snapshot = await inner.snapshot({ ...request, disks });
      const steps = held.move();
      steps.use(snapshot);
      return { ...snapshot, [Symbol.asyncDispose]: () => steps.run() };
    },
    async estimate(disks, { signal }) {
      await using held = new CleanupStack();
      const resolved = [];
      for (const each of disks) resolved.push({ ...each, disk: await resolve(each.disk, held, signal) });
      return await inner.estimate(resolved, { signal });
    },
    removeRecords: (names, control) => inner.removeRecords(names, control),
    cleanUp: (leftover, control) => inner.cleanUp(leftover, control),
  };
}

/** A volume is the same disk whatever path its device has now. */
function withLineages(
  disks: readonly SourceDisk[],
  probes: ReadonlyMap<DiskId, DiskProbe>,
): Map<DiskId, DiskProbe> {
  const named = new Map(probes);
  for (const { diskId, source } of disks) {
    const probe = probes.get(diskId);
    if (source.kind !== 'volume' || probe === undefined) continue;
    named.set(diskId, { ...probe, lineage: `volume:${source.volumeId}` });
  }
  return named;
}
