import type { DiskRow, VmRow } from '../db/database.js';
import { toTimestamp } from '../lib/clock.js';
import { AppError, isErrorCode } from '../lib/errors.js';
import { newId, type DiskId, type VmId } from '../lib/id.js';
import { parseVmSource } from '../source/disk-source.js';
import { openMachineSource } from '../source/open-source.js';
import type { SourceOptions } from '../source/source-settings.js';
import type { DiscoveredDisk, DiscoveredVm, DiskFacts, VmFacts } from '../source/source.js';
import type { EngineContext } from './context.js';

/** What a source is opened with, for a run or another owner of what it starts. */
export function sourceOptions(context: EngineContext, owner: string): SourceOptions {
  return {
    settings: { nbd: context.settings.nbd, snapshot: context.settings.snapshot },
    place: { runtimeDirectory: context.socketDirectory, registry: context.registry, owner },
  };
}

/**
 * Records a machine as discovery found it. The machine is known again by its key, whatever its name and host
 * are now; one that only a repository knows of is known again by its disks, so that its chains go on.
 */
export async function recordMachine(context: EngineContext, found: DiscoveredVm): Promise<VmRow> {
  const { db } = context;
  const known = (await db.vms.findBySourceKey(found.key)) ?? (await db.vms.findAdoptable(`${found.key}:`));
  const name = await freeName(context, found, known);
  if (known !== null) {
    const row = followMachine({ ...known, name }, found);
    await db.vms.follow(row);
    return row;
  }
  const nowMs = context.clock.nowMs();
  const row = followMachine(
    {
      id: newId<VmId>(nowMs),
      name,
      createdAt: toTimestamp(nowMs),
      sourceKey: null,
      source: null,
      facts: null,
      disks: [],
    },
    found,
  );
  await db.vms.insert(row);
  return row;
}

/**
 * The VM as it is now: a machine is asked at its hypervisor, and the index follows. NOT_FOUND, with the
 * machine marked as gone, when the hypervisor does not know it any more.
 */
export async function refreshVm(context: EngineContext, vm: VmRow, signal: AbortSignal): Promise<VmRow> {
  const source = parseVmSource(vm.source);
  if (source === null) return vm;
  try {
    const found = await openMachineSource(source, sourceOptions(context, 'discovery')).discover({ signal });
    return await recordMachine(context, found);
  } catch (error) {
    if (isErrorCode(error, 'NOT_FOUND')) await markGone(context, vm);
    throw error;
  }
}

export async function markGone(context: EngineContext, vm: VmRow): Promise<VmRow> {
  const facts: VmFacts = { ...(vm.facts as VmFacts), isPresent: false };
  const row = { ...vm, facts };
  await context.db.vms.follow({ ...row, disks: [] });
  return row;
}

/** Two hypervisors may have machines of one name; the second is told apart by its id. */
async function freeName(context: EngineContext, found: DiscoveredVm, known: VmRow | null): Promise<string> {
  const holder = await context.db.vms.findByName(found.name);
  if (holder === null || holder.id === known?.id) return found.name;
  if (known !== null) return known.name.startsWith(`${found.name} (`) ? known.name : withKey(found);
  return withKey(found);
}

function withKey({ name, key }: DiscoveredVm): string {
  return `${name.slice(0, 160)} (${key.slice(key.indexOf(':') + 1).slice(-80)})`;
}

/**
 * The row with what was found. Disks are known again by their lineage, else by serial, else by target where
 * no serial contradicts. What was there and is not found stays, marked as absent: points refer to it.
 */
export function followMachine(known: VmRow, found: DiscoveredVm): VmRow {
  const rest = new Set(known.disks);
  const matches = new Map<DiscoveredDisk, DiskRow>();
  for (const isSame of [hasLineage, hasSerial, hasTarget]) {
    for (const disk of found.disks) {
      if (matches.has(disk)) continue;
      const row = [...rest].find((candidate) => isSame(candidate, disk));
      if (row === undefined) continue;
      matches.set(disk, row);
      rest.delete(row);
    }
  }
  const disks = [...rest].map(markAbsent);
  for (const disk of found.disks) {
    disks.push(followDisk(matches.get(disk) ?? newDisk(known, disks, disk), found, disk));
  }
  disks.sort((a, b) => a.number - b.number);
  return { ...known, sourceKey: found.key, source: found.source, facts: found.facts, disks };
}

const factsOf = (row: DiskRow): DiskFacts | null => row.facts as DiskFacts | null;
const hasLineage = (row: DiskRow, disk: DiscoveredDisk): boolean => row.lineage === disk.lineage;
const hasSerial = (row: DiskRow, { facts }: DiscoveredDisk): boolean =>
  facts.serial !== null && factsOf(row)?.serial === facts.serial;
const hasTarget = (row: DiskRow, { facts }: DiscoveredDisk): boolean =>
  (factsOf(row)?.target ?? row.name) === facts.target &&
  (facts.serial === null || (factsOf(row)?.serial ?? facts.serial) === facts.serial);

function markAbsent(row: DiskRow): DiskRow {
  const facts = factsOf(row);
  return facts === null ? row : { ...row, facts: { ...facts, isPresent: false } };
}

function newDisk(known: VmRow, others: readonly DiskRow[], { facts }: DiscoveredDisk): DiskRow {
  const all = [...known.disks, ...others];
  const number = Math.max(0, ...all.map((disk) => disk.number)) + 1;
  const isTaken = all.some(({ name }) => name === facts.target);
  return {
    id: newId<DiskId>(),
    vmId: known.id,
    number,
    // A target may be long (a QOM path); a name is told apart by the disk's number, which is never used again.
    name: isTaken ? `${facts.target.slice(0, 200)}-${number}` : facts.target.slice(0, 255),
    sizeBytes: 0,
    lineage: '',
    source: null,
    facts: null,
  };
}

/** The tracking a user chose stays. */
function followDisk(
  row: DiskRow,
  { source }: DiscoveredVm,
  { facts, sizeBytes, lineage }: DiscoveredDisk,
): DiskRow {
  const before = row.source as { changeTracking?: string } | null;
  const { target, serial } = facts;
  return {
    ...row,
    sizeBytes,
    lineage,
    facts,
    source: { kind: source.kind, target, serial, changeTracking: before?.changeTracking ?? 'auto' },
  };
}

/** What a machine's row says its hypervisor is; CONFLICT for a VM whose disks stand for themselves. */
export function requireMachine(vm: VmRow): NonNullable<ReturnType<typeof parseVmSource>> {
  const source = parseVmSource(vm.source);
  if (source !== null) return source;
  throw new AppError('CONFLICT', `${vm.name} was recorded disk by disk, without a hypervisor`);
}
