import type { DiscoverRequest, ExportRequest } from '../../src/engine/engine.js';
import type {
  BackupEstimate,
  BackupView,
  ComponentHealth,
  DiskEstimate,
  DoctorFinding,
  ExportDaemonView,
  ExportView,
  FoundDeviceView,
  MachineView,
  Page,
  PageRequest,
  PushDiskView,
  PushView,
  VmView,
} from '../../src/engine/types.js';
import { AppError } from '../../src/lib/errors.js';
import {
  newId,
  type DiskId,
  type ExportId,
  type LayerId,
  type PointId,
  type RepositoryId,
  type RunId,
  type VmId,
} from '../../src/lib/id.js';
import type { DiskFacts } from '../../src/source/source.js';

export const NOW = '2026-11-21T09:00:00.000Z';
export const GIB = 1024 ** 3;

export const WELL: ComponentHealth[] = [
  { name: 'database', isHealthy: true, message: 'sqlite at /secret/place' },
  { name: 'queue', isHealthy: true, message: 'redis at /secret/place' },
];
export const FOUND: DoctorFinding[] = [
  { name: 'qemu-img', isOk: true, isRequired: true, found: '7.2.22', remedy: null },
];

/** Pages by position: the cursor is the index of the next item. */
export function pageOf<T>(items: T[], { limit, cursor }: PageRequest): Page<T> {
  const start = cursor === null ? 0 : Number(cursor);
  const end = start + limit;
  return { items: items.slice(start, end), nextCursor: end < items.length ? String(end) : null };
}

export function find<T extends { id: string }>(items: T[], id: string, what: string): T {
  const item = items.find((candidate) => candidate.id === id);
  if (item === undefined) throw new AppError('NOT_FOUND', `there is no ${what} with this id`);
  return item;
}

const INCREMENTAL = { isPossible: true, reason: null };
const RAW = { isPossible: false, reason: 'a raw image holds no bitmaps' };

/** Every domain that is asked for by name is there, but for one called `absent`. */
export function discover(input: DiscoverRequest): VmView[] {
  if (input.kind === 'qemu') return [newMachine('machine', input)];
  if (input.names.includes('absent')) throw new AppError('NOT_FOUND', `${input.uri} has no domain absent`);
  return input.names.map((name) => newMachine(name, input));
}

/** A discovered machine: a disk, one that can have no record of changes, and a CD-ROM that is left out. */
function newMachine(name: string, place: DiscoverRequest): VmView {
  const id = newId<VmId>();
  const { kind } = place;
  const facts: DiskFacts[] = [
    { ...FACTS, target: 'vda', serial: 'WD-1', incremental: INCREMENTAL },
    { ...FACTS, target: 'vdb', serial: null, format: 'raw', incremental: RAW },
    {
      ...{ ...FACTS, target: 'sda', serial: null, format: 'raw', incremental: RAW },
      skip: { code: 'REMOVABLE', sentence: 'it is a CD-ROM' },
    },
  ];
  const disks = facts.map((found, number) => ({
    ...{ id: newId<DiskId>(), vmId: id, number, name: found.target, sizeBytes: 8 * GIB, facts: found },
    source: { kind, target: found.target, serial: found.serial, changeTracking: 'auto' as const },
  }));
  const machine: MachineView = {
    source:
      place.kind === 'libvirt'
        ? { kind: 'libvirt', uri: place.uri, uuid: '7f0d0a52-6a3f-4c0e-9a58-000000000001' }
        : place,
    isPresent: true,
    state: 'running',
    seenAt: NOW,
    changeRecords: [],
  };
  return { id, name, createdAt: NOW, machine, disks };
}

const FACTS = { isPresent: true, format: 'qcow2', location: '/images/disk', skip: null };

/** Records that are broken pass for those of another appliance. */
export function release({ machine }: VmView): { removed: string[]; kept: string[] } {
  const records = machine?.changeRecords ?? [];
  const names = (isBroken: boolean) =>
    records.filter((one) => one.isBroken === isBroken).map(({ name }) => name);
  return { removed: names(false), kept: names(true) };
}

/** The first disk would be a full, the second compared, the others left out. */
export function estimate(vm: VmView, repositoryId: RepositoryId): BackupEstimate {
  const disks = vm.disks.map((disk, index): DiskEstimate => {
    const head = { diskId: disk.id, diskName: disk.name, sizeBytes: disk.sizeBytes };
    if (index === 0) {
      const reason = { code: 'FIRST_POINT' as const, sentence: 'There is no point to stand on.' };
      return { ...head, method: 'full', reason, bytes: GIB };
    }
    if (index === 1) {
      const reason = { code: 'NO_CHANGE_RECORD' as const, sentence: 'A raw image keeps no record.' };
      return { ...head, method: 'compare', reason, bytes: null };
    }
    return {
      ...head,
      method: null,
      reason: { code: 'REMOVABLE', sentence: 'It is a CD-ROM.' },
      bytes: null,
    };
  });
  return { vmId: vm.id, repositoryId, disks, totalBytes: null };
}

