import {
  type DiskId,
  type ExportId,
  type LayerId,
  newId,
  type PointId,
  type RepositoryId,
  type RunId,
  type TokenId,
  type VmId,
  type VolumeId,
} from '../../src/lib/id.js';
import type { PointManifest } from '../../repository/index.js';
import type {
  Database,
  DeviceMappingRow,
  ExportRow,
  LayerRow,
  PointRow,
  RepositoryRow,
  RunRow,
  TokenRow,
  VmRow,
  VolumeRow,
} from '../../src/db/index.js';

/** A time on a fixed day, so many milliseconds after midnight. */
export function time(ms: number): string {
  return new Date(Date.UTC(2026, 10, 21) + ms).toISOString();
}

export function repositoryRow(change: Partial<RepositoryRow> = {}): RepositoryRow {
  const id = newId<RepositoryId>();
  return {
    id,
    name: `repository ${id}`,
    root: `/srv/${id}`,
    hash: 'xxh3-128',
    createdAt: time(0),
    ...change,
  };
}

export function vmRow(change: Partial<VmRow> = {}, diskCount = 1): VmRow {
  const id = change.id ?? newId<VmId>();
  const disks = Array.from({ length: diskCount }, (_item, index) => ({
    id: newId<DiskId>(),
    vmId: id,
    number: index,
    name: `disk ${index}`,
    sizeBytes: 2 ** 43 + index,
    lineage: `lineage ${index}`,
    source: { kind: 'nbd', uri: 'nbd://host/ä' },
    facts: null,
  }));
  return {
    ...{ id, name: `vm ${id}`, createdAt: time(0), sourceKey: null, source: null, facts: null },
    ...{ disks, ...change },
  };
}

export function runRow(change: Partial<RunRow> = {}): RunRow {
  return {
    id: newId<RunId>(),
    kind: 'backup',
    state: 'queued',
    stage: null,
    vmId: null,
    repositoryId: null,
    pointId: null,
    attempt: 1,
    createdAt: time(0),
    startedAt: null,
    endedAt: null,
    progressAt: null,
    cancelRequested: false,
    workerId: null,
    heartbeatAt: null,
    request: { kind: 'backup', type: 'full' },
    progress: { disks: [] },
    error: null,
    result: null,
    ...change,
  };
}

export function tokenRow(change: Partial<TokenRow> = {}): TokenRow {
  const id = newId<TokenId>();
  return { id, name: 'admin', hash: id.padStart(64, '0'), createdAt: time(0), lastUsedAt: null, ...change };
}

export function exportRow(change: Partial<ExportRow> = {}): ExportRow {
  const id = newId<ExportId>();
  return {
    id,
    name: `export-${id}`,
    kind: 'point',
    state: 'publishing',
    pointId: null,
    diskId: null,
    runId: null,
    volumeId: null,
    createdAt: time(0),
    expiresAt: null,
    facts: { isReadOnly: true },
    ...change,
  };
}

export function volumeRow(change: Partial<VolumeRow> = {}): VolumeRow {
  const id = newId<VolumeId>();
  return {
    id,
    name: `volume ${id}`,
    provider: 'host',
    identity: `wwn:${id}`,
    sizeBytes: 2 ** 43 + 1,
    createdAt: time(0),
    facts: { model: 'LUN' },
    mapping: null,
    ...change,
  };
}

/** A device that no other mapping of the tests has. */
export function mappingRow(change: Partial<DeviceMappingRow> = {}): DeviceMappingRow {
  const id = newId();
  return {
    devicePath: `/dev/${id}`,
    deviceNumber: `8:${id}`,
    attachedAt: time(1),
    verifiedAt: time(1),
    ...change,
  };
}

export interface PointEntry {
  point: PointRow;
  layers: LayerRow[];
}

/** A point of the VM in the repository, each layer on the parent's layer of the same disk. */
export function pointEntry(
  vm: VmRow,
  repository: RepositoryRow,
  options: { sequence?: number; parent?: PointEntry; committedAt?: string; manifestPadding?: string } = {},
): PointEntry {
  const { sequence = 1, parent, committedAt = time(sequence) } = options;
  const id = newId<PointId>();
  const layers = vm.disks.map((disk, index) => ({
    id: newId<LayerId>(),
    pointId: id,
    repositoryId: repository.id,
    diskId: disk.id,
    parentLayerId: parent?.layers[index]?.id ?? null,
  }));
  const point: PointRow = {
    id,
    vmId: vm.id,
    repositoryId: repository.id,
    runId: newId<RunId>(),
    sequence,
    type: parent === undefined ? 'full' : 'incremental',
    capturedAt: time(sequence),
    committedAt,
    fileBytes: 1000 * sequence,
    manifest: manifest({ vm, repository, id, sequence, padding: options.manifestPadding ?? '' }),
  };
  return { point, layers };
}

function manifest(of: {
  vm: VmRow;
  repository: RepositoryRow;
  id: PointId;
  sequence: number;
  padding: string;
}): PointManifest {
  return {
    formatVersion: 1,
    repositoryId: of.repository.id,
    pointId: of.id,
    vmId: of.vm.id,
    vmName: `${of.vm.name}${of.padding}`,
    runId: newId<RunId>(),
    sequence: of.sequence,
    type: 'full',
    capturedAt: time(of.sequence),
    committedAt: time(of.sequence),
    consistency: 'crash',
    hash: 'xxh3-128',
    previous: null,
    disks: [],
  };
}

/** A VM and a repository that stand in the database. */
export async function addPair(
  db: Database,
  diskCount = 1,
): Promise<{ vm: VmRow; repository: RepositoryRow }> {
  const vm = vmRow({}, diskCount);
  const repository = repositoryRow();
  await db.vms.insert(vm);
  await db.repositories.insert(repository);
  return { vm, repository };
}
