import type { Lease, LayerHash, PartialLayer, PointManifest, Repository } from '../../repository/index.js';
import type { DiskRow, VmRow } from '../db/database.js';
import { makeBackupExportName } from '../exports/index.js';
import { CleanupStack } from '../lib/cleanup.js';
import { toTimestamp } from '../lib/clock.js';
import { AppError } from '../lib/errors.js';
import { newId, type DiskId, type LayerId, type PointId } from '../lib/id.js';
import { formatBytes } from '../lib/units.js';
import type { ActiveRun } from './active-run.js';
import {
  announce,
  draftDisk,
  followDisk,
  holdVm,
  indexPoint,
  requireIds,
  vmRecord,
  type PlannedDisk,
} from './backup-steps.js';
import { findHead } from './capture-decision.js';
import type { EngineContext } from './context.js';
import type { PushCompletion } from './engine.js';
import { publishAll, unpublishRun, type ExportSpec } from './export-publisher.js';
import { requireVm } from './machine-use-cases.js';
import { decideOverChain } from './parent-chain.js';
import { followAgent } from './push-agent.js';
import { decidePush, pushLineage } from './push-decision.js';
import type { DiskView, PushDiskRequest, PushDiskView, PushView, RunRequest, RunResult } from './types.js';
import { toDiskView } from './views.js';

type PushRunRequest = Extract<RunRequest, { kind: 'push' }>;

/** What a push works with once it knows where it writes. */
interface Push {
  context: EngineContext;
  run: ActiveRun;
  request: PushRunRequest;
  pointId: PointId;
  repository: Repository;
  lease: Lease;
  vm: VmRow;
  cleanup: CleanupStack;
  isCommitted: boolean;
}

/** A layer that the agent writes. */
interface PushedLayer {
  plan: PlannedDisk;
  layer: PartialLayer;
}

/**
 * One pushed backup: decide (discover), make the layers and publish them (snapshot), follow the agent that writes
 * them (transfer), take them from the network and read back what arrived (verify), commit (finalize). Whatever
 * fails before the manifest is there leaves nothing behind: the exports go first, then the layers.
 */
export async function executePush(context: EngineContext, run: ActiveRun): Promise<RunResult> {
  const request = run.row.request as PushRunRequest;
  const { vmId, repositoryId, pointId } = requireIds(run);
  await run.enter('discover');
  const repository = await context.repositories.open(repositoryId);
  const vm = await requireVm(context, vmId);
  await repository.putVm(vmRecord(vm, []));
  await using cleanup = new CleanupStack();
  const lease = await holdVm(run, repository, { vmId, cleanup });
  const push: Push = { context, run, request, pointId, repository, lease, vm, cleanup, isCommitted: false };
  const plans = await planPush(push);
  await repository.putVm(vmRecord(vm, plans));

  await run.enter('snapshot');
  const layers = await createLayers(push, plans);
  const { view, capturedAtMs } = await publishLayers(push, layers);

  await run.enter('transfer');
  const completions = await followAgent(push, view);
  // Before anything is read: what is written from here on must not reach the layers.
  await run.insist(() => unpublishRun(context, run.id));

  await run.enter('verify');
  await readBack(push, layers, completions);
  await run.enter('finalize');
  const manifest = await commitPush(push, layers, { completions, capturedAtMs });
  push.isCommitted = true;
  await indexPoint(context, run, manifest);
  return { kind: 'backup', pointId };
}

async function planPush(push: Push): Promise<PlannedDisk[]> {
  const { context, run, request, vm, repository } = push;
  const points = await repository.listPoints(vm.id);
  const plans: PlannedDisk[] = [];
  for (const wanted of request.disks) {
    const row = vm.disks.find(({ id }) => id === wanted.diskId);
    if (row === undefined) throw new AppError('NOT_FOUND', `${vm.name} has no disk ${wanted.diskId}`);
    plans.push(await planDisk(push, { row, wanted, points }));
  }
  announce(run, plans);
  for (const planned of plans) if (!isReadHere(planned.disk)) await followDisk(context, run, planned);
  return plans;
}

async function planDisk(
  { request, repository, run, cleanup }: Push,
  { row, wanted, points }: { row: DiskRow; wanted: PushDiskRequest; points: readonly PointManifest[] },
): Promise<PlannedDisk> {
  const disk = toDiskView(row);
  const probe = {
    sizeBytes: wanted.sizeBytes ?? disk.sizeBytes,
    lineage: wanted.lineage ?? (isReadHere(disk) ? pushLineage(disk.id) : row.lineage),
  };
  const head = findHead(points, disk.id);
  const { type } = request;
  const { changeIds } = wanted;
  const { decision } = await decideOverChain({
    repository,
    head: points.find(({ pointId }) => pointId === head?.pointId),
    diskId: disk.id,
    decide: (damage) => decidePush({ type, diskName: disk.name, probe, head, damage, changeIds }),
    cleanup,
    signal: run.signal,
  });
  return { disk, probe, decision };
}

/**
 * A disk that Holdfast reads by itself has another lineage when it is pushed: the change records of the one say
 * nothing of the other.
 */
function isReadHere({ source }: DiskView): boolean {
  return source !== null && source.kind !== 'push';
}

async function createLayers(push: Push, plans: readonly PlannedDisk[]): Promise<PushedLayer[]> {
  const { context, run, repository, lease, vm, cleanup } = push;
  const layers: PushedLayer[] = [];
  for (const plan of plans) {
    const layer = await repository.createLayer(
      {
        vmId: vm.id,
        diskId: plan.disk.id,
        runId: run.id,
        layerId: newId<LayerId>(context.clock.nowMs()),
        sizeBytes: plan.probe.sizeBytes,
        parentLayerId: plan.decision.parent?.layerId ?? null,
      },
      lease,
    );
    cleanup.defer(() => (push.isCommitted ? undefined : repository.discardLayer(layer)));
    layers.push({ plan, layer });
  }
  return layers;
}

