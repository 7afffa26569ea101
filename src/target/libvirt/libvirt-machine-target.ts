import { randomUUID } from 'node:crypto';
import path from 'node:path';
import { CleanupStack } from '../../lib/cleanup.js';
import { AppError, toAppError } from '../../lib/errors.js';
import type { Domain } from '../../libvirt/domain.js';
import { parseDomain } from '../../libvirt/domain.js';
import {
  attributeOf,
  childAt,
  childElements,
  parseXml,
  rootElement,
  type XmlElement,
} from '../../libvirt/xml.js';
import type { ServerPlace } from '../../nbd/qemu-nbd.js';
import type {
  MachineTarget,
  MachineTargetRequest,
  MachineTargetSpec,
  PreparedMachine,
} from '../machine-target.js';
import { findHostPaths } from './contain-machine.js';
import { openLibvirtHost, type LibvirtHost } from './libvirt-host.js';
import {
  fileStem,
  lstatIfThere,
  placeInDirectory,
  placeInPlace,
  requireRoom,
  resolveDirectory,
  type Placement,
  type WantedDisk,
} from './placement.js';
import { readPointConfig, type PointMachine } from './point-config.js';
import { rewriteDomain, type RewrittenDomain } from './rewrite-domain.js';
import { forgetStaleCheckpoints } from './stale-checkpoints.js';
import {
  giveAccess,
  NVRAM_DIRECTORY,
  placeStateFiles,
  planNvram,
  planTpm,
  SWTPM_DIRECTORY,
  type StateFile,
} from './state-files.js';

export interface LibvirtMachineTargetOptions {
  place: ServerPlace;
  /** Of one command to libvirt. */
  commandTimeoutMs: number;
  /** Directories nothing may be restored into. */
  forbiddenDirectories: readonly string[];
  /** Default: where a libvirt of the distribution has it. */
  swtpmDirectory?: string;
}

const MAX_PATHS_TOLD = 32;

/** A machine as it was decided in `prepare`. */
interface Plan {
  spec: MachineTargetSpec;
  options: LibvirtMachineTargetOptions;
  host: LibvirtHost;
  name: string;
  uuid: string;
  placements: Placement[];
  stateFiles: StateFile[];
  definition: RewrittenDomain;
  notes: string[];
}

/** A machine in the libvirt of this host. See MachineTarget; INVALID_INPUT for the libvirt of another host. */
export function openLibvirtMachineTarget(
  spec: MachineTargetSpec,
  options: LibvirtMachineTargetOptions,
): MachineTarget {
  return {
    async prepare(request) {
      const host = openLibvirtHost({
        uri: spec.uri,
        timeoutMs: options.commandTimeoutMs,
        directory: options.place.runtimeDirectory,
        signal: request.signal,
      });
      return preparedMachine(await makePlan(spec, options, { host, request }));
    },
  };
}

async function makePlan(
  spec: MachineTargetSpec,
  options: LibvirtMachineTargetOptions,
  { host, request }: { host: LibvirtHost; request: MachineTargetRequest },
): Promise<Plan> {
  const point = readPointConfig(request);
  const uuid = spec.identity === 'new' ? randomUUID() : point.domain.uuid;
  const current = await requireIdentity(host, { spec, uuid, name: spec.name ?? point.domain.name });
  const name = current?.domain.name ?? spec.name ?? point.domain.name;
  const wanted = request.disks.map((disk): WantedDisk => ({
    disk,
    guestTarget: point.targets.get(disk.diskId) ?? '',
  }));
  const directory = spec.place === null ? null : await resolveDirectory(spec.place, host);
  const placements =
    directory === null
      ? await placeInPlace(wanted, requireCurrent(current).domain, host)
      : placeInDirectory(wanted, { directory, name, format: spec.format });
  await requireRoom(placements);
  const nvram = await nvramOf(point, {
    options,
    name,
    current: current?.domain ?? null,
    directory,
    placements,
  });
  const tpm = await planTpm(spec.identity === 'new' ? [] : point.tpm, {
    swtpmDirectory: options.swtpmDirectory ?? SWTPM_DIRECTORY,
    uuid,
    isOverwriting: spec.identity === 'replace',
  });
  const definition = rewriteDomain(point.xml, {
    name,
    uuid,
    isNew: spec.identity === 'new',
    emulators: await host.emulators(),
    nvramPath: nvram.path,
    disks: new Map(placements.map(({ guestTarget, placed }) => [guestTarget, placed])),
    keptDisks: current?.disks ?? new Map<string, XmlElement>(),
    media: await findMedia(point.domain),
  });
  const unseen = definition.hostPaths.filter((known) => current?.hostPaths.includes(known) !== true);
  if (spec.start) requireNoHostPaths(unseen);
  await host.tryDefinition(definition.trialXml);
  const stateFiles = [...(nvram.file === null ? [] : [nvram.file]), ...tpm];
  const notes = [
    ...[...point.notes, ...definition.notes, ...nvram.notes],
    ...[...tellPaths(unseen), ...tellDropped(point.domain, current)],
  ];
  return { spec, options, host, name, uuid, placements, stateFiles, definition, notes };
}

