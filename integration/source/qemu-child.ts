/**
 * A process that holds a snapshot: `qemu-child.ts SOCKET SCRATCH RUN POINT TARGET…`. Prints `held`, then waits
 * to be killed.
 */
import { setInterval } from 'node:timers';
import type { DiskId, PointId, RepositoryId, RunId, VmId } from '../../src/lib/id.js';
import { newId } from '../../src/lib/id.js';
import { openQemuSource } from '../../src/source/qemu/qemu-source.js';
import type { SourceDisk } from '../../src/source/source.js';
import { makeSettings } from './qemu-rig.js';

const [socket, scratch, runId, pointId, ...targets] = process.argv.slice(2);
const { signal } = new AbortController();
const source = openQemuSource(
  { kind: 'qemu', socket: socket!, agentSocket: null },
  { settings: makeSettings(scratch!), place: { runtimeDirectory: '/tmp', owner: 'child' } },
);
const disks = targets.map((target): SourceDisk => {
  return {
    diskId: newId<DiskId>(),
    name: target,
    source: { kind: 'qemu', target, serial: null, changeTracking: 'auto' },
  };
});
const probes = await source.probe(disks, { signal });
await source.snapshot({
  vmId: newId<VmId>(),
  repositoryId: newId<RepositoryId>(),
  runId: runId as RunId,
  pointId: pointId as PointId,
  consistency: 'never',
  brokenRecords: [],
  note: () => undefined,
  signal,
  disks: disks.map((disk) => ({ disk, probe: probes.get(disk.diskId)!, bitmap: null })),
});
console.log('held');
setInterval(() => undefined, 1000);
