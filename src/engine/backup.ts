import type { Lease, PointManifest, Repository } from '../../repository/index.js';
import type { VmRow } from '../db/database.js';
import { toTimestamp } from '../lib/clock.js';
import { CleanupStack } from '../lib/cleanup.js';
import { AppError, toAppError } from '../lib/errors.js';
import type { DiskId, PointId } from '../lib/id.js';
import { formatBytes } from '../lib/units.js';
import type { CopyTotals } from '../nbd/copy-windows.js';
import { bitmapNameFor } from '../source/bitmap-name.js';
import { parseVmSource } from '../source/disk-source.js';
import type { DiskFacts, MachineRecord, Source, SourceSnapshot, VmFacts } from '../source/source.js';
import type { ActiveRun } from './active-run.js';
import { announce, draftDisk, followDisk, holdVm, indexPoint, requireIds, vmRecord } from './backup-steps.js';
import { openCapture, type CaptureContext, type DiskCapture, type DiskPlan } from './capture-disk.js';
import { findOwnRecords, obsoleteRecords, type OwnRecords } from './change-records.js';
import type { EngineContext } from './context.js';
import { chooseDisks } from './disk-choice.js';
import { cleanUpEarlierRuns } from './earlier-runs.js';
import { refreshVm } from './follow-machine.js';
import { requireVm } from './machine-use-cases.js';
import { planDisks, toSourceDisk, type BackupRunRequest } from './plan-backup.js';
import { watchRepository } from './repository-watch.js';
import type { RunResult } from './types.js';
import { toVmView } from './views.js';
import { openVmSource } from './volume-source.js';

/** What a backup run works with once it knows where it reads and writes. */
interface Backup {
  context: EngineContext;
  run: ActiveRun;
  request: BackupRunRequest;
  pointId: PointId;
  repository: Repository;
  lease: Lease;
  /** As the hypervisor showed it at the start of the run. */
  vm: VmRow;
  source: Source;
  /** Of the VM in this repository, by sequence. */
  points: PointManifest[];
  own: OwnRecords;
}

/**
 * One backup run: probe and decide (discover), hold every disk's source at one instant (snapshot), copy
 * (transfer), commit (finalize). Whatever fails before the manifest is there leaves nothing behind.
 */
export async function executeBackup(context: EngineContext, run: ActiveRun): Promise<RunResult> {
  const request = run.row.request as BackupRunRequest;
  const { vmId, repositoryId, pointId } = requireIds(run);
  await run.enter('discover');
  const repository = await context.repositories.open(repositoryId);
  const vm = await refreshVm(context, await requireVm(context, vmId), run.signal);
  await repository.putVm(vmRecord(vm, []));
  await using cleanup = new CleanupStack();
  const lease = await holdVm(run, repository, { vmId, cleanup });
  const source = openVmSource(context, parseVmSource(vm.source), run.id);
  await cleanUpEarlierRuns(context, run, source);
  const points = await repository.listPoints(vmId);
  const own = await findOwnRecords(context, vmId, { records: recordsOf(vm), points });
  const backup = { context, run, request, pointId, repository, lease, vm, source, points, own };
  const plans = await plan(backup, cleanup);
  await repository.putVm(vmRecord(vm, plans));

  await run.enter('snapshot');
  const snapshot = await takeSnapshot(backup, plans);
  cleanup.defer(async () => {
    await snapshot[Symbol.asyncDispose]();
    run.isSourceClean = true;
  });
  snapshot.lost.addEventListener('abort', () => {
    run.abort(toAppError(snapshot.lost.reason));
  });
  const { captures, totals } = await readSnapshot(backup, { plans, snapshot, cleanup });

  await run.enter('finalize');
  const manifest = await commit(backup, { snapshot, captures, totals });
  for (const capture of captures) capture.finish();
  await indexPoint(context, run, manifest);
  await settleRecords(backup, snapshot, manifest);
  return { kind: 'backup', pointId };
}

interface Capturing {
  plans: DiskPlan[];
  snapshot: SourceSnapshot;
  cleanup: CleanupStack;
}

/** Copies every disk. */
async function readSnapshot(
  backup: Backup,
  capturing: Capturing,
): Promise<{ captures: DiskCapture[]; totals: Map<DiskId, CopyTotals> }> {
  const { run, repository, lease } = backup;
  const { snapshot } = capturing;
  try {
    const captures = await openCaptures(backup, capturing);
    await measureAndReserve(run, repository, captures);
    await run.enter('transfer');
    const totals = new Map<DiskId, CopyTotals>();
    {
      await using _watch = watchRepository(run, repository, lease);
      for (const capture of captures) totals.set(capture.plan.disk.id, await transferDisk(run, capture));
    }
    return { captures, totals };
  } catch (error) {
    // A read that failed is often but the first sign that the snapshot broke: that says why.
    if (!run.signal.aborted) await snapshot.close();
    throw error;
  }
}

const recordsOf = (vm: VmRow): MachineRecord[] => (vm.facts as VmFacts | null)?.changeRecords ?? [];