/** The domain that is replaced, as it is defined now. */
interface CurrentDomain {
  domain: Domain;
  disks: Map<string, XmlElement>;
  hostPaths: string[];
}

/**
 * CONFLICT unless name and UUID are free, or, with `replace`, the domain is there and off with nothing that
 * counts on its present disks: saved memory would be resumed onto other disks, snapshots lie in or under them.
 */
async function requireIdentity(
  host: LibvirtHost,
  wish: { spec: MachineTargetSpec; uuid: string; name: string },
): Promise<CurrentDomain | null> {
  const domains = await host.listDomains();
  const same = domains.find(({ uuid }) => uuid === wish.uuid);
  if (wish.spec.identity !== 'replace') {
    const taken = same ?? domains.find(({ name }) => name === wish.name);
    if (taken === undefined) return null;
    throw new AppError('CONFLICT', `a domain ${taken.name} with this name or UUID is there already`, {
      details: { name: taken.name, uuid: taken.uuid },
    });
  }
  if (same === undefined) {
    throw new AppError('CONFLICT', 'there is no domain with the UUID of this machine to be replaced', {
      details: { uuid: wish.uuid },
    });
  }
  const { state, hasManagedSave } = await host.domainFacts(wish.uuid);
  if (state !== 'shut off') throw inTheWay(same.name, `it is not off but ${state}`);
  if (hasManagedSave) throw inTheWay(same.name, 'it has saved memory (`virsh managedsave-remove`)');
  if ((await host.snapshots(wish.uuid)).length > 0) throw inTheWay(same.name, 'it has snapshots');
  const xml = await host.domainXml(wish.uuid);
  const root = rootElement(parseXml(xml), 'domain');
  const elements = childElements(childAt(root, 'devices'), 'disk');
  return {
    domain: parseDomain(xml),
    disks: new Map(elements.map((disk) => [attributeOf(childAt(disk, 'target'), 'dev') ?? '', disk])),
    hostPaths: findHostPaths(root),
  };
}

/** Somebody must have looked at them before libvirt acts on them; those of a replaced domain were there before. */
function requireNoHostPaths(paths: readonly string[]): void {
  if (paths.length === 0) return;
  throw new AppError(
    'INVALID_INPUT',
    `the machine uses of this host ${paths[0] ?? ''}: restore it without starting it, look at its definition, and start it by hand`,
    { details: { field: 'start', paths: paths.slice(0, MAX_PATHS_TOLD) } },
  );
}

function tellPaths(paths: readonly string[]): string[] {
  const told = paths.slice(0, MAX_PATHS_TOLD).map((text) => `the machine uses of this host ${text}`);
  const rest = paths.length - told.length;
  return rest > 0 ? [...told, `the machine uses ${rest} more paths of this host`] : told;
}

/** Disks the domain got after the point: the definition of the point does not have them. */
function tellDropped(then: Domain, current: CurrentDomain | null): string[] {
  const known = new Set(then.disks.map(({ target }) => target));
  return (current?.domain.disks ?? [])
    .filter(({ target }) => !known.has(target))
    .map(
      ({ target, location }) =>
        `disk ${target} came after the point and is no longer attached; ${location.text} stays`,
    );
}

