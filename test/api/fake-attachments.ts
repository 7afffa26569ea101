import type { Engine, ExportRequest, NewVolume } from '../../src/engine/engine.js';
import type {
  ExportDaemonView,
  ExportView,
  FoundDeviceView,
  OperationView,
  Page,
  PageRequest,
  RunView,
  VolumeView,
} from '../../src/engine/types.js';
import { AppError } from '../../src/lib/errors.js';
import { newId, type ExportId, type PointId, type RunId, type VolumeId } from '../../src/lib/id.js';
import { FakeRuns } from './fake-runs.js';
import { DAEMON, find, FOUND_DEVICES, newExport, NOW, pageOf } from './fake-views.js';

type AttachmentUseCases = Pick<
  Engine,
  | 'createExport'
  | 'listExports'
  | 'getExport'
  | 'removeExport'
  | 'materializeExport'
  | 'getExportDaemon'
  | 'createExportIdentity'
  | 'listExportIdentities'
  | 'removeExportIdentity'
  | 'discoverVolumes'
  | 'createVolume'
  | 'listVolumes'
  | 'getVolume'
  | 'getVolumeDevice'
  | 'attachVolume'
  | 'detachVolume'
  | 'removeVolume'
  | 'getOperation'
>;

/** Exports and volumes in memory. */
export class FakeAttachments extends FakeRuns implements AttachmentUseCases {
  readonly exports: ExportView[] = [];
  readonly users: string[] = [];
  readonly volumes: VolumeView[] = [];
  daemon: ExportDaemonView = structuredClone(DAEMON);
  devices: FoundDeviceView[] = structuredClone(FOUND_DEVICES);

  async createExport(input: ExportRequest): Promise<ExportView> {
    this.requests.push(input);
    const { pointId, volumeId, isReadOnly } = input;
    const same = this.exports.find((one) => one.pointId === pointId && one.volumeId === volumeId);
    if (same !== undefined && isReadOnly) {
      throw new AppError('CONFLICT', 'it is published already', { details: { exportId: same.id } });
    }
    const made = newExport(input);
    this.exports.unshift(made);
    return made;
  }
  async listExports(
    filter: { pointId?: PointId | undefined; volumeId?: VolumeId | undefined },
    page: PageRequest,
  ): Promise<Page<ExportView>> {
    const items = this.exports.filter(
      (one) =>
        (filter.pointId ?? one.pointId) === one.pointId && (filter.volumeId ?? one.volumeId) === one.volumeId,
    );
    return pageOf(items, page);
  }
  async getExport(id: ExportId): Promise<ExportView> {
    return find(this.exports, id, 'export');
  }
  async removeExport(id: ExportId): Promise<void> {
    this.exports.splice(this.exports.indexOf(await this.getExport(id)), 1);
  }
  async materializeExport(id: ExportId): Promise<OperationView> {
    const view = await this.getExport(id);
    const run = this.addRun({ kind: 'materialize', exportId: id });
    view.materialization = { state: 'running', runId: run.id };
    return this.getOperation(run.id);
  }
  async getExportDaemon(): Promise<ExportDaemonView> {
    return this.daemon;
  }
  async createExportIdentity(user: string): Promise<{ user: string; key: string }> {
    if (this.users.includes(user)) throw new AppError('CONFLICT', 'there is such a user already');
    this.users.push(user);
    return { user, key: '00112233445566778899aabbccddeeff' };
  }
  async listExportIdentities(): Promise<{ user: string }[]> {
    return this.users.map((user) => ({ user }));
  }
  async removeExportIdentity(user: string): Promise<void> {
    const index = this.users.indexOf(user);
    if (index === -1) throw new AppError('NOT_FOUND', 'there is no such user');
    this.users.splice(index, 1);
  }

  async discoverVolumes(): Promise<FoundDeviceView[]> {
    return this.devices;
  }
  async createVolume(input: NewVolume): Promise<VolumeView> {
    this.requests.push(input);
    const device = this.devices.find(
      ({ devicePath, identities }) =>
        devicePath === input.devicePath || identities.some((identity) => identity === input.identity),
    );
    if (device === undefined) throw new AppError('VOLUME_GONE', 'no device has this identity');
    const { sizeBytes, devicePath, identities } = device;
    const view: VolumeView = {
      id: newId<VolumeId>(),
      name: input.name ?? devicePath.slice('/dev/'.length),
      provider: 'host',
      identity: input.identity ?? identities[0]!,
      sizeBytes,
      createdAt: NOW,
      mapping: null,
      devicePath,
      problem: null,
    };
    this.volumes.push(view);
    return view;
  }
  async listVolumes(page: PageRequest): Promise<Page<VolumeView>> {
    return pageOf(this.volumes, page);
  }
  async getVolume(id: VolumeId): Promise<VolumeView> {
    return find(this.volumes, id, 'volume');
  }
  async getVolumeDevice(
    id: VolumeId,
  ): Promise<{ devicePath: string; deviceNumber: string; sizeBytes: number }> {
    const { name, mapping, sizeBytes } = await this.getVolume(id);
    if (mapping === null) throw new AppError('CONFLICT', `volume ${name} is not attached`);
    return { devicePath: mapping.devicePath, deviceNumber: mapping.deviceNumber, sizeBytes };
  }
  async attachVolume(id: VolumeId): Promise<OperationView> {
    const view = await this.getVolume(id);
    view.mapping = { devicePath: '/dev/sdb', deviceNumber: '8:16', attachedAt: NOW, verifiedAt: NOW };
    return this.getOperation(this.addRun({ kind: 'attach-volume', volumeId: id }).id);
  }
  async detachVolume(id: VolumeId): Promise<OperationView> {
    (await this.getVolume(id)).mapping = null;
    return this.getOperation(this.addRun({ kind: 'detach-volume', volumeId: id }).id);
  }
  async removeVolume(id: VolumeId): Promise<void> {
    const view = await this.getVolume(id);
    if (view.mapping !== null) throw new AppError('CONFLICT', 'it is attached');
    this.volumes.splice(this.volumes.indexOf(view), 1);
  }
  async getOperation(id: RunId): Promise<OperationView> {
    return operationOf(await this.getRun(id));
  }

  protected resetAttachments(): void {
    for (const list of [this.exports, this.users, this.volumes]) list.length = 0;
    this.daemon = structuredClone(DAEMON);
    this.devices = structuredClone(FOUND_DEVICES);
  }
}

function operationOf({
  id,
  state,
  createdAt,
  endedAt,
  progress,
  error,
  request,
  result,
}: RunView): OperationView {
  const common = { id, state, createdAt, endedAt, share: progress.share, error, result };
  if (request.kind === 'materialize') return { ...common, kind: request.kind, subjectId: request.exportId };
  if (request.kind === 'attach-volume' || request.kind === 'detach-volume') {
    return { ...common, kind: request.kind, subjectId: request.volumeId };
  }
  throw new AppError('NOT_FOUND', 'there is no operation with this id');
}
