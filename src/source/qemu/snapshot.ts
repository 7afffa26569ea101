import { CleanupStack } from '../../lib/cleanup.js';
import type { Consistency } from '../../lib/consistency.js';
import { AppError, toAppError } from '../../lib/errors.js';
import { BASE_ALLOCATION, DIRTY_BITMAP_PREFIX } from '../../nbd/extents.js';
import { takeFrozen } from '../guest-freeze.js';
import type {
  ConfigFile,
  SnapshotDisk,
  SnapshotDiskRequest,
  SnapshotRequest,
  SourceSnapshot,
} from '../source.js';
import type { DiskId } from '../../lib/id.js';
import { readConfigFiles } from './config-files.js';
import { requireSafeThreads } from './devices.js';
import { findDisk, probeOf } from './disk-facts.js';
import { endRun } from './end-run.js';
import { readSchema, requireFeatures } from './features.js';
import {
  addFilters,
  changesBitmapOf,
  exportDisks,
  freezeRecords,
  scratchFileOf,
  startServer,
  viewOf,
  type FleecedDisk,
} from './fleecing.js';
import { openQemuGuest } from './guest-agent.js';
import { SnapshotHealth } from './health.js';
import { prepareInstant } from './instant.js';
import { readMachine, type QemuMachine } from './machine-state.js';
import type { QemuContext } from './qemu-context.js';
import { ownerOfSocket } from './qemu-process.js';
import { checkScratch, type ScratchPlace } from '../libvirt/scratch-watch.js';
import type { QmpClient } from '../../lib/qmp.js';
import { placesOf, type RunPlaces } from './run-places.js';
import { removeBitmaps } from './tear-down.js';

interface Held {
  disks: FleecedDisk[];
  capturedAtMs: number;
  consistency: Consistency;
  configFiles: ConfigFile[];
}

/** Holds all disks of the request as they are at one instant. */
export async function takeSnapshot(context: QemuContext, request: SnapshotRequest): Promise<SourceSnapshot> {
  const places = placesOf(context.settings.snapshot.scratchDirectory, request);
  await using undo = new CleanupStack();
  const held = await hold(context, request, { places, undo });
  const uris = held.disks.map(({ name }) => uriOf(places, viewOf(name)));
  const health = await SnapshotHealth.open({
    uris,
    nbd: context.settings.nbd,
    scratch: scratchOf(context, places.directory),
  });
  undo.release();
  return new QemuSnapshot(context, { request, places, held, health });
}

async function hold(
  context: QemuContext,
  request: SnapshotRequest,
  { places, undo }: { places: RunPlaces; undo: CleanupStack },
): Promise<Held> {
  const { signal, note } = request;
  const { settings, source, host } = context;
  await using qmp = await context.connect(signal);
  const machine = await readMachine(qmp);
  requireFeatures(await readSchema(qmp));
  requireIdle(machine);
  const disks = request.disks.map((disk, index) => chooseDisk(context, machine, { disk, index, places }));
  await requireSafeThreads(
    qmp,
    machine,
    disks.map(({ device }) => device),
  );
  // The monitor serves one client: ours is gone when this one's steps are undone.
  undo.defer(() => endRun(context, { places, record: places.record, note }));
  await host.makeRunDirectory(
    {
      base: places.scratchBase,
      runId: places.runId,
      owner: await ownerOfSocket(source.socket),
      scratch: disks.map(({ name, image }) => ({ name: `${name}.qcow2`, sizeBytes: image.virtualBytes })),
    },
    { signal },
  );
  await checkScratch(scratchOf(context, places.directory), { signal });
  await startServer(qmp, places.serverSocket);
  // A record may be broken on one disk and serve another.
  await removeBitmaps(
    qmp,
    machine,
    (name, { isUsable }) => !isUsable && request.brokenRecords.includes(name),
  );
  await addFilters(qmp, disks, settings.snapshot.cbwTimeoutMs);
  const { capturedAtMs, consistency } = await takeInstant(qmp, context, { request, machine, disks, places });
  await freezeRecords(qmp, disks, places.tag);
  await exportDisks(qmp, disks, places.tag);
  const configFiles = await readConfigFiles(qmp, {
    machine,
    source,
    host,
    disks: request.disks.map(({ disk }, index) => ({
      diskId: disk.diskId,
      target: disks[index]?.device.target ?? '',
    })),
    signal,
  });
  return { disks, capturedAtMs, consistency, configFiles };
}

/** The machine may have changed since it was probed. */
function chooseDisk(
  context: QemuContext,
  machine: QemuMachine,
  { disk: request, index, places }: { disk: SnapshotDiskRequest; index: number; places: RunPlaces },
): FleecedDisk {
  const found = findDisk(machine, request.disk);
  const { image } = found;
  const now = probeOf(machine, context.source.socket, found);
  if (now.lineage !== request.probe.lineage || now.sizeBytes !== request.probe.sizeBytes) {
    throw new AppError('SNAPSHOT_LOST', `disk ${request.disk.name} was exchanged or resized just now`);
  }
  if (request.bitmap !== null) {
    const bitmap = image.bitmaps.find(({ name }) => name === request.bitmap);
    const details = { disk: request.disk.name, bitmap: request.bitmap };
    if (bitmap === undefined) {
      throw new AppError('BITMAP_MISSING', `disk ${request.disk.name} has no bitmap ${request.bitmap}`, {
        details,
      });
    }
    if (!bitmap.isUsable) {
      throw new AppError('BITMAP_INCONSISTENT', `bitmap ${request.bitmap} missed writes`, { details });
    }
  }
  const name = `${places.tag}-${index}`;
  return { ...found, name, scratchFile: scratchFileOf(places.directory, name), bitmap: request.bitmap };
}

