import {
  LAYER_ABSENT,
  type ComposedSums,
  type LayerTables,
  type Lease,
  type PartialLayer,
  type Repository,
} from '../../repository/index.js';
import { CleanupStack } from '../lib/cleanup.js';
import { newId, type LayerId, type RunId, type VmId } from '../lib/id.js';
import { CLUSTER_BYTES, GIB } from '../lib/units.js';
import { captureWindow, markGrown, planWindow, type PlannedWindow } from '../nbd/capture-plan.js';
import {
  addTotals,
  copyWindows,
  NOTHING_COPIED,
  requireSourceSize,
  type CopyTotals,
} from '../nbd/copy-windows.js';
import { walkClusters, type ClusterMap } from '../nbd/extents.js';
import { HASH_BYTES, openCopySession, type CopySession, type CopyWindow } from '../nbd/index.js';
import type { DiskProbe, SnapshotDisk } from '../source/source.js';
import type { CaptureDecision } from './capture-decision.js';
import type { EngineSettings } from './context.js';
import type { DiskView } from './types.js';

/** Stretch of the disk planned at once; bounds memory, not speed: several are in flight. */
const WINDOW_BYTES = GIB;

export interface CaptureContext {
  repository: Repository;
  lease: Lease;
  vmId: VmId;
  runId: RunId;
  settings: EngineSettings['nbd'];
  bytesPerSecond: number;
  signal: AbortSignal;
}

export interface DiskPlan {
  disk: DiskView;
  probe: DiskProbe;
  decision: CaptureDecision;
  /** What the chain holds, for a compare. Whoever made the plan closes it. */
  known: ComposedSums | null;
  /** What the points after the one that the bitmap counts from hold; closed likewise. */
  newer: ComposedSums | null;
}

export interface CaptureMeasure {
  /** Bytes that will be looked at: what the source does not know to be zero, or calls dirty. */
  totalBytes: number;
  /** Bytes that will be written, at the most; null when a compare or a source that knows no zeroes leaves that open. */
  writeBytes: number | null;
}

/**
 * One disk's capture: the source's snapshot is held by the caller for as long as this lives, the partial
 * layer is there, and the copy session appends to it what it reads. Dispose it in any case; `transfer`
 * leaves a layer that is whole and flushed.
 */
export interface DiskCapture extends AsyncDisposable {
  readonly plan: DiskPlan;
  readonly source: SnapshotDisk;
  readonly layer: PartialLayer;
  /** Asks the source anew each time. */
  measure(): Promise<CaptureMeasure>;
  transfer(onProgress: (totals: CopyTotals) => void): Promise<CopyTotals>;
  /** The layer was committed: disposal leaves it alone. */
  finish(): void;
}

export async function openCapture(
  context: CaptureContext,
  plan: DiskPlan,
  source: SnapshotDisk,
): Promise<DiskCapture> {
  await using undo = new CleanupStack();
  const { repository } = context;
  const layer = await repository.createLayer(
    {
      vmId: context.vmId,
      diskId: plan.disk.id,
      runId: context.runId,
      layerId: newId<LayerId>(),
      sizeBytes: plan.probe.sizeBytes,
      parentLayerId: plan.decision.parent?.layerId ?? null,
    },
    context.lease,
  );
  undo.defer(() => repository.discardLayer(layer));
  const tables = undo.use(await layer.openTables());
  const session = undo.use(await openSession(context, { plan, source, layer, tables }));
  requireSourceSize(session, plan.probe.sizeBytes);
  const capture = new NbdCapture({ context, plan, source, session, tables, layer });
  undo.release();
  return capture;
}

async function openSession(
  context: CaptureContext,
  parts: { plan: DiskPlan; source: SnapshotDisk; layer: PartialLayer; tables: LayerTables },
): Promise<CopySession> {
  const { settings, repository, signal } = context;
  return openCopySession(
    {
      source: parts.source.endpoint,
      sink: { kind: 'append', path: parts.layer.path, startOffset: parts.tables.startOffset },
      diskBytes: parts.plan.probe.sizeBytes,
      hash: repository.marker.hash,
      clusterBytes: CLUSTER_BYTES,
      requestBytes: settings.requestBytes,
      requestsInFlight: settings.requestsInFlight,
      rateLimitBytesPerSecond: context.bytesPerSecond,
      connectTimeoutMs: settings.connectTimeoutMs,
      stallTimeoutMs: settings.stallTimeoutMs,
    },
    { signal, sinkRole: 'layer' },
  );
}