async function plan(backup: Backup, cleanup: CleanupStack): Promise<DiskPlan[]> {
  const { run, repository, points, source, request } = backup;
  const { chosen, leftOut } = chooseDisks(toVmView(backup.vm), request.disks);
  for (const { disk, reason } of leftOut) {
    run.log('info', {
      code: 'DISK_LEFT_OUT',
      message: `${disk.name} is not part of the point: ${reason.sentence}`,
      details: { diskId: disk.id, reason: reason.code },
    });
  }
  const { signal } = run;
  const plans = await planDisks({ repository, points, source, disks: chosen, request, cleanup, signal });
  announce(run, plans);
  for (const planned of plans) await followDisk(backup.context, run, planned);
  return plans;
}

async function takeSnapshot(backup: Backup, plans: DiskPlan[]): Promise<SourceSnapshot> {
  const { run, vm, own, request, source } = backup;
  run.isSourceClean = false;
  const taking = source.snapshot({
    vmId: vm.id,
    repositoryId: backup.repository.marker.repositoryId,
    runId: run.id,
    pointId: backup.pointId,
    disks: plans.map(({ disk, probe, decision }) => ({
      disk: toSourceDisk(disk),
      probe,
      bitmap: decision.bitmap,
    })),
    consistency: request.consistency,
    brokenRecords: recordsOf(vm).flatMap(({ name, isBroken }) => (isBroken && own.has(name) ? [name] : [])),
    note: ({ level, ...entry }) => {
      run.log(level, entry);
    },
    signal: run.signal,
  });
  try {
    return await taking;
  } catch (error) {
    // What it made it takes back, unless it says that this failed too.
    run.isSourceClean = !(error instanceof Error && 'suppressed' in error);
    throw error;
  }
}

async function openCaptures(backup: Backup, { plans, snapshot, cleanup }: Capturing): Promise<DiskCapture[]> {
  const { context, run, repository, lease, vm, request } = backup;
  const captureContext: CaptureContext = {
    repository,
    lease,
    vmId: vm.id,
    runId: run.id,
    settings: context.settings.nbd,
    bytesPerSecond: request.bytesPerSecond,
    signal: run.signal,
  };
  const captures: DiskCapture[] = [];
  for (const plan of plans) {
    const disk = snapshot.disks.get(plan.disk.id);
    if (disk === undefined) throw new AppError('INTERNAL', `the snapshot has no disk ${plan.disk.name}`);
    captures.push(cleanup.use(await openCapture(captureContext, plan, disk)));
  }
  return captures;
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

async function transferDisk(run: ActiveRun, capture: DiskCapture): Promise<CopyTotals> {
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

async function commit(
  backup: Backup,
  parts: { snapshot: SourceSnapshot; captures: DiskCapture[]; totals: ReadonlyMap<DiskId, CopyTotals> },
): Promise<PointManifest> {
  const { run, repository, vm, pointId } = backup;
  const { snapshot, captures, totals } = parts;
  // The hypervisor saves old data no longer than it is read. Its word that all was well is due before the point exists.
  const closing = snapshot.close();
  // It is waited for below; a commit that fails before must not leave it unhandled.
  closing.catch(() => undefined);
  return repository.commitPoint(
    {
      pointId,
      vmId: vm.id,
      vmName: vm.name,
      runId: run.id,
      capturedAt: toTimestamp(snapshot.capturedAtMs),
      consistency: snapshot.consistency,
      disks: captures.map(({ plan, source, layer }) => {
        const copied = totals.get(plan.disk.id);
        if (copied === undefined) throw new AppError('INTERNAL', `disk ${plan.disk.id} was not copied`);
        return draftDisk(plan, { layer, changeIdTo: source.changeIdTo, totals: copied });
      }),
    },
    captures.map(({ layer }) => layer),
    {
      lease: backup.lease,
      signal: run.signal,
      configFiles: [...snapshot.configFiles],
      confirm: () => closing,
      onProgress: (share) => {
        run.setShare(share);
      },
    },
  );
}

/** The point is there and indexed: only now do the records go that nothing counts from any more. */
async function settleRecords(
  { context, run, vm, own, points, pointId }: Backup,
  snapshot: SourceSnapshot,
  manifest: PointManifest,
): Promise<void> {
  const present = vm.disks.filter(({ facts }) => (facts as DiskFacts | null)?.isPresent === true);
  const obsolete = obsoleteRecords(own, manifest.repositoryId, {
    points: [...points, manifest],
    diskIds: present.map(({ id }) => id),
  });
  await snapshot.commit(obsolete);
  if (vm.facts === null) return;
  const name = bitmapNameFor(pointId);
  const begun = manifest.disks.some(({ changeIdTo }) => changeIdTo === name);
  const changeRecords = recordsOf(vm).filter((record) => !obsolete.includes(record.name));
  if (begun) changeRecords.push({ name, pointId, isBroken: false });
  const facts: VmFacts = { ...(vm.facts as VmFacts), changeRecords };
  await run.insist(() => context.db.vms.follow({ ...vm, facts, disks: [] }));
}
