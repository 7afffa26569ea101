import { type Lease, type PointManifest, type Repository, type VmRecord } from '../../repository/index.js';
import type { VmRow } from '../db/database.js';
import { toTimestamp } from '../lib/clock.js';
import { CleanupStack } from '../lib/cleanup.js';
import { AppError, toAppError } from '../lib/errors.js';
import type { DiskId, PointId, VmId } from '../lib/id.js';
import { formatBytes } from '../lib/units.js';
import { bitmapNameFor } from '../source/bitmap-name.js';
import { openSource } from '../source/open-source.js';
import type { SourceProbe } from '../source/source.js';
import type { ActiveRun } from './active-run.js';
import { decideCapture, findHead } from './capture-decision.js';
import {
  openCapture,
  type CaptureContext,
  type CaptureTotals,
  type DiskCapture,
  type DiskPlan,
} from './capture-disk.js';
import type { EngineContext } from './context.js';
import { decideOverChain } from './parent-chain.js';
import type { DiskView, RunRequest, RunResult } from './types.js';
import { toDiskView, toIndexRows } from './views.js';

/** How often the repository is looked at while a run writes into it. */
const REPOSITORY_LOOK_MS = 1000;

type BackupRunRequest = Extract<RunRequest, { kind: 'backup' }>;

/**
 * One backup run: probe and decide (discover), hold every disk's source at one instant (snapshot), copy
 * (transfer), commit (finalize). Whatever fails before the manifest is there leaves nothing behind.
 */
export async function executeBackup(context: EngineContext, run: ActiveRun): Promise<RunResult> {
  const request = run.row.request as BackupRunRequest;
  const { vmId, repositoryId, pointId } = run.row;
  if (vmId === null || repositoryId === null || pointId === null) {
    throw new AppError('INTERNAL', 'a backup run without VM, repository or point');
  }
  await run.enter('discover');
  const repository = await context.repositories.open(repositoryId);
  const vm = await loadVm(context, vmId);
  await repository.putVm(vmRecord(vm, []));
  await using cleanup = new CleanupStack();
  const lease = cleanup.use(await repository.acquireVmLease(vmId, { runId: run.id, purpose: 'backup' }));
  lease.lost.addEventListener('abort', () => {
    run.abort(new AppError('LEASE_LOST', 'the lease of this VM was taken over'));
  });
  const abandoned = await repository.discardAbandoned(lease);
  if (abandoned.length > 0) {
    run.log('warning', {
      code: 'LEFTOVERS_REMOVED',
      message: `removed ${abandoned.length} unfinished file(s) of earlier runs`,
      details: { files: abandoned },
    });
  }
  const points = await repository.listPoints(vmId);
  const plans = await planDisks({ context, run, repository, points, vm, request, cleanup });
  await repository.putVm(vmRecord(vm, plans));

  await run.enter('snapshot');
  const captureContext: CaptureContext = {
    repository,
    lease,
    vmId,
    runId: run.id,
    settings: context.settings.nbd,
    place: { runtimeDirectory: context.socketDirectory, registry: context.registry, owner: run.id },
    bytesPerSecond: request.bytesPerSecond,
    signal: run.signal,
  };
  const captures: DiskCapture[] = [];
  for (const plan of plans) captures.push(cleanup.use(await openCapture(captureContext, plan)));
  const capturedAt = toTimestamp(context.clock.nowMs());
  await measureAndReserve(run, repository, captures);

  await run.enter('transfer');
  const totals = new Map<DiskId, CaptureTotals>();
  {
    await using _watch = watchRepository(run, repository, lease);
    for (const capture of captures) totals.set(capture.plan.disk.id, await transferDisk(run, capture));
  }

  await run.enter('finalize');
  const manifest = await commit({ run, repository, lease, vm, pointId, capturedAt, captures, totals });
  for (const capture of captures) capture.finish();
  await indexPoint(context, run, manifest);
  return { kind: 'backup', pointId };
}