/**
 * Shows the layers to the agent. The instant at which they are there counts as the point's: the agent's own
 * snapshot is made, or has been made, about then, and nobody here can tell better.
 */
async function publishLayers(
  push: Push,
  layers: readonly PushedLayer[],
): Promise<{ view: PushView; capturedAtMs: number }> {
  const { context, run, cleanup, repository } = push;
  const nowMs = context.clock.nowMs();
  cleanup.defer(() => run.insist(() => unpublishRun(context, run.id)));
  const published = await publishAll(
    context,
    layers.map((layer) => exportOf(push, layer, nowMs)),
    run.signal,
  );
  const disks = layers.map(({ plan }, index): PushDiskView => {
    const found = published[index];
    if (found === undefined) throw new AppError('INTERNAL', `${plan.disk.name} was not published`);
    return {
      diskId: plan.disk.id,
      diskName: plan.disk.name,
      number: plan.disk.number,
      exportId: found.row.id,
      exportName: found.row.name,
      uris: found.uris,
      sizeBytes: plan.probe.sizeBytes,
      method: plan.decision.method === 'full' ? 'full' : 'bitmap',
      reason: plan.decision.reason,
      changeIdFrom: plan.decision.changeIdFrom,
      parentSizeBytes: plan.decision.parent?.sizeBytes ?? null,
      isCompleted: false,
      changeIdTo: null,
    };
  });
  const capturedAtMs = context.clock.nowMs();
  const { hash, clusterBytes } = repository.marker;
  const { silenceMs } = context.settings.push;
  const exports = disks.map(({ diskName, uris }) => `${encodeURIComponent(diskName)}=${uris[0] ?? ''}`);
  return { view: { exports: exports.join(' '), hash, clusterBytes, silenceMs, disks }, capturedAtMs };
}

function exportOf(
  { run, request, vm, pointId }: Push,
  { plan, layer }: PushedLayer,
  nowMs: number,
): ExportSpec {
  const { disk, probe, decision } = plan;
  const { layerId } = layer;
  const type = decision.method === 'full' ? 'full' : 'incr';
  return {
    kind: 'push',
    pointId,
    diskId: disk.id,
    runId: run.id,
    volumeId: null,
    layerId,
    name: makeBackupExportName({
      vmName: vm.name,
      diskNumber: disk.number,
      type,
      createdAtMs: nowMs,
      layerId,
    }),
    imagePath: layer.path,
    format: 'qcow2',
    isReadOnly: false,
    sizeBytes: probe.sizeBytes,
    description: `backup of ${vm.name}, disk ${disk.name}, under way`,
    identity: request.identity,
    expiresAt: null,
    overlay: null,
  };
}

/** Hashes what arrived, and holds it against what the agent says it sent. */
async function readBack(
  { run, repository }: Push,
  layers: readonly PushedLayer[],
  completions: ReadonlyMap<DiskId, PushCompletion>,
): Promise<void> {
  for (const [index, { plan, layer }] of layers.entries()) {
    const found = await repository.hashLayer(layer, {
      signal: run.signal,
      onProgress: (share) => {
        run.setShare((index + share) / layers.length);
      },
    });
    requireAsSent(run, plan.disk, { found, completion: completionOf(completions, plan.disk) });
  }
}

function requireAsSent(
  run: ActiveRun,
  { id, name }: DiskView,
  { found, completion }: { found: LayerHash; completion: PushCompletion },
): void {
  const { sumsDigest, bytesRead, bytesWritten, bytesZeroed, bytesSkipped } = completion;
  if (sumsDigest !== null && sumsDigest !== found.digest) {
    throw new AppError('PUSH_MISMATCH', `${name}: the layer does not hold what the agent says it wrote`, {
      details: { diskId: id, statedDigest: sumsDigest, foundDigest: found.digest },
    });
  }
  const proof = sumsDigest === null ? 'the agent made no digest of it' : 'it is what the agent sent';
  run.log('info', {
    code: 'DISK_PUSHED',
    message: `${name}: ${formatBytes(bytesWritten)} written, read back: ${proof}`,
    details: { diskId: id, bytesRead, bytesWritten, bytesZeroed, bytesSkipped },
  });
}

function completionOf(
  completions: ReadonlyMap<DiskId, PushCompletion>,
  { id, name }: DiskView,
): PushCompletion {
  const completion = completions.get(id);
  if (completion === undefined) throw new AppError('INTERNAL', `disk ${name} was not completed`);
  return completion;
}

async function commitPush(
  { run, repository, lease, vm, pointId, request }: Push,
  layers: readonly PushedLayer[],
  { completions, capturedAtMs }: { completions: ReadonlyMap<DiskId, PushCompletion>; capturedAtMs: number },
): Promise<PointManifest> {
  return repository.commitPoint(
    {
      pointId,
      vmId: vm.id,
      vmName: vm.name,
      runId: run.id,
      capturedAt: toTimestamp(capturedAtMs),
      consistency: request.consistency,
      disks: layers.map(({ plan, layer }) => {
        const { changeId: changeIdTo, ...totals } = completionOf(completions, plan.disk);
        return draftDisk(plan, { layer, changeIdTo, totals });
      }),
    },
    layers.map(({ layer }) => layer),
    {
      lease,
      signal: run.signal,
      onProgress: (share) => {
        run.setShare(share);
      },
    },
  );
}
