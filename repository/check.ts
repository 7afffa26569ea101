import { throwIfAborted } from '../src/lib/deadline.js';
import { AppError, isErrorCode, toAppError } from '../src/lib/errors.js';
import type { PointId, VmId } from '../src/lib/id.js';
import { verifyLayerContent } from './check-content.js';
import { findGarbage } from './check-garbage.js';
import { checkLayerStructure } from './check-layer.js';
import { describeLayer } from './chain.js';
import type { CheckOptions, CheckReport, LayerTask } from './check-report.js';
import type { RepositoryContext } from './context.js';
import { digestChainProblems } from './digest-chain.js';
import { listPointIds, readManifest, type StoredManifest } from './manifest.js';
import { readRemovals } from './removal-record.js';
import { listVmIds, readVm } from './vm-record.js';

/**
 * Looks at everything and changes nothing. Damage is a finding; only a repository that cannot be
 * looked at at all rejects (REPOSITORY_OFFLINE, CANCELLED).
 */
export async function checkRepository(
  context: RepositoryContext,
  options: CheckOptions,
): Promise<CheckReport> {
  const report: CheckReport = {
    vms: 0,
    points: 0,
    layers: 0,
    bytesVerified: 0,
    findings: [],
    damagedPoints: [],
  };
  const damaged = new Set<string>();
  const tasks: LayerTask[] = [];
  const vmIds = options.vmId === undefined ? await listVmIds(context) : [options.vmId];
  const readable = new Map<VmId, StoredManifest[]>();
  for (const vmId of vmIds) {
    throwIfAborted(options.signal);
    report.vms += 1;
    const stored = await readVmManifests(context, vmId, report);
    readable.set(vmId, stored);
    const selected = selectPoints(stored, options.pointId);
    report.points += selected.length;
    for (const { manifest } of selected) {
      for (const disk of manifest.disks) tasks.push({ point: manifest, disk });
    }
    if (options.pointId === undefined) report.findings.push(...(await findGarbage(context, vmId, stored)));
  }
  requirePointSeen(options, report);
  report.layers = tasks.length;
  await checkLayers(context, tasks, { options, report, damaged });
  for (const stored of readable.values()) spreadDamage(stored, damaged, report);
  report.damagedPoints = [...damaged].sort();
  return report;
}

function requirePointSeen(options: CheckOptions, report: CheckReport): void {
  if (options.pointId === undefined || report.points > 0 || report.findings.length > 0) return;
  throw new AppError('POINT_NOT_FOUND', 'there is no such recovery point', {
    details: { pointId: options.pointId },
  });
}

/** Every manifest that reads; the others, and gaps in the chain of digests, become findings. */
async function readVmManifests(
  context: RepositoryContext,
  vmId: VmId,
  report: CheckReport,
): Promise<StoredManifest[]> {
  const stored: StoredManifest[] = [];
  await collect(report, { vmId }, async () => {
    await readVm(context, vmId);
  });
  let isComplete = true;
  for (const pointId of await listPointIds(context, vmId)) {
    const read = await collect(report, { vmId, pointId }, async () => {
      stored.push(await readManifest(context, vmId, pointId));
    });
    if (!read) {
      isComplete = false;
      report.damagedPoints.push(pointId);
    }
  }
  stored.sort((a, b) => a.manifest.sequence - b.manifest.sequence);
  await collect(report, { vmId }, async () => {
    const removals = await readRemovals(context, vmId);
    for (const { pointId, message } of isComplete ? digestChainProblems(stored, removals) : []) {
      report.findings.push({ code: 'CHAIN_BROKEN', severity: 'error', message, vmId, pointId });
    }
  });
  return stored;
}

/** Runs one look; what it finds wrong becomes a finding and answers false. */
async function collect(
  report: CheckReport,
  place: { vmId: VmId; pointId?: PointId },
  look: () => Promise<void>,
): Promise<boolean> {
  try {
    await look();
    return true;
  } catch (error) {
    if (!isErrorCode(error, 'MANIFEST_UNREADABLE', 'REPOSITORY_FORMAT', 'NOT_FOUND', 'REPOSITORY_IO'))
      throw error;
    const { message } = toAppError(error);
    report.findings.push({ code: 'MANIFEST_UNREADABLE', severity: 'error', message, ...place });
    return false;
  }
}

/** The points asked for: all, or one with everything it stands on. */
function selectPoints(stored: readonly StoredManifest[], pointId: PointId | undefined): StoredManifest[] {
  if (pointId === undefined) return [...stored];
  const wanted = new Set<string>([pointId]);
  for (const { manifest } of [...stored].reverse()) {
    if (!wanted.has(manifest.pointId)) continue;
    for (const disk of manifest.disks) if (disk.parentPointId !== null) wanted.add(disk.parentPointId);
  }
  return stored.filter(({ manifest }) => wanted.has(manifest.pointId));
}

async function checkLayers(
  context: RepositoryContext,
  tasks: readonly LayerTask[],
  work: { options: CheckOptions; report: CheckReport; damaged: Set<string> },
): Promise<void> {
  const { options, report, damaged } = work;
  const totalBytes = tasks.reduce((sum, { disk }) => sum + disk.layerFileBytes, 0);
  let beforeBytes = 0;
  const tell = (doneBytes: number): void => {
    options.onProgress?.({ doneBytes: Math.min(totalBytes, doneBytes), totalBytes });
  };
  for (const task of tasks) {
    throwIfAborted(options.signal);
    const findings = await checkLayerStructure(context, task, options.signal);
    if (options.content && !findings.some((finding) => finding.severity === 'error')) {
      const startBytes = beforeBytes;
      const content = await verifyLayerContent(context, task, {
        layer: describeLayer(context, task.point, task.disk),
        signal: options.signal,
        onBytes: (bytes) => {
          tell(startBytes + bytes);
        },
      });
      report.bytesVerified += content.bytesVerified;
      findings.push(...content.findings);
    }
    report.findings.push(...findings);
    if (findings.some((finding) => finding.severity === 'error')) damaged.add(task.point.pointId);
    beforeBytes += task.disk.layerFileBytes;
    tell(beforeBytes);
  }
}

/** A point whose parent is damaged, missing or unreadable cannot be trusted either. */
function spreadDamage(stored: readonly StoredManifest[], damaged: Set<string>, report: CheckReport): void {
  for (const pointId of report.damagedPoints) damaged.add(pointId);
  const points = new Map(stored.map(({ manifest }) => [manifest.pointId, manifest]));
  for (const { manifest } of stored) {
    for (const disk of manifest.disks) {
      if (disk.parentPointId === null) continue;
      const parent = points.get(disk.parentPointId);
      const parentDisk = parent?.disks.find((candidate) => candidate.diskId === disk.diskId);
      if (parentDisk?.layerId !== disk.parentLayerId) {
        report.findings.push({
          code: 'CHAIN_BROKEN',
          severity: 'error',
          message: 'the parent point of a disk is missing, cannot be read or has another layer',
          vmId: manifest.vmId,
          pointId: manifest.pointId,
          diskId: disk.diskId,
          layerId: disk.layerId,
        });
        damaged.add(manifest.pointId);
      } else if (damaged.has(disk.parentPointId)) {
        damaged.add(manifest.pointId);
      }
    }
  }
}
