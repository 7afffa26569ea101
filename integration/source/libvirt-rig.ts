import {
  newId,
  type DiskId,
  type PointId,
  type RepositoryId,
  type RunId,
  type VmId,
} from '../../src/lib/id.js';
import { GIB, MIB } from '../../src/lib/units.js';
import type { SourceOptions } from '../../src/source/source-settings.js';
import type {
  SnapshotDiskRequest,
  SnapshotRequest,
  SourceDisk,
  SourceNote,
} from '../../src/source/source.js';
import type { LabDirectory } from '../lab/directory.js';

/** What the daemon would open sources with, over a lab directory. */
export function labSourceOptions(lab: LabDirectory): SourceOptions {
  return {
    settings: {
      nbd: { connections: 2, connectTimeoutMs: 10_000, requestTimeoutMs: 10_000 },
      snapshot: {
        scratchDirectory: lab.file('scratch'),
        scratchKeepFreePercent: 1,
        scratchKeepFreeBytes: Math.min(64 * MIB, GIB),
        commandTimeoutMs: 30_000,
        agentTimeoutMs: 2000,
        freezeLimitMs: 5000,
        cbwTimeoutMs: 5000,
      },
    },
    place: { runtimeDirectory: lab.path, owner: 'test' },
  };
}

export function libvirtDisk(target: string): SourceDisk {
  const source = { kind: 'libvirt', target, serial: null, changeTracking: 'auto' } as const;
  return { diskId: newId<DiskId>(), name: target, source };
}

export function snapshotRequest(
  disks: SnapshotDiskRequest[],
  more: Partial<SnapshotRequest> = {},
): SnapshotRequest & { notes: SourceNote[] } {
  const notes: SourceNote[] = [];
  return {
    vmId: newId<VmId>(),
    repositoryId: newId<RepositoryId>(),
    runId: newId<RunId>(),
    pointId: newId<PointId>(),
    disks,
    consistency: 'prefer',
    brokenRecords: [],
    note: (note) => notes.push(note),
    signal: new AbortController().signal,
    notes,
    ...more,
  };
}
