import { once } from 'node:events';
import type {
  Actor,
  BackupRequest,
  DiscoverRequest,
  DiscoverResult,
  Engine,
  IdempotencyKey,
  MachineRestoreRequest,
  NewRepository,
  NewVm,
  PushCompletion,
  PushReport,
  PushRequest,
  RestoreRequest,
} from '../../src/engine/engine.js';
import {
  ENDED_STATES,
  type BackupEstimate,
  type BackupView,
  type ChainView,
  type ComponentHealth,
  type DiskView,
  type DoctorFinding,
  type Page,
  type PageRequest,
  type PushDiskView,
  type RepositoryView,
  type RunView,
  type TokenView,
  type VmView,
} from '../../src/engine/types.js';
import { AppError } from '../../src/lib/errors.js';
import {
  newId,
  type DiskId,
  type PointId,
  type RepositoryId,
  type TokenId,
  type VmId,
} from '../../src/lib/id.js';
import { FakeAttachments } from './fake-attachments.js';
import {
  discover,
  estimate,
  find,
  FOUND,
  GIB,
  newPoint,
  newPush,
  NOW,
  pageOf,
  release,
  WELL,
} from './fake-views.js';

/** The use cases in memory: runs stand still until a test moves them with `moveRun`. */
export class FakeEngine extends FakeAttachments implements Engine {
  readonly secrets = new Map<string, Actor>();
  readonly repositories: RepositoryView[] = [];
  readonly vms: VmView[] = [];
  readonly points: BackupView[] = [];
  readonly tokens: TokenView[] = [];
  readonly #idempotent = new Map<
    string,
    { hash: string; answer: { status: number; body: unknown } | null }
  >();
  components: ComponentHealth[] = structuredClone(WELL);
  findings: DoctorFinding[] = structuredClone(FOUND);
  /** Thrown by the next call of any listing. */
  fault: Error | null = null;

  /** As new, but for the first token: one server can serve many tests. */
  reset(): void {
    for (const list of [this.repositories, this.vms, this.points, this.runs, this.runLog, this.requests]) {
      list.length = 0;
    }
    const [first] = this.secrets;
    this.resetAttachments();
    this.tokens.length = 1;
    this.secrets.clear();
    if (first !== undefined) this.secrets.set(...first);
    this.#idempotent.clear();
    this.components = structuredClone(WELL);
    this.findings = structuredClone(FOUND);
    this.fault = null;
    this.isPushSlow = false;
  }

  addToken(name: string): string {
    const secret = `hf_${newId<string>()}`;
    const id = newId<TokenId>();
    this.tokens.push({ id, name, createdAt: NOW, lastUsedAt: null });
    this.secrets.set(secret, { tokenId: id, tokenName: name });
    return secret;
  }

  async createRepository(input: NewRepository): Promise<RepositoryView> {
    this.requests.push(input);
    if (this.repositories.some(({ name }) => name === input.name)) {
      throw new AppError('CONFLICT', 'a repository of this name is there already');
    }
    const capacity = {
      totalBytes: 100 * GIB,
      freeBytes: 40 * GIB,
      reserveBytes: 5 * GIB,
      availableBytes: 35 * GIB,
    };
    const view: RepositoryView = {
      id: newId<RepositoryId>(),
      name: input.name,
      root: input.root,
      hash: input.hash,
      createdAt: NOW,
      isOnline: true,
      capacity,
      problem: null,
    };
    this.repositories.push(view);
    return view;
  }
  async listRepositories(page: PageRequest): Promise<Page<RepositoryView>> {
    this.#failOnRequest();
    return pageOf(this.repositories, page);
  }
  async getRepository(id: RepositoryId): Promise<RepositoryView> {
    return find(this.repositories, id, 'repository');
  }
  async checkRepository(
    id: RepositoryId,
    options: { content: boolean; vmId: VmId | null; pointId: PointId | null },
  ): Promise<RunView> {
    find(this.repositories, id, 'repository');
    return this.addRun({ kind: 'check', ...options }, { repositoryId: id });
  }
  async rescanRepository(id: RepositoryId): Promise<RunView> {
    find(this.repositories, id, 'repository');
    return this.addRun({ kind: 'rescan' }, { repositoryId: id });
  }

