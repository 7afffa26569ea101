import { attributeOf, childAt, childElements, type XmlElement } from '../../libvirt/xml.js';
import { makeChild, removeElement, replaceElement } from './edit-xml.js';

/** Where a disk of the restored machine is. */
export interface PlacedDisk {
  kind: 'file' | 'device';
  /** As it stands in the definition. */
  path: string;
  format: 'qcow2' | 'raw';
}

export interface DiskPlan {
  /** By target (`vda`): the disks of the point. */
  disks: ReadonlyMap<string, PlacedDisk>;
  /** By target: disks that are not in the point and stay as the domain that is replaced has them. */
  keptDisks: ReadonlyMap<string, XmlElement>;
  /** Paths of media for removable drives that are on this host. */
  media: ReadonlySet<string>;
}

/** Belongs to the place or to one moment of the old disk, not to the disk. */
const OF_THE_OLD_PLACE = ['source', 'backingStore', 'mirror', 'auth', 'encryption'];

/** Changes the disks of a definition as planned; what is neither placed nor kept goes. Answers notes. */
export function rewriteDisks(devices: XmlElement | null, plan: DiskPlan): string[] {
  const notes: string[] = [];
  for (const disk of childElements(devices, 'disk')) {
    const target = attributeOf(childAt(disk, 'target'), 'dev') ?? '';
    const device = attributeOf(disk, 'device');
    const placed = plan.disks.get(target);
    const kept = plan.keptDisks.get(target);
    if (placed !== undefined) {
      notes.push(...placeDisk(disk, target, placed));
    } else if (device === 'cdrom' || device === 'floppy') {
      notes.push(...keepDrive(disk, target, plan.media));
    } else if (kept !== undefined) {
      replaceElement(disk, kept);
      notes.push(`disk ${target} is not in the point and stays as it is`);
    } else {
      removeElement(disk);
      notes.push(`disk ${target} is not in the point: the machine comes back without it`);
    }
  }
  return notes;
}

function placeDisk(disk: XmlElement, target: string, placed: PlacedDisk): string[] {
  const notes: string[] = [];
  if (childAt(disk, 'source', 'encryption') !== null || childAt(disk, 'encryption') !== null) {
    notes.push(`disk ${target} was encrypted by libvirt and is restored in clear`);
  }
  for (const name of OF_THE_OLD_PLACE) for (const child of childElements(disk, name)) removeElement(child);
  disk.setAttribute('type', placed.kind === 'file' ? 'file' : 'block');
  disk.setAttribute('device', 'disk');
  disk.removeAttribute('rawio');
  disk.removeAttribute('sgio');
  setDriver(disk, placed.format);
  const source = makeChild(disk, 'source');
  source.setAttribute(placed.kind === 'file' ? 'file' : 'dev', placed.path);
  const shareable = childAt(disk, 'shareable');
  if (shareable !== null && placed.format !== 'raw') {
    removeElement(shareable);
    notes.push(`disk ${target} was shareable, which a qcow2 image cannot be`);
  }
  return notes;
}

function setDriver(disk: XmlElement, format: PlacedDisk['format']): void {
  const driver = childAt(disk, 'driver') ?? makeChild(disk, 'driver');
  driver.setAttribute('name', 'qemu');
  driver.setAttribute('type', format);
  // Its only content is for qcow2's metadata.
  if (format === 'raw') driver.textContent = '';
}

/** A medium that is not on this host would keep the machine from starting. */
function keepDrive(disk: XmlElement, target: string, media: ReadonlySet<string>): string[] {
  const source = childAt(disk, 'source');
  if (source === null) return [];
  const file = attributeOf(disk, 'type') === 'file' ? attributeOf(source, 'file') : null;
  for (const name of ['backingStore', 'mirror']) removeElement(childAt(disk, name));
  if (file !== null && media.has(file)) return [`the drive ${target} holds ${file} of this host`];
  removeElement(source);
  disk.setAttribute('type', 'file');
  return [`the drive ${target} comes back empty: its medium is not on this host`];
}
