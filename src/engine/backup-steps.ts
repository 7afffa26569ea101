import type {
  DraftDisk,
  Lease,
  PartialLayer,
  PointManifest,
  Repository,
  VmRecord,
} from '../../repository/index.js';
import type { RunRow, VmRow } from '../db/database.js';
import type { CleanupStack } from '../lib/cleanup.js';
import { AppError } from '../lib/errors.js';
import type { PointId, RepositoryId, VmId } from '../lib/id.js';
import type { CopyTotals } from '../nbd/copy-windows.js';
import type { DiskProbe } from '../source/source.js';
import type { ActiveRun } from './active-run.js';
import type { CaptureDecision } from './capture-decision.js';
import type { EngineContext } from './context.js';
import type { DiskView, RunRequest } from './types.js';
import { toIndexRows } from './views.js';

/** A disk of a run with what is known of it now and how it is captured. */
export interface PlannedDisk {
  disk: DiskView;
  probe: Pick<DiskProbe, 'sizeBytes' | 'lineage'>;
  decision: CaptureDecision;
}

/** True for a backup that an agent pushes in. */
export function isPush({ request }: Pick<RunRow, 'request'>): boolean {
  return (request as RunRequest).kind === 'push';
}

/** What the row of a run that makes a point names. */
export function requireIds({ row }: ActiveRun): { vmId: VmId; repositoryId: RepositoryId; pointId: PointId } {
  const { vmId, repositoryId, pointId } = row;
  if (vmId === null || repositoryId === null || pointId === null) {
    throw new AppError('INTERNAL', 'a backup run without VM, repository or point');
  }
  return { vmId, repositoryId, pointId };
}

/** The only writer of the VM in the repository until the cleanup runs; what earlier writers left unfinished is gone. */
export async function holdVm(
  run: ActiveRun,
  repository: Repository,
  { vmId, cleanup }: { vmId: VmId; cleanup: CleanupStack },
): Promise<Lease> {
  const lease = cleanup.use(await repository.acquireVmLease(vmId, { runId: run.id, purpose: 'backup' }));
  lease.lost.addEventListener('abort', () => {
    run.abort(new AppError('LEASE_LOST', 'the lease of this VM was taken over'));
  });
  const files = await repository.discardAbandoned(lease);
  if (files.length > 0) {
    run.log('warning', {
      code: 'LEFTOVERS_REMOVED',
      message: `removed ${files.length} unfinished file(s) of earlier runs`,
      details: { files },
    });
  }
  return lease;
}

/**
 * The repository keeps its own record of the VM, so that a rescan into an empty database finds it: first
 * with what the index knows, then with what the run found.
 */
export function vmRecord(vm: VmRow, plans: readonly PlannedDisk[]): VmRecord {
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

/** Says in progress and log how each disk is captured. */
export function announce(run: ActiveRun, plans: readonly PlannedDisk[]): void {
  run.setDisks(
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
  for (const { disk, decision } of plans) {
    run.log('info', {
      code: decision.reason.code,
      message: `${disk.name}: ${decision.method}: ${decision.reason.sentence}`,
      details: { diskId: disk.id, method: decision.method },
    });
  }
}

/** The index follows what the disk is now; the point keeps what it was. */
export async function followDisk(
  context: EngineContext,
  run: ActiveRun,
  { disk, probe: { sizeBytes, lineage } }: PlannedDisk,
): Promise<void> {
  if (sizeBytes !== disk.sizeBytes) {
    run.log('warning', {
      code: 'SOURCE_SIZE_MISMATCH',
      message: `${disk.name} has ${sizeBytes} bytes now and had ${disk.sizeBytes} before`,
      details: { diskId: disk.id },
    });
  }
  const source = disk.source?.kind === 'push' ? { source: { ...disk.source, sizeBytes } } : {};
  await run.insist(() => context.db.vms.updateDisk(disk.id, { sizeBytes, lineage, ...source }));
}

/** A disk of the point, as the commit is given it. */
export function draftDisk(
  { disk, probe, decision }: PlannedDisk,
  captured: { layer: PartialLayer; changeIdTo: string; totals: CopyTotals },
): DraftDisk {
  const { bytesRead, bytesWritten, bytesZeroed, bytesSkipped } = captured.totals;
  return {
    diskId: disk.id,
    number: disk.number,
    name: disk.name,
    sizeBytes: probe.sizeBytes,
    sourceLineage: probe.lineage,
    layerId: captured.layer.layerId,
    parentLayerId: decision.parent?.layerId ?? null,
    parentPointId: decision.parent?.pointId ?? null,
    method: decision.method,
    reason: decision.reason,
    changeIdFrom: decision.changeIdFrom,
    changeIdTo: captured.changeIdTo,
    bytesRead,
    bytesWritten,
    bytesZeroed,
    bytesSkipped,
  };
}

/** The manifest is the truth already: the index follows, however long the database is away. */
export async function indexPoint(
  context: EngineContext,
  run: ActiveRun,
  manifest: PointManifest,
): Promise<void> {
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
