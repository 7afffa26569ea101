import path from 'node:path';
import { AppError, isErrorCode, toAppError } from '../src/lib/errors.js';
import { isUlid, newId, type DiskId, type RunId, type VmId } from '../src/lib/id.js';
import { TEMPORARY_PREFIX } from './backend.js';
import type { RepositoryContext } from './context.js';
import { digestChainProblems } from './digest-chain.js';
import {
  PARTIAL_PREFIX,
  TRASH_DIRECTORY,
  configRoot,
  diskDirectory,
  layerName,
  layersDirectory,
  parseLayerName,
  pointsDirectory,
  sumsName,
  trashDirectory,
  vmDirectory,
} from './layout.js';
import { acquireLease, type Lease } from './lease.js';
import { readAllManifests, type StoredManifest } from './manifest.js';
import { requireWritable } from './marker.js';
import { Qcow2File } from './qcow2.js';
import { readRemovals } from './removal-record.js';
import type { SweepReport } from './repository.js';
import { listVmIds, readVm } from './vm-record.js';

const DEFAULT_TRASH_DAYS = 7;
const DAY_MS = 24 * 60 * 60 * 1000;

/** See Repository.sweep. A VM about which anything is in doubt is left alone, with the reason in the report. */
export async function sweep(
  context: RepositoryContext,
  options: { trashDays?: number },
): Promise<SweepReport> {
  await requireWritable(context);
  const report: SweepReport = { moved: [], skipped: [], purged: [] };
  for (const vmId of await listVmIds(context)) {
    try {
      report.moved.push(...(await sweepVm(context, vmId)));
    } catch (error) {
      // Doubt about one VM says nothing about the next; a repository that is gone ends the sweep.
      if (isErrorCode(error, 'REPOSITORY_OFFLINE', 'REPOSITORY_FOREIGN', 'REPOSITORY_READ_ONLY')) throw error;
      report.skipped.push({ vmId, reason: describe(error) });
    }
  }
  report.purged = await purgeTrash(context, options.trashDays ?? DEFAULT_TRASH_DAYS);
  return report;
}

function describe(error: unknown): string {
  const { code, message } = toAppError(error);
  return `${code}: ${message}`;
}

async function sweepVm(context: RepositoryContext, vmId: VmId): Promise<string[]> {
  const { backend, clock, applianceId, leaseTerms: terms } = context;
  if (applianceId === undefined) throw new AppError('REPOSITORY_FOREIGN', 'opened for reading only');
  const holder = { runId: newId<RunId>(clock.nowMs()), purpose: 'sweep' };
  await using lease = await acquireLease({ backend, clock, applianceId, terms }, `vm-${vmId}`, holder);
  await readVm(context, vmId);
  const stored = await readAllManifests(context, vmId);
  const problems = digestChainProblems(stored, await readRemovals(context, vmId));
  const [problem] = problems;
  if (problem !== undefined) {
    throw new AppError('MANIFEST_UNREADABLE', `point ${problem.pointId}: ${problem.message}`);
  }
  const referenced = referencedFiles(stored);
  await requireSoundReferences(context, vmId, { stored, referenced });
  const files = await findUnreferenced(context, vmId, { stored, referenced });
  return await moveToTrash(context, { vmId, files, lease });
}

/** Layer and sums files that manifests name, as backend paths. */
function referencedFiles(stored: readonly StoredManifest[]): Set<string> {
  const files = new Set<string>();
  for (const { manifest } of stored) {
    for (const { diskId, layerId } of manifest.disks) {
      const directory = diskDirectory(manifest.vmId, diskId);
      files.add(`${directory}/${layerName(layerId)}`);
      files.add(`${directory}/${sumsName(layerId)}`);
    }
  }
  return files;
}

interface VmFacts {
  stored: readonly StoredManifest[];
  referenced: ReadonlySet<string>;
}

/** A layer that a referenced layer's own header stands on must be referenced too; anything else is doubt. */
async function requireSoundReferences(context: RepositoryContext, vmId: VmId, facts: VmFacts): Promise<void> {
  for (const file of facts.referenced) {
    if (!file.endsWith('.qcow2')) continue;
    await using layer = await Qcow2File.open(context.backend.localPath(file));
    const { backingFile } = layer.header;
    if (backingFile === null || facts.referenced.has(`${path.posix.dirname(file)}/${backingFile}`)) continue;
    throw new AppError('CHAIN_BROKEN', 'a layer stands on a file that no manifest names', {
      details: { vmId, file },
    });
  }
}