const READABLE_STATES = new Set([
  'running',
  'paused',
  'prelaunch',
  'suspended',
  'shutdown',
  'io-error',
  'guest-panicked',
  'watchdog',
  'internal-error',
  'debug',
]);

/** Somebody else's work on the machine's disks goes first. */
function requireIdle({ jobs, isMigrating, runState }: QemuMachine): void {
  const [job] = jobs;
  if (job !== undefined) {
    throw new AppError('SOURCE_BUSY', `a job of type ${job.type} runs on the machine`, {
      details: { job: job.id },
    });
  }
  if (isMigrating || !READABLE_STATES.has(runState)) {
    throw new AppError('SOURCE_BUSY', `the machine is being moved or saved (${runState})`);
  }
}

async function takeInstant(
  qmp: QmpClient,
  context: QemuContext,
  options: { request: SnapshotRequest; machine: QemuMachine; disks: FleecedDisk[]; places: RunPlaces },
): Promise<{ capturedAtMs: number; consistency: Consistency }> {
  const { request, disks, places } = options;
  const { settings, source } = context;
  await using instant = await prepareInstant(qmp, {
    socket: source.socket,
    disks,
    record: places.record,
    settings: settings.snapshot,
    signal: request.signal,
  });
  const { value, consistency } = await takeConsistent(context, options, () => instant.take());
  const { capturedAtMs, pauseMs } = value;
  if (pauseMs > 0) {
    const message = `the machine stood still for ${pauseMs.toFixed(1)} ms`;
    request.note({ level: 'info', code: 'MACHINE_PAUSED', message, details: { pauseMs } });
  }
  return { capturedAtMs, consistency };
}

async function takeConsistent<T>(
  { source, settings }: QemuContext,
  { request, machine }: { request: SnapshotRequest; machine: QemuMachine },
  take: () => Promise<T>,
): Promise<{ value: T; consistency: Consistency }> {
  const { consistency: wish, note, signal } = request;
  if (source.agentSocket !== null && machine.runState === 'running') {
    await using guest = openQemuGuest(source.agentSocket, settings.snapshot);
    return await takeFrozen(guest, { wish, limitMs: settings.snapshot.freezeLimitMs, note, signal }, take);
  }
  const why =
    source.agentSocket === null
      ? 'no guest agent is configured for this machine'
      : `the machine does not run (${machine.runState})`;
  if (wish === 'require') throw new AppError('FREEZE_FAILED', `the guest cannot be frozen: ${why}`);
  if (wish === 'prefer') note({ level: 'warning', code: 'NOT_FROZEN', message: `not frozen: ${why}` });
  return { value: await take(), consistency: 'crash' };
}

function uriOf(places: RunPlaces, name: string): string {
  return `nbd+unix:///${name}?socket=${encodeURIComponent(places.serverSocket)}`;
}

function scratchOf({ host, settings }: QemuContext, directory: string): ScratchPlace {
  return { host, directory, limits: settings.snapshot };
}

class QemuSnapshot implements SourceSnapshot {
  readonly capturedAtMs: number;
  readonly consistency: Consistency;
  readonly disks: ReadonlyMap<DiskId, SnapshotDisk>;
  readonly configFiles: readonly ConfigFile[];
  readonly #context: QemuContext;
  readonly #request: SnapshotRequest;
  readonly #places: RunPlaces;
  readonly #health: SnapshotHealth;
  #isClosed = false;
  #isCommitted = false;

  constructor(
    context: QemuContext,
    run: { request: SnapshotRequest; places: RunPlaces; held: Held; health: SnapshotHealth },
  ) {
    this.#context = context;
    this.#request = run.request;
    this.#places = run.places;
    this.#health = run.health;
    const { capturedAtMs, consistency, configFiles, disks } = run.held;
    this.capturedAtMs = capturedAtMs;
    this.consistency = consistency;
    this.configFiles = configFiles;
    this.disks = new Map(
      run.request.disks.flatMap(({ disk }, index) => {
        const fleeced = disks[index];
        return fleeced === undefined ? [] : [[disk.diskId, this.#describe(fleeced)]];
      }),
    );
  }

  get lost(): AbortSignal {
    return this.#health.lost;
  }

  async close(): Promise<void> {
    const broken = await this.#health.end();
    await this.#end(null);
    if (broken !== null) throw broken;
  }

  async commit(obsolete: string[]): Promise<void> {
    this.#isCommitted = true;
    try {
      await using qmp = await this.#context.connect();
      await removeBitmaps(qmp, await readMachine(qmp), (name) => obsolete.includes(name));
    } catch (error) {
      const { code, message } = toAppError(error);
      this.#request.note({
        level: 'warning',
        code: 'OLD_RECORDS_LEFT',
        message: `records of older points could not be removed: ${message}`,
        details: { code, obsolete },
      });
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#health.end();
    if (!this.#isCommitted) await this.#end(this.#places.record);
    else if (!this.#isClosed) await this.#end(null);
  }

  async #end(record: string | null): Promise<void> {
    await endRun(this.#context, { places: this.#places, record, note: this.#request.note });
    this.#isClosed = true;
  }

  #describe({ name, image, bitmap }: FleecedDisk): SnapshotDisk {
    const dirtyContext =
      bitmap === null ? null : `${DIRTY_BITMAP_PREFIX}${changesBitmapOf(this.#places.tag)}`;
    return {
      endpoint: {
        kind: 'nbd',
        uri: uriOf(this.#places, name),
        connections: this.#context.settings.nbd.connections,
        metaContexts: [BASE_ALLOCATION, ...(dirtyContext === null ? [] : [dirtyContext])],
      },
      dirtyContext,
      changeIdTo: image.canKeepBitmaps || bitmap === null ? this.#places.record : bitmap,
    };
  }
}
