import { CleanupStack } from '../lib/cleanup.js';
import { parseVmSource } from '../source/disk-source.js';
import type { EngineContext } from './context.js';
import { chooseDisks } from './disk-choice.js';
import type { Engine } from './engine.js';
import { refreshVm } from './follow-machine.js';
import { requireVm } from './machine-use-cases.js';
import { planDisks, toSourceDisk } from './plan-backup.js';
import type { BackupEstimate, DiskEstimate } from './types.js';
import { toVmView } from './views.js';
import { openVmSource } from './volume-source.js';

const ESTIMATE_TIMEOUT_MS = 120_000;

/** Plans a backup as a run would, asks how much it would read, and holds nothing. */
export async function estimateBackup(
  context: EngineContext,
  input: Parameters<Engine['estimateBackup']>[0],
): Promise<BackupEstimate> {
  const signal = AbortSignal.timeout(ESTIMATE_TIMEOUT_MS);
  const vm = await refreshVm(context, await requireVm(context, input.vmId), signal);
  const repository = await context.repositories.open(input.repositoryId);
  const known = await repository.listVmIds();
  const points = known.includes(vm.id) ? await repository.listPoints(vm.id) : [];
  const source = openVmSource(context, parseVmSource(vm.source), 'estimate');
  const { chosen, leftOut } = chooseDisks(toVmView(vm), input.disks);
  await using cleanup = new CleanupStack();
  const plans = await planDisks({
    repository,
    points,
    source,
    disks: chosen,
    request: input,
    cleanup,
    signal,
  });
  const bytes = await source.estimate(
    plans.map(({ disk, probe, decision }) => ({ disk: toSourceDisk(disk), probe, bitmap: decision.bitmap })),
    { signal },
  );
  const disks: DiskEstimate[] = [
    ...plans.map(({ disk, probe, decision }) => ({
      diskId: disk.id,
      diskName: disk.name,
      sizeBytes: probe.sizeBytes,
      method: decision.method,
      reason: decision.reason,
      bytes: bytes.get(disk.id) ?? null,
    })),
    ...leftOut.map(({ disk, reason }) => ({
      diskId: disk.id,
      diskName: disk.name,
      sizeBytes: disk.sizeBytes,
      method: null,
      reason,
      bytes: 0,
    })),
  ];
  const totalBytes = disks.reduce<number | null>(
    (sum, disk) => (sum === null || disk.bytes === null ? null : sum + disk.bytes),
    0,
  );
  return { vmId: vm.id, repositoryId: input.repositoryId, disks, totalBytes };
}
