import { AppError } from '../src/lib/errors.js';
import type { DiskId, PointId, RunId, VmId } from '../src/lib/id.js';
import { CapacityGauge } from './capacity.js';
import { openChain } from './chain.js';
import { checkRepository } from './check.js';
import type { CheckOptions, CheckReport } from './check-report.js';
import { commitPoint } from './commit.js';
import { readConfigFiles, type ConfigFile } from './config-files.js';
import type { RepositoryContext } from './context.js';
import { deletePoint, dependents } from './delete.js';
import { hashLayer } from './hash-layer.js';
import { acquireLease, type Lease, type LeaseHolder } from './lease.js';
import { readAllManifests, readManifest } from './manifest.js';
import { requireWritable } from './marker.js';
import { OpenLayer, createLayer, discardAbandoned, discardLayer, discardRun } from './partial-layer.js';
import type {
  CommitOptions,
  DeleteResult,
  HashLayerOptions,
  LayerHash,
  NewLayer,
  PartialLayer,
  Repository,
  SweepReport,
} from './repository.js';
import { sweep } from './sweep.js';
import type {
  BackingChain,
  Capacity,
  PointDraft,
  PointManifest,
  RepositoryMarker,
  VmRecord,
} from './types.js';
import { listVmIds, putVm, readVm } from './vm-record.js';

/** The repository over a backend: this file only hands each call to the part that does it. */
export class StoredRepository implements Repository {
  readonly #context: RepositoryContext;
  readonly #gauge: CapacityGauge;

  constructor(context: RepositoryContext) {
    this.#context = context;
    this.#gauge = new CapacityGauge(context);
  }

  get root(): string {
    return this.#context.root;
  }

  get marker(): RepositoryMarker {
    return this.#context.marker;
  }

  capacity(): Promise<Capacity> {
    return this.#gauge.capacity();
  }

  requireSpace(neededBytes: number): Promise<void> {
    return this.#gauge.requireSpace(neededBytes);
  }

  putVm(vm: VmRecord): Promise<void> {
    return putVm(this.#context, vm);
  }

  listVmIds(): Promise<VmId[]> {
    return listVmIds(this.#context);
  }

  readVm(vmId: VmId): Promise<VmRecord> {
    return readVm(this.#context, vmId);
  }

  async listPoints(vmId: VmId): Promise<PointManifest[]> {
    return (await readAllManifests(this.#context, vmId)).map(({ manifest }) => manifest);
  }

  async readPoint(vmId: VmId, pointId: PointId): Promise<PointManifest> {
    return (await readManifest(this.#context, vmId, pointId)).manifest;
  }

  openChain(point: PointManifest, diskId: DiskId): Promise<BackingChain> {
    return openChain(this.#context, point, diskId);
  }

  readConfigFiles(vmId: VmId, pointId: PointId): Promise<ConfigFile[]> {
    return readConfigFiles(this.#context, vmId, pointId);
  }

  async acquireVmLease(vmId: VmId, holder: LeaseHolder): Promise<Lease> {
    await readVm(this.#context, vmId);
    await requireWritable(this.#context);
    const { backend, clock, applianceId, leaseTerms: terms } = this.#context;
    if (applianceId === undefined) throw new AppError('REPOSITORY_FOREIGN', 'opened for reading only');
    return acquireLease({ backend, clock, applianceId, terms }, `vm-${vmId}`, holder);
  }

  async createLayer(layer: NewLayer, lease: Lease): Promise<PartialLayer> {
    await this.#gauge.requireSpace(0);
    return createLayer(this.#context, layer, lease);
  }

  hashLayer(layer: PartialLayer, options: HashLayerOptions = {}): Promise<LayerHash> {
    return hashLayer(this.#context, ownLayer(layer), options);
  }

  discardLayer(layer: PartialLayer): Promise<void> {
    return discardLayer(this.#context, ownLayer(layer));
  }

  discardRun(vmId: VmId, runId: RunId): Promise<string[]> {
    return discardRun(this.#context, vmId, runId);
  }

  discardAbandoned(lease: Lease): Promise<string[]> {
    return discardAbandoned(this.#context, lease);
  }

  async commitPoint(
    draft: PointDraft,
    layers: PartialLayer[],
    options: CommitOptions,
  ): Promise<PointManifest> {
    const manifest = await commitPoint(this.#context, { draft, layers: layers.map(ownLayer) }, options);
    for (const disk of manifest.disks) {
      if (disk.method !== 'full') this.#gauge.noteIncrement(disk.layerFileBytes);
    }
    return manifest;
  }

  dependents(vmId: VmId, pointId: PointId): Promise<PointId[]> {
    return dependents(this.#context, vmId, pointId);
  }

  deletePoint(vmId: VmId, pointId: PointId, lease: Lease): Promise<DeleteResult> {
    return deletePoint(this.#context, { vmId, pointId }, lease);
  }

  check(options: CheckOptions): Promise<CheckReport> {
    return checkRepository(this.#context, options);
  }

  sweep(options: { trashDays?: number } = {}): Promise<SweepReport> {
    return sweep(this.#context, options);
  }
}

function ownLayer(layer: PartialLayer): OpenLayer {
  if (layer instanceof OpenLayer) return layer;
  throw new AppError('INVALID_INPUT', 'the layer was not made by createLayer of this repository');
}