async function loadVm(context: EngineContext, vmId: VmId): Promise<VmRow> {
  const row = await context.db.vms.get(vmId);
  if (row === null) throw new AppError('NOT_FOUND', `there is no virtual machine ${vmId}`);
  return row;
}

/**
 * The repository keeps its own record of the VM, so that a rescan into an empty database finds it: first
 * with what the index knows, then with what the sources say.
 */
function vmRecord(vm: VmRow, plans: DiskPlan[]): VmRecord {
  return {
    vmId: vm.id,
    name: vm.name,
    disks: vm.disks.map(({ id, number, name, sizeBytes, lineage }) => {
      const probe = plans.find(({ disk }) => disk.id === id)?.probe;
      return {
        diskId: id,
        number,
        name,
        sizeBytes: probe?.sizeBytes ?? sizeBytes,
        sourceLineage: probe?.lineage ?? lineage,
      };
    }),
  };
}

interface PlanContext {
  context: EngineContext;
  run: ActiveRun;
  repository: Repository;
  points: PointManifest[];
  vm: VmRow;
  request: BackupRunRequest;
  /** Takes what the plans hold open. */
  cleanup: CleanupStack;
}

async function planDisks(plan: PlanContext): Promise<DiskPlan[]> {
  const plans: DiskPlan[] = [];
  for (const disk of plan.vm.disks) plans.push(await planDisk(plan, toDiskView(disk)));
  if (plans.length === 0) throw new AppError('CONFLICT', `${plan.vm.name} has no disks`);
  plan.run.setDisks(
    plans.map(({ disk, decision }) => ({
      diskId: disk.id,
      totalBytes: 0,
      bytesRead: 0,
      bytesWritten: 0,
      bytesZeroed: 0,
      bytesSkipped: 0,
      method: decision.method,
      reason: decision.reason,
    })),
  );
  return plans;
}

async function planDisk(plan: PlanContext, disk: DiskView): Promise<DiskPlan> {
  const { context, run, repository, points, request } = plan;
  if (disk.source === null) {
    throw new AppError('CONFLICT', `disk ${disk.name} is known only from a repository and has no source`, {
      details: { diskId: disk.id },
    });
  }
  const source = openSource(disk.source, {
    diskId: disk.id,
    place: { runtimeDirectory: context.socketDirectory, registry: context.registry, owner: run.id },
    limits: context.settings.nbd,
  });
  const probe = await source.probe({ signal: run.signal });
  const head = findHead(points, disk.id);
  const stated = request.bitmaps.find(({ diskId }) => diskId === disk.id) ?? null;
  const tracking = disk.source.changeTracking;
  const { decision, known } = await decideOverChain({
    repository,
    head: points.find(({ pointId }) => pointId === head?.pointId),
    diskId: disk.id,
    decide: (damage) =>
      decideCapture({ type: request.type, diskName: disk.name, tracking, probe, head, damage, stated }),
    cleanup: plan.cleanup,
    signal: run.signal,
  });
  run.log('info', {
    code: decision.reason.code,
    message: `${disk.name}: ${decision.method}: ${decision.reason.sentence}`,
    details: {
      diskId: disk.id,
      method: decision.method,
    },
  });
  await followDisk(plan, disk, probe);
  return { disk, source, probe, decision, known };
}

/** The index follows what the source is now; the point keeps what it was. */
async function followDisk({ context, run }: PlanContext, disk: DiskView, probe: SourceProbe): Promise<void> {
  if (probe.sizeBytes !== disk.sizeBytes) {
    run.log('warning', {
      code: 'SOURCE_SIZE_MISMATCH',
      message: `${disk.name} has ${probe.sizeBytes} bytes now and had ${disk.sizeBytes} before`,
      details: { diskId: disk.id },
    });
  }
  const change = { sizeBytes: probe.sizeBytes, lineage: probe.lineage };
  await run.insist(() => context.db.vms.updateDisk(disk.id, change));
}

