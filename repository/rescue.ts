import { AppError, isErrorCode, toAppError } from '../src/lib/errors.js';
import { isUlid, type PointId, type VmId } from '../src/lib/id.js';
import { openChain } from './chain.js';
import { checkRepository } from './check.js';
import type { CheckReport } from './check-report.js';
import type { RepositoryContext } from './context.js';
import { listPointIds, readManifest } from './manifest.js';
import { openContext } from './open.js';
import {
  copyChain,
  type ChainCopyLimits,
  type ChainCopyOptions,
  type ChainCopyProgress,
  type ChainCopyResult,
} from './read-chain.js';
import type { ManifestDisk, PointManifest } from './types.js';
import { listVmIds, readVm } from './vm-record.js';

/** A VM as far as it can be read. */
export interface SurveyedVm {
  vmId: VmId;
  /** From `vm.json`, else from the newest manifest, else null. */
  name: string | null;
  /** By sequence; only those that read and verify. */
  points: PointManifest[];
  /** What could not be read, each with the reason. */
  unreadable: { pointId: PointId | null; reason: string }[];
}

export interface RescueRestoreOptions {
  pointId: string;
  /** Disk id, number or name; may be left out when the point has one disk. */
  disk?: string | undefined;
  acceptDamage: boolean;
  limits: ChainCopyLimits;
  signal: AbortSignal;
  onProgress?: ((progress: ChainCopyProgress) => void) | undefined;
  /** Prepares what is written to; called once the chain was found whole. The caller completes or discards it. */
  openSink: (disk: ManifestDisk) => Promise<Pick<ChainCopyOptions, 'sink' | 'isZeroed'>>;
}

/**
 * Reading a repository with nothing but its directory: no daemon, no database, no ownership. Goes on
 * past what is damaged wherever that is possible, and never writes.
 */
export class RescueRepository {
  private constructor(private readonly context: RepositoryContext) {}

  /** REPOSITORY_OFFLINE without a marker. */
  static async open(root: string): Promise<RescueRepository> {
    return new RescueRepository(await openContext({ root }));
  }

  async survey(): Promise<SurveyedVm[]> {
    const vms: SurveyedVm[] = [];
    for (const vmId of await listVmIds(this.context)) vms.push(await this.#surveyVm(vmId));
    return vms;
  }

  check(options: { content: boolean; pointId?: string; signal: AbortSignal }): Promise<CheckReport> {
    const { content, pointId, signal } = options;
    return checkRepository(this.context, {
      content,
      signal,
      ...(pointId === undefined ? {} : { pointId: toPointId(pointId) }),
    });
  }

  /** Restores one disk, every block held against its hash. LAYER_CORRUPT at the first mismatch unless damage is accepted. */
  async restore(options: RescueRestoreOptions): Promise<ChainCopyResult> {
    const point = await this.#findPoint(toPointId(options.pointId));
    const disk = selectDisk(point, options.disk);
    const chain = await openChain(this.context, point, disk.diskId);
    const sink = await options.openSink(disk);
    const { acceptDamage, limits, signal, onProgress } = options;
    return copyChain({ chain, ...sink, hash: point.hash, acceptDamage, limits, signal, onProgress });
  }

  async #surveyVm(vmId: VmId): Promise<SurveyedVm> {
    const vm: SurveyedVm = { vmId, name: null, points: [], unreadable: [] };
    for (const pointId of await listPointIds(this.context, vmId)) {
      try {
        vm.points.push((await readManifest(this.context, vmId, pointId)).manifest);
      } catch (error) {
        vm.unreadable.push({ pointId, reason: reasonOf(error) });
      }
    }
    vm.points.sort((a, b) => a.sequence - b.sequence);
    try {
      vm.name = (await readVm(this.context, vmId)).name;
    } catch (error) {
      vm.unreadable.push({ pointId: null, reason: reasonOf(error) });
      vm.name = vm.points.at(-1)?.vmName ?? null;
    }
    return vm;
  }

  async #findPoint(pointId: PointId): Promise<PointManifest> {
    for (const vmId of await listVmIds(this.context)) {
      try {
        return (await readManifest(this.context, vmId, pointId)).manifest;
      } catch (error) {
        if (!isErrorCode(error, 'POINT_NOT_FOUND')) throw error;
      }
    }
    throw new AppError('POINT_NOT_FOUND', 'the repository has no such recovery point', {
      details: { pointId },
    });
  }
}

/** Damage of one file is an answer of the survey; a repository that is gone is not. */
function reasonOf(error: unknown): string {
  if (isErrorCode(error, 'REPOSITORY_OFFLINE')) throw error;
  return toAppError(error).message;
}

function toPointId(text: string): PointId {
  if (isUlid(text)) return text as PointId;
  throw new AppError('INVALID_INPUT', 'a point id has 26 characters, as `list` shows it', {
    details: { field: 'point' },
  });
}

function selectDisk(point: PointManifest, wanted: string | undefined): ManifestDisk {
  const names = point.disks.map((disk) => `${disk.number} (${disk.name})`).join(', ');
  const matching = point.disks.filter(
    (disk) => wanted === undefined || [disk.diskId, String(disk.number), disk.name].includes(wanted),
  );
  const [disk] = matching;
  if (disk !== undefined && matching.length === 1) return disk;
  const problem = disk === undefined ? 'the point has no such disk' : 'several disks fit';
  throw new AppError('INVALID_INPUT', `${problem}; it has ${names}`, { details: { field: 'disk' } });
}
