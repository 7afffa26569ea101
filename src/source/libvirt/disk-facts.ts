import type { Domain } from '../../libvirt/domain.js';
import type { DomainDisk } from '../../libvirt/domain-disk.js';
import type { DiskFacts } from '../source.js';

/** What more is known of a disk than the domain's XML says. */
export interface DiskSupport {
  /** Of its QCOW2 header; null when it was not looked at. */
  canHaveBitmaps: boolean | null;
  /** Of the daemon, as it counts versions (9.0.0 is 9000000). */
  libvirtVersion: number;
}

/** Before 7.2 incremental backup had to be switched on by hand in every domain. */
const FIRST_INCREMENTAL_VERSION = 7_002_000;

/** Devices behind which there is no image that QEMU's block layer backs up. */
const PASSTHROUGH_TYPES = ['nvme', 'vhostuser', 'vhostvdpa', 'dir'];

/** Identifies the disk: the same domain and place, whatever host it runs on and whatever target it has. */
export function lineageOf(domain: Pick<Domain, 'uuid'>, disk: DomainDisk): string {
  const { text } = disk.location;
  return `libvirt:${domain.uuid}:${text === '' ? `empty ${disk.target}` : text}`;
}

export function diskFacts(disk: DomainDisk, support: DiskSupport): DiskFacts {
  const reason = whyNotIncremental(disk, support);
  return {
    isPresent: true,
    target: disk.target,
    serial: disk.serial,
    format: disk.format,
    location: disk.location.text,
    skip: whySkipped(disk),
    incremental: { isPossible: reason === null, reason },
  };
}

function whySkipped(disk: DomainDisk): DiskFacts['skip'] {
  if (disk.device === 'cdrom' || disk.device === 'floppy') {
    return { code: 'REMOVABLE', sentence: `${disk.target} is a removable medium (${disk.device})` };
  }
  if (disk.device === 'lun') {
    return { code: 'PASSTHROUGH', sentence: `${disk.target} is a SCSI device handed to the guest as it is` };
  }
  if (PASSTHROUGH_TYPES.includes(disk.location.type)) {
    return {
      code: 'PASSTHROUGH',
      sentence: `${disk.target} is a ${disk.location.type} disk, which the hypervisor cannot back up`,
    };
  }
  if (disk.location.text === '') return { code: 'EMPTY', sentence: `nothing stands behind ${disk.target}` };
  if (disk.isReadOnly) return { code: 'READ_ONLY', sentence: `${disk.target} is read-only` };
  if (disk.isOptedOut) {
    return { code: 'OPTED_OUT', sentence: `the machine's metadata keeps ${disk.target} out of backups` };
  }
  return null;
}

function whyNotIncremental(disk: DomainDisk, support: DiskSupport): string | null {
  if (disk.format !== 'qcow2') {
    return `${disk.format} images keep no record of changes; qcow2 does`;
  }
  if (support.canHaveBitmaps === false) {
    return 'the qcow2 image is of version 2 (compat 0.10); qemu-img amend -o compat=1.1 makes it version 3';
  }
  if (disk.isTransient) return 'what a transient disk records is dropped when the machine stops';
  if (support.libvirtVersion < FIRST_INCREMENTAL_VERSION) {
    return 'libvirt is older than 7.2 there';
  }
  return null;
}