  async addVm(input: NewVm): Promise<VmView> {
    this.requests.push(input);
    const id = newId<VmId>();
    const disks = input.disks.map((disk, number) => ({
      id: newId<DiskId>(),
      vmId: id,
      number,
      name: disk.name,
      sizeBytes: 8 * GIB,
      source: disk.source,
      facts: null,
    }));
    const view = { id, name: input.name, createdAt: NOW, machine: null, disks };
    this.vms.push(view);
    return view;
  }
  async listVms(page: PageRequest): Promise<Page<VmView>> {
    this.#failOnRequest();
    return pageOf(this.vms, page);
  }
  async getVm(id: VmId): Promise<VmView> {
    return find(this.vms, id, 'virtual machine');
  }
  async removeVm(id: VmId): Promise<void> {
    this.vms.splice(this.vms.indexOf(await this.getVm(id)), 1);
  }

  discoveryProblems: DiscoverResult['problems'] = [];

  async discoverVms(input: DiscoverRequest): Promise<DiscoverResult> {
    this.requests.push(input);
    const found = discover(input);
    this.vms.push(...found);
    return { vms: found, problems: this.discoveryProblems };
  }
  async listVmDisks(id: VmId): Promise<DiskView[]> {
    return (await this.getVm(id)).disks;
  }
  async releaseVm(id: VmId): Promise<{ removed: string[]; kept: string[] }> {
    return release(await this.getVm(id));
  }

  async estimateBackup(input: Parameters<Engine['estimateBackup']>[0]): Promise<BackupEstimate> {
    this.requests.push(input);
    return estimate(find(this.vms, input.vmId, 'virtual machine'), input.repositoryId);
  }
  async requestBackup(input: BackupRequest): Promise<RunView> {
    this.requests.push(input);
    find(this.vms, input.vmId, 'virtual machine');
    const active = this.runs.find((run) => run.vmId === input.vmId && !ENDED_STATES.includes(run.state));
    if (active !== undefined && input.whenBusy === 'refuse') {
      throw new AppError('RUN_ACTIVE', 'another run of this machine is active', {
        details: { runId: active.id },
      });
    }
    const { type, bitmaps, bytesPerSecond, consistency, disks, vmId, repositoryId } = input;
    return this.addRun(
      { kind: 'backup', type, bitmaps, bytesPerSecond, consistency, disks },
      { vmId, repositoryId, pointId: newId<PointId>() },
    );
  }

  /** Where set, the exports of a push are only there when the client has stopped waiting. */
  isPushSlow = false;

