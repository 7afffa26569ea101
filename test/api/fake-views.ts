import type {
  BackupView,
  ComponentHealth,
  DoctorFinding,
  Page,
  PageRequest,
  VmView,
} from '../../src/engine/types.js';
import { AppError } from '../../src/lib/errors.js';
import { newId, type LayerId, type PointId, type RepositoryId, type RunId } from '../../src/lib/id.js';

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