class NbdCapture implements DiskCapture {
  readonly plan: DiskPlan;
  readonly source: SnapshotDisk;
  readonly layer: PartialLayer;
  readonly #parts: {
    context: CaptureContext;
    session: CopySession;
    tables: LayerTables;
  };
  #isFinished = false;

  constructor(parts: {
    context: CaptureContext;
    plan: DiskPlan;
    source: SnapshotDisk;
    session: CopySession;
    tables: LayerTables;
    layer: PartialLayer;
  }) {
    this.plan = parts.plan;
    this.source = parts.source;
    this.layer = parts.layer;
    this.#parts = parts;
  }

  async measure(): Promise<CaptureMeasure> {
    let totalBytes = 0;
    let copyBytes = 0;
    for await (const map of this.#walk()) {
      const planned = this.#planned(map);
      totalBytes += planned.plannedBytes;
      copyBytes += planned.copyBytes;
    }
    // Many servers call all of a disk data, whatever is on it.
    const saysSomething = this.source.dirtyContext !== null || copyBytes < this.plan.probe.sizeBytes;
    const isKnown = this.plan.decision.method !== 'compare' && saysSomething;
    return { totalBytes, writeBytes: isKnown ? copyBytes : null };
  }

  async transfer(onProgress: (totals: CopyTotals) => void): Promise<CopyTotals> {
    const { session, tables } = this.#parts;
    const ticker = setInterval(() => {
      onProgress(session.progress());
    }, 250);
    try {
      const totals = await this.#copyAll();
      await tables.finish(this.#reserve);
      await session.flush();
      await session.close();
      await tables.close();
      onProgress(totals);
      return totals;
    } finally {
      clearInterval(ticker);
    }
  }

  finish(): void {
    this.#isFinished = true;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    const { session, tables, context } = this.#parts;
    await using undo = new CleanupStack();
    if (!this.#isFinished) undo.defer(() => context.repository.discardLayer(this.layer));
    undo.use(tables);
    undo.use(session);
  }

  async #copyAll(): Promise<CopyTotals> {
    const { session, tables } = this.#parts;
    let totals = NOTHING_COPIED;
    await copyWindows(session, this.#windows(), async (result) => {
      await this.layer.sums.append(result.entries);
      await tables.append(result, this.#reserve);
      totals = addTotals(totals, result);
    });
    return totals;
  }

  readonly #reserve = (bytes: number): number => this.#parts.session.reserve(bytes);

  async *#windows(): AsyncGenerator<CopyWindow> {
    for await (const map of this.#walk()) {
      const planned = await this.#plannedWith(map);
      if (planned.rows.length > 0) yield captureWindow(this.plan.decision.method, planned);
    }
  }

  async *#walk(): AsyncGenerator<ClusterMap> {
    const { session, context } = this.#parts;
    const maps = walkClusters((offset, length) => session.blockStatus(offset, length), {
      diskBytes: this.plan.probe.sizeBytes,
      clusterBytes: CLUSTER_BYTES,
      dirtyContext: this.source.dirtyContext,
      grantedContexts: session.sourceInfo?.metaContexts ?? [],
      windowBytes: WINDOW_BYTES,
    });
    const parentBytes = this.plan.decision.parent?.sizeBytes;
    for await (const map of maps) {
      context.signal.throwIfAborted();
      if (parentBytes !== undefined && parentBytes < this.plan.probe.sizeBytes) {
        markGrown(map, parentBytes, CLUSTER_BYTES);
      }
      await this.#markNewer(map);
      yield map;
    }
  }

  async #markNewer(map: ClusterMap): Promise<void> {
    const { newer } = this.plan;
    if (newer === null) return;
    const { layers } = await newer.window(map.offset / CLUSTER_BYTES, map.isDirty.length);
    for (const [index, layer] of layers.entries()) if (layer !== LAYER_ABSENT) map.isDirty[index] = 1;
  }

  #planned(map: ClusterMap): PlannedWindow {
    return planWindow(this.plan.decision.method, map, this.#planOptions());
  }

  async #plannedWith(map: ClusterMap): Promise<PlannedWindow> {
    const { known } = this.plan;
    if (known === null) return this.#planned(map);
    const clusters = await known.window(map.offset / CLUSTER_BYTES, map.isZero.length);
    return planWindow(this.plan.decision.method, map, {
      ...this.#planOptions(),
      known: { kinds: clusters.kinds, hashes: clusters.hashes },
    });
  }

  #planOptions(): { clusterBytes: number; hashBytes: number } {
    return { clusterBytes: CLUSTER_BYTES, hashBytes: HASH_BYTES[this.#parts.context.repository.marker.hash] };
  }
}