/** A committed point of the machine, every disk full. */
export function newPoint(
  vm: VmView,
  facts: { type: 'full' | 'incremental'; sequence: number; repositoryId: RepositoryId },
): BackupView {
  const layers = vm.disks.map((disk) => ({
    id: newId<LayerId>(),
    diskId: disk.id,
    diskName: disk.name,
    parentLayerId: null,
    sizeBytes: disk.sizeBytes,
    fileBytes: GIB,
    method: 'full' as const,
    reason: { code: 'FIRST_POINT' as const, sentence: 'There is no point to stand on.' },
    changeIdFrom: null,
    changeIdTo: 'x',
    bytesRead: GIB,
    bytesWritten: GIB,
    bytesZeroed: 0,
  }));
  return {
    id: newId<PointId>(),
    vmId: vm.id,
    vmName: vm.name,
    repositoryId: facts.repositoryId,
    runId: newId<RunId>(),
    sequence: facts.sequence,
    type: facts.type,
    consistency: 'crash',
    capturedAt: NOW,
    committedAt: NOW,
    fileBytes: GIB * layers.length,
    layers,
  };
}

/** An export as it is once clients can read it. */
export function newExport(input: ExportRequest): ExportView {
  const id = newId<ExportId>();
  const name =
    input.pointId === null
      ? `migration-vol-${(input.volumeId ?? '').toLowerCase()}`
      : `backup-web-01-disk0-full-20261121T090000Z-${id.slice(-8).toLowerCase()}`;
  return {
    id,
    name,
    kind: input.pointId === null ? 'volume' : 'point',
    state: 'published',
    pointId: input.pointId,
    diskId: input.pointId === null ? null : newId<DiskId>(),
    runId: null,
    volumeId: input.volumeId,
    isReadOnly: input.isReadOnly,
    sizeBytes: 8 * GIB,
    uris: [`nbd://127.0.0.1:10809/${name}`, `nbd+unix:///${name}?socket=%2Frun%2Fnbd.sock`],
    identity: input.identity,
    imagePath: input.overlayPath ?? '/repo/layer.qcow2',
    createdAt: NOW,
    expiresAt: input.ttlSeconds === 0 ? null : NOW,
    materialization: null,
    problem: null,
  };
}

export const DAEMON: ExportDaemonView = {
  isRunning: true,
  status: {
    version: 1,
    pid: 4711,
    processStartTime: '123456',
    startedAt: NOW,
    exportsDirectory: '/etc/holdfast/exports.d',
    generation: 3,
    appliedAt: NOW,
    readAtMs: 1234.5,
    listeners: [
      {
        ...{ id: 'tcp', address: { kind: 'tcp', host: '127.0.0.1', port: 10809 }, tls: 'psk' },
        ...{ state: 'up', pid: 4712, restarts: 1, error: null },
      },
      {
        ...{ id: 'unix', address: { kind: 'unix', path: '/run/nbd.sock' }, tls: 'none' },
        ...{ state: 'down', pid: null, restarts: 0 },
        error: { code: 'INTERNAL', message: 'it ended' },
      },
    ],
    files: [
      {
        ...{ file: 'a.conf', digest: 'd1', name: 'a', state: 'served', listeners: ['tcp'] },
        ...{ sizeBytes: GIB, format: 'qcow2', isReadOnly: false, description: null, error: null },
        materialize: { state: 'running', doneBytes: 1, totalBytes: GIB, error: null },
      },
      {
        ...{ file: 'b.conf', digest: 'd2', name: null, state: 'failed', listeners: [] },
        ...{ sizeBytes: null, format: null, isReadOnly: null, description: null, materialize: null },
        error: { code: 'INVALID_INPUT', message: 'format must be stated' },
      },
    ],
    events: [{ at: NOW, kind: 'storage-daemon-restarted', listener: 'tcp', message: 'with 2 exports' }],
  },
  problem: null,
};

export const FOUND_DEVICES: FoundDeviceView[] = [
  {
    ...{ devicePath: '/dev/sdb', deviceNumber: '8:16', type: 'disk', sizeBytes: 8 * GIB, model: 'QEMU DISK' },
    ...{ identities: ['wwn:0x5000c500a1b2c3d4', 'serial:QEMU_1'], inUseBy: [], volumeId: null },
  },
  {
    ...{ devicePath: '/dev/loop0', deviceNumber: '7:0', type: 'loop', sizeBytes: GIB, model: null },
    ...{ identities: [], inUseBy: ['mounted on /mnt'], volumeId: null },
  },
];

/** What the agent of a push gets: the first disk whole, the others by what changed. */
export function newPush({ disks }: VmView): PushView {
  const list = disks.map((disk, index): PushDiskView => {
    const exportName = `backup-web-01-disk${disk.number}-full-20261121T090000Z-0000000${index}`;
    return {
      diskId: disk.id,
      diskName: disk.name,
      number: disk.number,
      exportId: newId<ExportId>(),
      exportName,
      uris: [`nbd://127.0.0.1:10809/${exportName}`],
      sizeBytes: disk.sizeBytes,
      method: index === 0 ? 'full' : 'bitmap',
      reason:
        index === 0
          ? { code: 'FIRST_POINT', sentence: 'There is no point to stand on.' }
          : { code: 'BITMAP', sentence: 'It counts from the last point.' },
      changeIdFrom: index === 0 ? null : 'holdfast-1',
      parentSizeBytes: index === 0 ? null : disk.sizeBytes,
      isCompleted: false,
      changeIdTo: null,
    };
  });
  return {
    exports: list.map(({ diskName, uris }) => `${diskName}=${uris[0]}`).join(' '),
    hash: 'xxh3-128',
    clusterBytes: 65_536,
    silenceMs: 300_000,
    disks: list,
  };
}
