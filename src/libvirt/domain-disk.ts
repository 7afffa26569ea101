import { attributeOf, childAt, childElements, textOf, type XmlElement } from './xml.js';

/** Where bytes are: never with a user name or secret. */
export interface DiskLocation {
  /** file, block, network, volume, nvme, vhostuser, vhostvdpa, dir, as libvirt calls it. */
  type: string;
  /** A path, `pool/volume`, or `protocol://host:port/name`; '' when nothing is in the drive. */
  text: string;
  /** Path on the hypervisor's host, of a file or block device. */
  path: string | null;
  volume: { pool: string; name: string } | null;
}

/** One `<disk>` of a domain. */
export interface DomainDisk {
  /** Target device in the guest's eyes (`vda`): libvirt's name of the disk, unique within the domain. */
  target: string;
  device: 'disk' | 'cdrom' | 'floppy' | 'lun';
  bus: string | null;
  serial: string | null;
  location: DiskLocation;
  /** qcow2, raw, … as the domain states it; libvirt itself takes raw where nothing is stated. */
  format: string;
  isReadOnly: boolean;
  isShareable: boolean;
  isTransient: boolean;
  /** LUKS under libvirt's key: only the running machine reads it in clear. */
  isEncrypted: boolean;
  /** The disk is a part of its raw image (`<slices>`). */
  isSliced: boolean;
  /** An iothread serves it, stated at the disk or at its SCSI controller. */
  hasIothread: boolean;
  /** The domain's metadata keeps it out of backups. */
  isOptedOut: boolean;
  /** Backing images that libvirt knows, nearest first. Inactive XML mostly names none. */
  backing: { location: DiskLocation; format: string }[];
}

const DEVICES = ['disk', 'cdrom', 'floppy', 'lun'] as const;
/** libvirt's own limit is 200. */
const MAX_BACKING = 256;

/** What of the rest of the domain a disk depends on: its devices, and the targets and serials that are opted out. */
export interface DiskSurroundings {
  devices: XmlElement | null;
  excluded: ReadonlySet<string>;
}

/** Reads a `<disk>`. */
export function readDisk(element: XmlElement, { devices, excluded }: DiskSurroundings): DomainDisk {
  const source = childAt(element, 'source');
  const target = attributeOf(childAt(element, 'target'), 'dev') ?? '';
  const serial = textOf(childAt(element, 'serial'));
  const device = attributeOf(element, 'device') ?? 'disk';
  return {
    target,
    device: DEVICES.find((known) => known === device) ?? 'disk',
    bus: attributeOf(childAt(element, 'target'), 'bus'),
    serial,
    location: readLocation(attributeOf(element, 'type') ?? 'file', source),
    format: attributeOf(childAt(element, 'driver'), 'type') ?? 'raw',
    isReadOnly: childAt(element, 'readonly') !== null,
    isShareable: childAt(element, 'shareable') !== null,
    isTransient: childAt(element, 'transient') !== null,
    isEncrypted: childAt(source, 'encryption') !== null || childAt(element, 'encryption') !== null,
    isSliced: childAt(source, 'slices') !== null,
    hasIothread: hasIothread(element, devices),
    isOptedOut: excluded.has(target) || (serial !== null && excluded.has(serial)),
    backing: readBacking(element),
  };
}

function hasIothread(disk: XmlElement, devices: XmlElement | null): boolean {
  const statesOne = (driver: XmlElement | null): boolean =>
    attributeOf(driver, 'iothread') !== null || childAt(driver, 'iothreads') !== null;
  if (statesOne(childAt(disk, 'driver'))) return true;
  if (attributeOf(childAt(disk, 'target'), 'bus') !== 'scsi') return false;
  const index = attributeOf(childAt(disk, 'address'), 'controller') ?? '0';
  return childElements(devices, 'controller').some(
    (controller) =>
      attributeOf(controller, 'type') === 'scsi' &&
      (attributeOf(controller, 'index') ?? '0') === index &&
      statesOne(childAt(controller, 'driver')),
  );
}

function readBacking(disk: XmlElement): DomainDisk['backing'] {
  const chain: DomainDisk['backing'] = [];
  let at = childAt(disk, 'backingStore');
  while (at !== null && childElements(at).length > 0 && chain.length < MAX_BACKING) {
    chain.push({
      location: readLocation(attributeOf(at, 'type') ?? 'file', childAt(at, 'source')),
      format: attributeOf(childAt(at, 'format'), 'type') ?? '',
    });
    at = childAt(at, 'backingStore');
  }
  return chain;
}

function readLocation(type: string, source: XmlElement | null): DiskLocation {
  const nothing = { type, text: '', path: null, volume: null };
  const attribute = (name: string): string | null => attributeOf(source, name);
  switch (type) {
    case 'file':
    case 'block': {
      const path = attribute(type === 'file' ? 'file' : 'dev');
      return path === null ? nothing : { ...nothing, text: path, path };
    }
    case 'volume': {
      const [pool, name] = [attribute('pool'), attribute('volume')];
      return pool === null || name === null
        ? nothing
        : { ...nothing, text: `${pool}/${name}`, volume: { pool, name } };
    }
    case 'network':
      return { ...nothing, text: networkText(source) };
    default:
      return { ...nothing, text: otherText(source) };
  }
}

/** The query part is left out: it may hold keys. */
function networkText(source: XmlElement | null): string {
  if (source === null) return '';
  const hosts = childElements(source, 'host').map((host) => {
    const socket = attributeOf(host, 'socket');
    if (socket !== null) return socket;
    const port = attributeOf(host, 'port');
    return `${attributeOf(host, 'name') ?? ''}${port === null ? '' : `:${port}`}`;
  });
  const protocol = attributeOf(source, 'protocol') ?? 'unknown';
  const name = (attributeOf(source, 'name') ?? '').split('?')[0] ?? '';
  return `${protocol}://${hosts.join(',')}/${name}`;
}

/** nvme has a PCI address, vhostuser a socket, vhostvdpa a device, dir a directory. */
function otherText(source: XmlElement | null): string {
  const address = childAt(source, 'address');
  if (address !== null) {
    const parts = ['domain', 'bus', 'slot', 'function'].map((name) => attributeOf(address, name) ?? '0');
    return `pci:${parts.join(':')}`;
  }
  return attributeOf(source, 'path') ?? attributeOf(source, 'dev') ?? attributeOf(source, 'dir') ?? '';
}
