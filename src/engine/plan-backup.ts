import type { PointManifest, Repository } from '../../repository/index.js';
import type { CleanupStack } from '../lib/cleanup.js';
import { AppError } from '../lib/errors.js';
import { trackingOf } from '../source/disk-source.js';
import type { DiskProbe, Source, SourceDisk } from '../source/source.js';
import { decideCapture, findHead } from './capture-decision.js';
import type { DiskPlan } from './capture-disk.js';
import { decideOverChain } from './parent-chain.js';
import type { DiskView, RunRequest } from './types.js';

export type BackupRunRequest = Extract<RunRequest, { kind: 'backup' }>;

export interface PlanInput {
  repository: Repository;
  /** Of the VM in the repository, by sequence. */
  points: PointManifest[];
  source: Source;
  disks: readonly DiskView[];
  request: Pick<BackupRunRequest, 'type' | 'bitmaps'>;
  /** Takes what the plans hold open. */
  cleanup: CleanupStack;
  signal: AbortSignal;
}

/** Asks the source about the chosen disks and decides how each is captured. */
export async function planDisks(input: PlanInput): Promise<DiskPlan[]> {
  const probes = await input.source.probe(input.disks.map(toSourceDisk), { signal: input.signal });
  const plans: DiskPlan[] = [];
  for (const disk of input.disks) {
    const probe = probes.get(disk.id);
    if (probe === undefined) throw new AppError('INTERNAL', `the source said nothing of disk ${disk.name}`);
    plans.push(await planDisk(input, disk, probe));
  }
  return plans;
}

async function planDisk(input: PlanInput, disk: DiskView, probe: DiskProbe): Promise<DiskPlan> {
  const { repository, points, request } = input;
  const head = findHead(points, disk.id);
  const stated = request.bitmaps.find(({ diskId }) => diskId === disk.id) ?? null;
  const tracking = disk.source === null ? 'auto' : trackingOf(disk.source);
  const { decision, known, newer } = await decideOverChain({
    repository,
    head: points.find(({ pointId }) => pointId === head?.pointId),
    diskId: disk.id,
    decide: (damage) =>
      decideCapture({ type: request.type, diskName: disk.name, tracking, probe, head, damage, stated }),
    cleanup: input.cleanup,
    signal: input.signal,
  });
  return { disk, probe, decision, known, newer };
}

/** CONFLICT for a disk known only from a repository: nobody knows where to read it. */
export function toSourceDisk({ id, name, source }: DiskView): SourceDisk {
  if (source !== null) return { diskId: id, name, source };
  throw new AppError('CONFLICT', `disk ${name} is known only from a repository and has no source`, {
    details: { diskId: id },
  });
}