  async requestPush(input: PushRequest, _actor: Actor, signal: AbortSignal): Promise<RunView> {
    this.requests.push(input);
    const vm = find(this.vms, input.vmId, 'virtual machine');
    const { type, consistency, identity, vmId, repositoryId } = input;
    const disks = input.disks.map(({ disk, ...rest }) => ({
      diskId: vm.disks.find(({ id, name }) => id === disk || name === disk)!.id,
      ...rest,
    }));
    const { id } = this.addRun(
      { kind: 'push', type, consistency, identity, disks },
      { vmId, repositoryId, pointId: newId<PointId>() },
    );
    if (this.isPushSlow) await once(signal, 'abort');
    return this.moveRun(id, {
      state: 'running',
      progress: { share: null, bytesPerSecond: 0, etaSeconds: null, disks: [], push: newPush(vm) },
    });
  }
  async reportPush(id: PointId, reports: PushReport[]): Promise<RunView> {
    this.requests.push(reports);
    return this.#pushOf(id);
  }
  async completePushDisk(id: PointId, diskId: DiskId, completion: PushCompletion): Promise<PushDiskView> {
    this.requests.push(completion);
    const disk = this.#pushOf(id).progress.push!.disks.find((one) => one.diskId === diskId);
    if (disk === undefined) throw new AppError('NOT_FOUND', 'the backup has no such disk');
    return Object.assign(disk, { isCompleted: true, changeIdTo: completion.changeId });
  }
  #pushOf(id: PointId): RunView {
    const run = this.runs.find(({ pointId, progress }) => pointId === id && progress.push !== null);
    if (run?.state !== 'running') throw new AppError('RUN_NOT_ACTIVE', 'the backup has ended');
    return run;
  }

  async listBackups(
    filter: { vmId?: VmId | undefined; repositoryId?: RepositoryId | undefined },
    page: PageRequest,
  ): Promise<Page<BackupView>> {
    this.#failOnRequest();
    const points = this.points.filter(
      (point) =>
        (filter.vmId ?? point.vmId) === point.vmId &&
        (filter.repositoryId ?? point.repositoryId) === point.repositoryId,
    );
    return pageOf(points, page);
  }
  async getBackup(id: PointId): Promise<BackupView> {
    const point = this.points.find((candidate) => candidate.id === id);
    if (point === undefined) throw new AppError('POINT_NOT_FOUND', 'there is no point with this id');
    return point;
  }
  async getBackupChain(id: PointId): Promise<ChainView[]> {
    const point = await this.getBackup(id);
    return point.layers.map((layer) => ({
      diskId: layer.diskId,
      diskName: layer.diskName,
      layers: [
        {
          layerId: layer.id,
          pointId: id,
          path: `/repo/${layer.id}.qcow2`,
          sizeBytes: layer.sizeBytes,
          fileBytes: layer.fileBytes,
          method: layer.method,
        },
      ],
    }));
  }
  async getBackupStats() {
    return {
      points: this.points.length,
      fullPoints: this.points.filter(({ type }) => type === 'full').length,
      incrementalPoints: this.points.filter(({ type }) => type === 'incremental').length,
      vms: this.vms.length,
      fileBytes: this.points.reduce((sum, point) => sum + point.fileBytes, 0),
      oldestCapturedAt: this.points.at(-1)?.capturedAt ?? null,
      newestCapturedAt: this.points[0]?.capturedAt ?? null,
    };
  }
  async requestDelete(id: PointId): Promise<RunView> {
    const point = await this.getBackup(id);
    if (point.type === 'full' && this.points.length > 1) {
      const dependents = this.points.filter((other) => other !== point).map((other) => other.id);
      throw new AppError('POINT_HAS_DEPENDENTS', 'other points stand on this one', {
        details: { dependents },
      });
    }
    return this.addRun({ kind: 'delete' }, { vmId: point.vmId, pointId: id });
  }

  async requestRestore(input: RestoreRequest): Promise<RunView> {
    this.requests.push(input);
    const point = await this.getBackup(input.pointId);
    const { disks, overwrite, acceptDamage } = input;
    return this.addRun(
      { kind: 'restore', disks, overwrite, acceptDamage, machine: null },
      { vmId: point.vmId, pointId: point.id },
    );
  }
  async requestMachineRestore(input: MachineRestoreRequest): Promise<RunView> {
    this.requests.push(input);
    const { id: pointId, vmId } = await this.getBackup(input.pointId);
    const { machine, acceptDamage } = input;
    return this.addRun(
      { kind: 'restore', disks: [], overwrite: false, acceptDamage, machine },
      { vmId, pointId },
    );
  }

  async createToken(name: string): Promise<{ token: TokenView; secret: string }> {
    const secret = this.addToken(name);
    return { token: this.tokens.at(-1)!, secret };
  }
  async listTokens(): Promise<TokenView[]> {
    return this.tokens;
  }
  async revokeToken(id: TokenId): Promise<void> {
    this.tokens.splice(this.tokens.indexOf(find(this.tokens, id, 'token')), 1);
    for (const [secret, actor] of this.secrets) if (actor.tokenId === id) this.secrets.delete(secret);
  }
  async authenticate(secret: string): Promise<Actor | null> {
    return this.secrets.get(secret) ?? null;
  }

  async findIdempotent(key: IdempotencyKey): Promise<{ status: number; body: unknown } | null> {
    const known = this.#idempotent.get(key.tokenId + key.key);
    if (known === undefined) {
      this.#idempotent.set(key.tokenId + key.key, { hash: key.requestHash, answer: null });
      return null;
    }
    if (known.hash !== key.requestHash) throw new AppError('IDEMPOTENCY_MISMATCH', 'the key was used before');
    if (known.answer === null) throw new AppError('CONFLICT', 'the first request is still under way');
    return known.answer;
  }
  async saveIdempotent(key: IdempotencyKey, answer: { status: number; body: unknown }): Promise<void> {
    this.#idempotent.set(key.tokenId + key.key, { hash: key.requestHash, answer });
  }
  async dropIdempotent(key: IdempotencyKey): Promise<void> {
    this.#idempotent.delete(key.tokenId + key.key);
  }

  async health(): Promise<ComponentHealth[]> {
    return this.components;
  }
  async doctor(): Promise<DoctorFinding[]> {
    return this.findings;
  }

  /** A committed point of the machine. */
  addPoint(vm: VmView, type: 'full' | 'incremental' = 'full'): BackupView {
    const point = newPoint(vm, {
      type,
      sequence: this.points.length + 1,
      repositoryId: this.repositories[0]?.id ?? newId<RepositoryId>(),
    });
    this.points.unshift(point);
    return point;
  }

  #failOnRequest(): void {
    const fault = this.fault;
    this.fault = null;
    if (fault !== null) throw fault;
  }
}