async function findUnreferenced(context: RepositoryContext, vmId: VmId, facts: VmFacts): Promise<string[]> {
  const points = new Set<string>(facts.stored.map(({ manifest }) => manifest.pointId));
  const found: string[] = [];
  for (const disk of (await context.backend.list(layersDirectory(vmId))) ?? []) {
    if (disk.kind !== 'directory' || !isUlid(disk.name)) continue;
    const directory = diskDirectory(vmId, disk.name as DiskId);
    for (const { name, kind } of (await context.backend.list(directory)) ?? []) {
      const file = `${directory}/${name}`;
      if (kind === 'file' && isLayerFile(name) && !facts.referenced.has(file)) found.push(file);
    }
  }
  for (const { name, kind } of (await context.backend.list(pointsDirectory(vmId))) ?? []) {
    const stateOf = name.endsWith('.state.json') ? name.slice(0, -'.state.json'.length) : undefined;
    const isOrphanState = stateOf !== undefined && isUlid(stateOf) && !points.has(stateOf);
    if (kind === 'file' && (isOrphanState || name.startsWith(TEMPORARY_PREFIX))) {
      found.push(`${pointsDirectory(vmId)}/${name}`);
    }
  }
  for (const { name, kind } of (await context.backend.list(configRoot(vmId))) ?? []) {
    if (kind !== 'directory' || !isUlid(name) || points.has(name)) continue;
    const directory = `${configRoot(vmId)}/${name}`;
    for (const entry of (await context.backend.list(directory)) ?? [])
      found.push(`${directory}/${entry.name}`);
  }
  return found;
}

/** Names that only Holdfast makes in a disk's folder. Anything else there is somebody's and stays. */
export function isLayerFile(name: string): boolean {
  return (
    parseLayerName(name, '.qcow2') !== undefined ||
    parseLayerName(name, '.sums') !== undefined ||
    name.startsWith(PARTIAL_PREFIX) ||
    name.startsWith(TEMPORARY_PREFIX)
  );
}

async function moveToTrash(
  context: RepositoryContext,
  work: { vmId: VmId; files: readonly string[]; lease: Lease },
): Promise<string[]> {
  const { backend, clock } = context;
  const touched = new Set<string>();
  const moved: string[] = [];
  for (const file of work.files) {
    const inside = path.posix.relative(vmDirectory(work.vmId), file);
    const target = `${trashDirectory(clock.nowMs())}/${work.vmId}/${inside}`;
    await backend.makeDirectory(path.posix.dirname(target));
    await requireWritable(context);
    await work.lease.verify();
    await backend.rename(file, target);
    touched.add(path.posix.dirname(file)).add(path.posix.dirname(target));
    moved.push(file);
  }
  for (const directory of touched) await backend.syncDirectory(directory);
  for (const directory of touched) {
    if (directory.startsWith(`${configRoot(work.vmId)}/`)) await backend.removeDirectory(directory);
  }
  return moved;
}

/** Removes the days of `trash/` that are older than `trashDays`. Answers their paths. */
async function purgeTrash(context: RepositoryContext, trashDays: number): Promise<string[]> {
  const purged: string[] = [];
  const oldestMs = context.clock.nowMs() - trashDays * DAY_MS;
  for (const { name, kind } of (await context.backend.list(TRASH_DIRECTORY)) ?? []) {
    if (kind !== 'directory' || !/^\d{4}-\d{2}-\d{2}$/.test(name)) continue;
    // A day is over only at its end, so what came last that day has its full term.
    const endMs = Date.parse(`${name}T00:00:00.000Z`) + DAY_MS;
    if (Number.isNaN(endMs) || endMs > oldestMs) continue;
    await requireWritable(context);
    await removeTree(context, `${TRASH_DIRECTORY}/${name}`);
    purged.push(`${TRASH_DIRECTORY}/${name}`);
  }
  return purged;
}

async function removeTree(context: RepositoryContext, directory: string): Promise<void> {
  for (const { name, kind } of (await context.backend.list(directory)) ?? []) {
    if (kind === 'directory') await removeTree(context, `${directory}/${name}`);
    else await context.backend.remove(`${directory}/${name}`);
  }
  await context.backend.removeDirectory(directory);
}
