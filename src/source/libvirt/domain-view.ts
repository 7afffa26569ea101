import { parseDomain, type Domain } from '../../libvirt/domain.js';
import type { DomainDisk } from '../../libvirt/domain-disk.js';
import { isErrorCode } from '../../lib/errors.js';
import { virsh } from '../../libvirt/virsh.js';
import { attributeOf, childAt, parseXml, rootElement, textOf } from '../../libvirt/xml.js';
import { readRecords, type DomainRecords } from './change-records.js';
import { askDomain, type DomainLink } from './domain-link.js';
import { parseDomainStats, type DomainStats } from './domain-stats.js';
import { readImageInfo, type ImageInfo } from './image-info.js';

/** A domain as it was a moment ago. */
export interface DomainView {
  domain: Domain;
  stats: DomainStats;
  /** Headers of QCOW2 disks that are files or block devices of this host, by target. */
  images: Map<string, ImageInfo>;
  /** Paths of files and block devices on the hypervisor's host, volumes resolved, by target. */
  paths: Map<string, string>;
  /** Exact virtual sizes by target; one that cannot be told is not in it. */
  sizes: Map<string, number>;
  records: DomainRecords;
}

interface Control {
  signal: AbortSignal;
}

/** Asks for one domain anew. Rejects with NOT_FOUND when the hypervisor does not know it. */
export async function viewDomain(link: DomainLink, control: Control): Promise<DomainView> {
  const domain = parseDomain(await askDomain(link, ['dumpxml'], control));
  const [stats] = parseDomainStats(
    await askDomain(link, ['domstats', '--raw', '--state', '--block'], control),
  );
  return completeView(link, { domain, stats: stats ?? emptyStats(domain) }, control);
}

function emptyStats({ name }: Domain): DomainStats {
  return { name, state: 0, reason: 0, capacities: new Map(), physical: new Map() };
}

/** Adds what storage and checkpoints say to what the hypervisor said. */
export async function completeView(
  link: DomainLink,
  known: { domain: Domain; stats: DomainStats },
  control: Control,
): Promise<DomainView> {
  const { domain, stats } = known;
  const paths = new Map<string, string>();
  const sizes = new Map(stats.capacities);
  const images = new Map<string, ImageInfo>();
  for (const disk of domain.disks) {
    const place = await resolvePlace(link, disk, control);
    if (place.path === null) continue;
    paths.set(disk.target, place.path);
    if (place.sizeBytes !== null && !sizes.has(disk.target)) sizes.set(disk.target, place.sizeBytes);
    if (!link.isLocal || disk.format !== 'qcow2') continue;
    const info = await readImageInfo(place.path, { timeoutMs: link.timeoutMs, signal: control.signal });
    if (info !== null) images.set(disk.target, info);
  }
  const records = await readRecords(link, { domain, images }, control);
  return { domain, stats, images, paths, sizes, records };
}

interface DiskPlace {
  path: string | null;
  sizeBytes: number | null;
}

/** A volume is asked for at its pool; one whose pool is not active has no place now. */
async function resolvePlace(link: DomainLink, disk: DomainDisk, control: Control): Promise<DiskPlace> {
  const { path, volume } = disk.location;
  if (volume === null) return { path, sizeBytes: null };
  const args = ['vol-dumpxml', '--pool', volume.pool, '--vol', volume.name];
  const { uri, timeoutMs, run = virsh } = link;
  try {
    return readVolume(await run(args, { uri, timeoutMs, signal: control.signal }));
  } catch (error) {
    if (!isErrorCode(error, 'NOT_FOUND', 'SOURCE_REFUSED')) throw error;
    return { path: null, sizeBytes: null };
  }
}

/** Only volumes that the host has as a file or block device; a network pool's path is none. */
function readVolume(xml: string): DiskPlace {
  const volume = rootElement(parseXml(xml), 'volume');
  const type = attributeOf(volume, 'type');
  const capacity = childAt(volume, 'capacity');
  const size = Number(textOf(capacity));
  const isExact = (attributeOf(capacity, 'unit') ?? 'bytes') === 'bytes' && Number.isSafeInteger(size);
  return {
    path: type === 'file' || type === 'block' ? textOf(childAt(volume, 'target', 'path')) : null,
    sizeBytes: isExact ? size : null,
  };
}
