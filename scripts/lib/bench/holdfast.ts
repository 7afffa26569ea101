import { mkdtemp, rm } from 'node:fs/promises';
import path from 'node:path';
import { systemClock } from '../../../src/lib/clock.js';
import { dataOf, openApi, pointOf, waitForRun, type ApiClient, type ApiRun } from '../api-client.js';
import { findFreePort, startDaemon, stopDaemon } from '../daemon.js';
import { daemonSubject, measure, rssOfTree, type Subject, type Usage } from './usage.js';

const RUN_TIMEOUT_MS = 1_800_000;
/** How often the end of a run is asked for. Seldom: each answer is work that the daemon does beside the run. */
const POLL_MS = 100;

/** A private daemon with everything it keeps in one directory. */
export class BenchDaemon {
  readonly subject: Subject;

  private constructor(
    readonly api: ApiClient,
    private readonly place: { stateDirectory: string; runtimeDirectory: string },
    readonly pid: number,
  ) {
    this.subject = daemonSubject(pid);
  }

  static async start(directory: string): Promise<BenchDaemon> {
    const place = {
      stateDirectory: path.join(directory, 'state'),
      runtimeDirectory: await mkdtemp('/tmp/hf-bench-'),
    };
    try {
      const settings = { snapshot: { scratchDirectory: path.join(directory, 'scratch') } };
      const port = await findFreePort();
      const daemon = await startDaemon({ ...place, port, settings, isDetached: false });
      return new BenchDaemon(await openApi(daemon), place, daemon.pid);
    } catch (error) {
      await rm(place.runtimeDirectory, { recursive: true, force: true });
      throw error;
    }
  }

  idleRssBytes(): number {
    return rssOfTree(this.subject.pids());
  }

  async stop(): Promise<void> {
    await stopDaemon(this.place.stateDirectory);
    await rm(this.place.runtimeDirectory, { recursive: true, force: true });
  }

  async createRepository(root: string): Promise<string> {
    const body = {
      ...{ name: path.basename(root), root, hash: 'xxh3-128' as const },
      ...{ mode: 'create' as const, takeover: false },
    };
    return dataOf(await this.api.POST('/repositories', { body })).id;
  }

  async addVm(name: string, uri: string): Promise<{ vmId: string; diskId: string }> {
    const source = { kind: 'nbd' as const, uri, changeTracking: 'auto' as const };
    const vm = dataOf(await this.api.POST('/vms', { body: { name, disks: [{ name: 'disk0', source }] } }));
    return { vmId: vm.id, diskId: vm.disks[0]?.id ?? '' };
  }

  async discover(uri: string, name: string): Promise<string> {
    const body = { kind: 'libvirt' as const, uri, names: [name] };
    const [vm] = dataOf(await this.api.POST('/vms/discover', { body })).items;
    if (vm === undefined) throw new Error(`${name} was not discovered`);
    return vm.id;
  }

  async backup(wanted: {
    vmId: string;
    repositoryId: string;
    type: 'full' | 'incremental';
    consistency?: 'prefer' | 'never';
  }): Promise<{ usage: Usage; pointId: string }> {
    const body = {
      consistency: 'prefer' as const,
      ...wanted,
      bitmaps: [],
      bytesPerSecond: 0,
      disks: { include: [], exclude: [] },
      whenBusy: 'refuse' as const,
    };
    const { usage, result } = await this.#measureRun(async () =>
      dataOf(await this.api.POST('/backups', { body })),
    );
    return { usage, pointId: pointOf(result) };
  }

  async restore(options: { pointId: string; diskId: string; file: string }): Promise<Usage> {
    const { pointId, diskId, file } = options;
    const target = { kind: 'file' as const, path: file, format: 'raw' as const };
    const body = { pointId, disks: [{ diskId, target }], overwrite: false, acceptDamage: false };
    return (await this.#measureRun(async () => dataOf(await this.api.POST('/restore/images', { body }))))
      .usage;
  }

  async topOfChain(pointId: string): Promise<string> {
    const chain = dataOf(await this.api.GET('/backups/{id}/chain', { params: { path: { id: pointId } } }));
    const top = chain.items[0]?.layers[0];
    if (top === undefined) throw new Error(`point ${pointId} has no chain`);
    return top.path;
  }

  /** From the request to the end that the run records: both are times of this host. */
  async #measureRun(request: () => Promise<ApiRun>): Promise<{ usage: Usage; result: ApiRun }> {
    const startMs = systemClock.nowMs();
    const { usage, result } = await measure(this.subject, async () => {
      const { id } = await request();
      return waitForRun(this.api, id, { timeoutMs: RUN_TIMEOUT_MS, intervalMs: POLL_MS });
    });
    const wallSeconds = (Date.parse(result.endedAt ?? '') - startMs) / 1000;
    return { usage: { ...usage, wallSeconds }, result };
  }
}