function inTheWay(name: string, why: string): AppError {
  return new AppError('CONFLICT', `domain ${name} cannot be replaced: ${why}`, { details: { name } });
}

function requireCurrent(current: CurrentDomain | null): CurrentDomain {
  if (current !== null) return current;
  throw new AppError('INVALID_INPUT', 'a directory or a pool must be named for the disks', {
    details: { field: 'place' },
  });
}

/** Firmware variables stay where the replaced domain has them, and lie beside the disks of any other. */
async function nvramOf(
  point: PointMachine,
  place: {
    options: LibvirtMachineTargetOptions;
    name: string;
    current: Domain | null;
    directory: string | null;
    placements: readonly Placement[];
  },
): Promise<{ path: string | null; file: StateFile | null; notes: string[] }> {
  const now = place.current?.nvram?.path ?? null;
  if (point.nvram === null) {
    const kept = point.domain.nvram === null ? null : now;
    const note = 'the firmware variables stay as the replaced domain has them: the point does not keep them';
    return { path: kept, file: null, notes: kept === null ? [] : [note] };
  }
  const beside = place.placements.find(({ target }) => target.kind === 'file')?.placed.path;
  const directory = place.directory ?? (beside === undefined ? NVRAM_DIRECTORY : path.dirname(beside));
  const file = await planNvram(
    {
      path: now ?? path.join(directory, `${fileStem(place.name)}-nvram.fd`),
      content: point.nvram,
      isOverwriting: now !== null,
    },
    place.options.forbiddenDirectories,
  );
  return { path: file.path, file, notes: [] };
}

/** Only what is a medium by its name: libvirt gives the file to QEMU's user when the machine starts. */
async function findMedia(domain: Domain): Promise<Set<string>> {
  const found = new Set<string>();
  for (const { device, location } of domain.disks) {
    const isRemovable = device === 'cdrom' || device === 'floppy';
    if (!isRemovable || location.path === null || !/\.iso$/i.test(location.path)) continue;
    if ((await lstatIfThere(location.path))?.isFile() === true) found.add(location.path);
  }
  return found;
}

function preparedMachine(plan: Plan): PreparedMachine {
  const { host, name, uuid, spec } = plan;
  const undo = new CleanupStack();
  return {
    disks: plan.placements.map(({ disk, target }) => ({ diskId: disk.diskId, target })),
    isInPlace: spec.place === null,
    notes: plan.notes,
    confirm: async () => {
      await requireIdentity(host, { spec, uuid, name });
    },
    async complete() {
      const notes = await finish(plan, undo);
      undo.release();
      return { machine: { name, uuid, isStarted: false }, notes };
    },
    start: () => host.start(uuid),
    [Symbol.asyncDispose]: () => undo.run(),
  };
}

/** The definition comes last: until then no domain names what is not there. */
async function finish(plan: Plan, undo: CleanupStack): Promise<string[]> {
  const { host, uuid, spec } = plan;
  const notes: string[] = [];
  for (const { placed, access } of plan.placements) {
    if (access !== null) await giveAccess(placed.path, access);
  }
  await placeStateFiles(plan.stateFiles, { owner: plan.options.place.owner, undo });
  if (spec.identity === 'replace') {
    const replaced = new Set(plan.placements.map(({ guestTarget }) => guestTarget));
    notes.push(...(await forgetStaleCheckpoints(host, uuid, replaced)));
  } else {
    // Also when it was taken and only the answer was lost.
    undo.defer(() => host.undefine(uuid));
  }
  await host.define(plan.definition.xml);
  if (spec.place?.kind === 'pool') notes.push(...(await refreshPool(host, spec.place.name)));
  return notes;
}

/** The machine does not need it: only lists of the pool's volumes do. */
async function refreshPool(host: LibvirtHost, pool: string): Promise<string[]> {
  try {
    await host.refreshPool(pool);
    return [];
  } catch (error) {
    return [`pool ${pool} does not list the new volumes yet: ${toAppError(error).message}`];
  }
}
