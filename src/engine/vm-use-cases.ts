import type { DiskRow, VmRow } from '../db/database.js';
import { toTimestamp } from '../lib/clock.js';
import { AppError } from '../lib/errors.js';
import { newId, type DiskId, type VmId } from '../lib/id.js';
import { parseDiskSource } from '../source/disk-source.js';
import { audit } from './audit.js';
import type { EngineContext } from './context.js';
import type { Actor, Engine, NewVm } from './engine.js';
import { requireVm } from './machine-use-cases.js';
import { pushLineage } from './push-decision.js';
import { toVmView } from './views.js';
import { openVmSource } from './volume-source.js';

type VmUseCases = Pick<Engine, 'addVm' | 'listVms' | 'getVm' | 'removeVm'>;

const PROBE_TIMEOUT_MS = 30_000;

export function createVmUseCases(context: EngineContext): VmUseCases {
  const { db } = context;
  return {
    async addVm(input, actor) {
      requireDistinctNames(input);
      const known = await db.vms.findByName(input.name);
      if (known?.disks.every(({ source }) => source === null) === true) {
        return toVmView(await adoptVm(context, { known, input, actor }));
      }
      const vmId = newId<VmId>(context.clock.nowMs());
      const disks: DiskRow[] = [];
      for (const [index, disk] of input.disks.entries()) {
        disks.push(await probeDisk(context, { vmId, number: index + 1, ...disk }));
      }
      const row: VmRow = {
        id: vmId,
        name: input.name,
        createdAt: toTimestamp(context.clock.nowMs()),
        sourceKey: null,
        source: null,
        facts: null,
        disks,
      };
      await db.vms.insert(row);
      await audit(context, actor, { action: 'vm.add', subject: vmId, details: { name: input.name } });
      return toVmView(row);
    },
    async listVms(page) {
      const { rows, nextCursor } = await db.vms.list(page);
      return { items: rows.map(toVmView), nextCursor };
    },
    async getVm(id) {
      return toVmView(await requireVm(context, id));
    },
    async removeVm(id, actor) {
      await db.vms.remove(id);
      await audit(context, actor, { action: 'vm.remove', subject: id, details: {} });
    },
  };
}

/**
 * A machine known only from a repository (its appliance was lost) is given its sources: it keeps its ids, so
 * that its chains go on. Whether a disk is still the one of the last point is found out by the next backup.
 */
async function adoptVm(
  context: EngineContext,
  { known, input, actor }: { known: VmRow; input: NewVm; actor: Actor },
): Promise<VmRow> {
  const names = known.disks.map(({ name }) => name);
  const isSame = input.disks.length === names.length && input.disks.every(({ name }) => names.includes(name));
  if (!isSame) {
    throw new AppError('CONFLICT', `${known.name} is known from a repository with other disks`, {
      details: { vmId: known.id, disks: names },
    });
  }
  const disks: DiskRow[] = [];
  for (const { id, vmId, number, name } of known.disks) {
    const source = input.disks.find((disk) => disk.name === name)?.source;
    disks.push(await probeDisk(context, { id, vmId, number, name, source }));
  }
  for (const { id, sizeBytes, lineage, source } of disks) {
    await context.db.vms.updateDisk(id, { sizeBytes, lineage, source });
  }
  await audit(context, actor, { action: 'vm.adopt', subject: known.id, details: { name: known.name } });
  return { ...known, disks };
}

function requireDistinctNames(input: NewVm): void {
  const names = input.disks.map(({ name }) => name);
  if (new Set(names).size !== names.length) {
    throw new AppError('INVALID_INPUT', 'two disks have the same name', { details: { field: 'disks' } });
  }
}

/** The disk is asked for its exact size now: a source that cannot be read is refused before it is relied upon. */
async function probeDisk(
  context: EngineContext,
  disk: { id?: DiskId; vmId: VmId; number: number; name: string; source: unknown },
): Promise<DiskRow> {
  const { id = newId<DiskId>(context.clock.nowMs()), vmId, number, name } = disk;
  const source = parseDiskSource(disk.source);
  const row = { id, vmId, number, name, source, facts: null };
  // Only its agent knows it.
  if (source.kind === 'push') return { ...row, sizeBytes: source.sizeBytes, lineage: pushLineage(id) };
  const signal = AbortSignal.timeout(PROBE_TIMEOUT_MS);
  const probes = await openVmSource(context, null, 'probe').probe([{ diskId: id, name, source }], {
    signal,
  });
  const probe = probes.get(id);
  if (probe === undefined) throw new AppError('INTERNAL', `the source said nothing of disk ${name}`);
  const { sizeBytes, lineage } = probe;
  if (sizeBytes === 0) throw new AppError('INVALID_INPUT', `disk ${name} is empty (0 bytes)`);
  return { ...row, sizeBytes, lineage };
}