/** What is known to come must fit; what nobody knows is watched while it comes. */
async function measureAndReserve(
  run: ActiveRun,
  repository: Repository,
  captures: DiskCapture[],
): Promise<void> {
  let needed = 0;
  for (const capture of captures) {
    const { totalBytes, writeBytes } = await capture.measure();
    run.updateDisk(capture.plan.disk.id, { totalBytes });
    needed += writeBytes ?? 0;
  }
  await repository.requireSpace(needed);
}

/**
 * During the copy: a repository that went away is noticed, and what turned out larger than anybody knew
 * ends before it takes the reserve.
 */
function watchRepository(run: ActiveRun, repository: Repository, lease: Lease): AsyncDisposable {
  let looking: Promise<void> | undefined;
  const look = async (): Promise<void> => {
    try {
      await lease.verify();
      await repository.requireSpace(0);
    } catch (error) {
      run.abort(toAppError(error));
    }
  };
  const timer = setInterval(() => {
    looking ??= look().finally(() => (looking = undefined));
  }, REPOSITORY_LOOK_MS);
  return {
    async [Symbol.asyncDispose]() {
      clearInterval(timer);
      await looking;
    },
  };
}

async function transferDisk(run: ActiveRun, capture: DiskCapture): Promise<CaptureTotals> {
  const { disk, decision } = capture.plan;
  const totals = await capture.transfer(({ bytesRead, bytesWritten, bytesZeroed, bytesSkipped }) => {
    run.updateDisk(disk.id, { bytesRead, bytesWritten, bytesZeroed, bytesSkipped });
  });
  run.log('info', {
    code: 'DISK_COPIED',
    message: `${disk.name}: ${decision.method}: read ${formatBytes(totals.bytesRead)}, wrote ${formatBytes(totals.bytesWritten)}`,
    details: { diskId: disk.id, ...totals },
  });
  return totals;
}

async function commit(parts: {
  run: ActiveRun;
  repository: Repository;
  lease: Lease;
  vm: VmRow;
  pointId: PointId;
  capturedAt: string;
  captures: DiskCapture[];
  totals: ReadonlyMap<DiskId, CaptureTotals>;
}): Promise<PointManifest> {
  const { run, repository, captures, totals } = parts;
  return repository.commitPoint(
    {
      pointId: parts.pointId,
      vmId: parts.vm.id,
      vmName: parts.vm.name,
      runId: run.id,
      capturedAt: parts.capturedAt,
      consistency: captures.every(({ plan }) => plan.disk.source?.kind === 'image') ? 'offline' : 'crash',
      disks: captures.map(({ plan, layer }) => {
        const copied = totals.get(plan.disk.id);
        if (copied === undefined) throw new AppError('INTERNAL', `disk ${plan.disk.id} was not copied`);
        return {
          diskId: plan.disk.id,
          number: plan.disk.number,
          name: plan.disk.name,
          sizeBytes: plan.probe.sizeBytes,
          sourceLineage: plan.probe.lineage,
          layerId: layer.layerId,
          parentLayerId: plan.decision.parent?.layerId ?? null,
          parentPointId: plan.decision.parent?.pointId ?? null,
          method: plan.decision.method,
          reason: plan.decision.reason,
          changeIdFrom: plan.decision.changeIdFrom,
          changeIdTo: bitmapNameFor(parts.pointId),
          bytesRead: copied.bytesRead,
          bytesWritten: copied.bytesWritten,
          bytesZeroed: copied.bytesZeroed,
          bytesSkipped: copied.bytesSkipped,
        };
      }),
    },
    captures.map(({ layer }) => layer),
    {
      lease: parts.lease,
      signal: run.signal,
      onProgress: (share) => {
        run.setShare(share);
      },
    },
  );
}

/** The manifest is the truth already: the index follows, however long the database is away. */
async function indexPoint(context: EngineContext, run: ActiveRun, manifest: PointManifest): Promise<void> {
  const rows = toIndexRows(manifest);
  await run.insist(() => context.db.points.insert(rows.point, rows.layers));
  run.log('info', {
    code: 'POINT_COMMITTED',
    message: `point ${manifest.pointId} (${manifest.type}) is complete`,
    details: {
      pointId: manifest.pointId,
      sequence: manifest.sequence,
    },
  });
}
