import { systemClock, toTimestamp } from '../../lib/clock.js';
import { isErrorCode, toAppError } from '../../lib/errors.js';
import { parseDomain } from '../../libvirt/domain.js';
import { virsh } from '../../libvirt/virsh.js';
import type { SourceOptions } from '../source-settings.js';
import type { DiscoveredVm, UnseenMachine } from '../source.js';
import { diskFacts, lineageOf } from './disk-facts.js';
import { openConnection } from './connection.js';
import { askDomain, type DomainLink, type LibvirtLink } from './domain-link.js';
import { parseDomainStats, vmState, type DomainStats } from './domain-stats.js';
import { completeView, viewDomain, type DomainView } from './domain-view.js';

/** virsh starts a process and a connection for each question; more at once only take turns at the daemon. */
const PARALLEL = 4;

interface Control {
  signal: AbortSignal;
}

export interface DiscoverDomains {
  /** Names or UUIDs; empty: all. Those that are not there are left out. */
  names: readonly string[];
  options: SourceOptions;
  signal: AbortSignal;
  /** Called for a domain that could not be looked at now (a migration holds it, say); without it that rejects. */
  onUnseen?: (unseen: UnseenMachine) => void;
}

/** The domains of a connection, running or not. One that goes while it is looked at is left out. */
export async function discoverDomains(uri: string, wanted: DiscoverDomains): Promise<DiscoveredVm[]> {
  const { names, signal } = wanted;
  const { settings, place } = wanted.options;
  const timeoutMs = settings.snapshot.commandTimeoutMs;
  await using connection = await openConnection(uri, { place, timeoutMs, signal });
  const ask = (args: string[]): Promise<string> => virsh(args, { ...connection.link, signal });
  const libvirtVersion = await readLibvirtVersion(connection.link, { signal });
  const rest = listedUuids(await ask(['list', '--all', '--uuid', '--name']), names);
  const allStats = parseDomainStats(await ask(['domstats', '--raw', '--state', '--block']));
  const found: DiscoveredVm[] = [];
  const work = async (): Promise<void> => {
    for (let uuid = rest.shift(); uuid !== undefined; uuid = rest.shift()) {
      const link: DomainLink = { ...connection.link, uuid };
      try {
        const view = await viewListed(link, allStats, { signal });
        const source = { kind: 'libvirt', uri, uuid } as const;
        if (view !== null) found.push({ source, ...describe(view, libvirtVersion) });
      } catch (error) {
        if (wanted.onUnseen === undefined || isErrorCode(error, 'SOURCE_UNREACHABLE') || signal.aborted)
          throw error;
        wanted.onUnseen({ key: keyOf(uuid), error: toAppError(error) });
      }
    }
  };
  await Promise.all(Array.from({ length: PARALLEL }, work));
  return found.sort((a, b) => (a.name < b.name ? -1 : 1));
}

const keyOf = (uuid: string): string => `libvirt:${uuid}`;

/** The domain as it is now. NOT_FOUND when the hypervisor does not know it. */
export async function discoverDomain(
  link: DomainLink,
  control: Control,
): Promise<Omit<DiscoveredVm, 'source'>> {
  const libvirtVersion = await readLibvirtVersion(link, control);
  return describe(await viewDomain(link, control), libvirtVersion);
}

/** Of lines `<uuid> <name>`; a name may hold anything but a newline. */
function listedUuids(list: string, names: readonly string[]): string[] {
  return list.split('\n').flatMap((line) => {
    const [, uuid, name] = /^([0-9a-f-]{36}) +(.*)$/.exec(line) ?? [];
    if (uuid === undefined || name === undefined) return [];
    return names.length === 0 || names.includes(name) || names.includes(uuid) ? [uuid] : [];
  });
}

async function viewListed(
  link: DomainLink,
  allStats: readonly DomainStats[],
  control: Control,
): Promise<DomainView | null> {
  try {
    const domain = parseDomain(await askDomain(link, ['dumpxml'], control));
    const stats = allStats.find(({ name }) => name === domain.name);
    // Renamed or defined since the list was made.
    if (stats === undefined) return await viewDomain(link, control);
    return await completeView(link, { domain, stats }, control);
  } catch (error) {
    if (isErrorCode(error, 'NOT_FOUND')) return null;
    throw error;
  }
}

/** Of the daemon: `Running against daemon: 9.0.0` as 9000000. */
export async function readLibvirtVersion(
  { uri, timeoutMs, run = virsh }: LibvirtLink,
  { signal }: Control,
): Promise<number> {
  const answer = await run(['version', '--daemon'], { uri, timeoutMs, signal });
  const [, major, minor, micro] = /daemon: (\d+)\.(\d+)\.(\d+)/.exec(answer) ?? [];
  return Number(major ?? 0) * 1_000_000 + Number(minor ?? 0) * 1000 + Number(micro ?? 0);
}

function describe(view: DomainView, libvirtVersion: number): Omit<DiscoveredVm, 'source'> {
  const { domain, stats, images, sizes, records } = view;
  return {
    key: keyOf(domain.uuid),
    name: domain.name,
    facts: {
      isPresent: true,
      state: vmState(stats.state, domain.isActive),
      seenAt: toTimestamp(systemClock.nowMs()),
      changeRecords: records.machine,
    },
    disks: domain.disks.map((disk) => ({
      facts: diskFacts(disk, {
        canHaveBitmaps: images.get(disk.target)?.canHaveBitmaps ?? null,
        libvirtVersion,
      }),
      sizeBytes: sizes.get(disk.target) ?? 0,
      lineage: lineageOf(domain, disk),
    })),
  };
}
