import type { VmRow } from '../db/database.js';
import { AppError } from '../lib/errors.js';
import type { VmId } from '../lib/id.js';
import { discoverMachines, openMachineSource } from '../source/open-source.js';
import type { DiscoveredVm, VmFacts } from '../source/source.js';
import { audit } from './audit.js';
import { findOwnRecords } from './change-records.js';
import type { EngineContext } from './context.js';
import type { Actor, DiscoverRequest, Engine } from './engine.js';
import { markGone, recordMachine, refreshVm, requireMachine, sourceOptions } from './follow-machine.js';
import { ENDED_STATES } from './types.js';
import { toRunError, toVmView } from './views.js';

type MachineUseCases = Pick<Engine, 'discoverVms' | 'listVmDisks' | 'releaseVm'>;

const DISCOVER_TIMEOUT_MS = 120_000;
const RELEASE_TIMEOUT_MS = 300_000;

export function createMachineUseCases(context: EngineContext): MachineUseCases {
  return {
    async discoverVms(input, actor) {
      const signal = AbortSignal.timeout(DISCOVER_TIMEOUT_MS);
      const { found, unseen } = await discoverMachines(input, sourceOptions(context, 'discovery'), signal);
      requireAllNamed(input, found);
      const rows: VmRow[] = [];
      for (const machine of found) rows.push(await recordMachine(context, machine));
      const keys = new Set([...found, ...unseen].map(({ key }) => key));
      rows.push(...(await markMissing(context, input, keys)));
      await audit(context, actor, {
        action: 'vm.discover',
        subject: input.kind === 'libvirt' ? input.uri : input.socket,
        details: { names: rows.map(({ name }) => name) },
      });
      const problems = unseen.map(({ key, error }) => ({ key, error: toRunError(error) }));
      return { vms: rows.map(toVmView), problems };
    },
    async listVmDisks(id) {
      return toVmView(await requireVm(context, id)).disks;
    },
    releaseVm: (id, actor) => releaseVm(context, id, actor),
  };
}

/** NOT_FOUND unless the index has it. */
export async function requireVm(context: EngineContext, id: VmId): Promise<VmRow> {
  const row = await context.db.vms.get(id);
  if (row === null) throw new AppError('NOT_FOUND', `there is no virtual machine ${id}`);
  return row;
}

function requireAllNamed(input: DiscoverRequest, found: readonly DiscoveredVm[]): void {
  if (input.kind !== 'libvirt') return;
  const missing = input.names.filter((name) => !found.some((machine) => machine.name === name));
  if (missing.length === 0) return;
  throw new AppError('NOT_FOUND', `${input.uri} has no domain ${missing.join(', ')}`, {
    details: { names: missing },
  });
}

/** Machines of the whole connection that were there before and are not any more. */
async function markMissing(
  context: EngineContext,
  input: DiscoverRequest,
  keys: ReadonlySet<string>,
): Promise<VmRow[]> {
  if (input.kind !== 'libvirt' || input.names.length > 0) return [];
  const gone: VmRow[] = [];
  for (const row of await context.db.vms.listBySourceKey('libvirt:')) {
    const source = requireMachine(row);
    if (source.kind !== 'libvirt' || source.uri !== input.uri || keys.has(row.sourceKey ?? '')) continue;
    gone.push(await markGone(context, row));
  }
  return gone;
}

async function releaseVm(
  context: EngineContext,
  id: VmId,
  actor: Actor,
): Promise<{ removed: string[]; kept: string[] }> {
  const signal = AbortSignal.timeout(RELEASE_TIMEOUT_MS);
  const known = await requireVm(context, id);
  const source = requireMachine(known);
  await requireIdle(context, id);
  const vm = await refreshVm(context, known, signal);
  const { changeRecords } = vm.facts as VmFacts;
  const own = await findOwnRecords(context, id, {
    records: changeRecords,
    points: await allPoints(context, id),
  });
  const removed = [...own.keys()];
  await openMachineSource(source, sourceOptions(context, 'release')).removeRecords(removed, { signal });
  await refreshVm(context, vm, signal);
  await audit(context, actor, { action: 'vm.release', subject: id, details: { removed } });
  return { removed, kept: changeRecords.map(({ name }) => name).filter((name) => !own.has(name)) };
}

async function requireIdle(context: EngineContext, vmId: VmId): Promise<void> {
  const { rows } = await context.db.runs.list({ vmId }, { limit: 50, cursor: null });
  const active = rows.find(({ state }) => !(ENDED_STATES as readonly string[]).includes(state));
  if (active === undefined) return;
  throw new AppError('RUN_ACTIVE', 'a run of this VM is queued or running', {
    details: { runId: active.id },
  });
}

async function allPoints(
  context: EngineContext,
  vmId: VmId,
): Promise<Parameters<typeof findOwnRecords>[2]['points']> {
  const manifests = [];
  let cursor: string | null = null;
  do {
    const page = await context.db.points.list({ vmId }, { limit: 500, cursor });
    manifests.push(...page.rows.map(({ manifest }) => manifest));
    cursor = page.nextCursor;
  } while (cursor !== null);
  return manifests;
}
