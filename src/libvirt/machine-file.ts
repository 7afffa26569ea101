import type { DiskId } from '../lib/id.js';

/** The name of the file under a point's config/ that says what the others are. */
export const MACHINE_FILE = 'machine.json';
export const DOMAIN_FILE = 'domain.xml';

/** `config/<point-id>/machine.json`: the machine a point was taken of, and what could not be kept of it. */
export interface MachineFile {
  kind: 'libvirt' | 'qemu';
  name: string;
  uuid: string | null;
  /** The disks of the point, by the target they had at that instant. */
  disks: { diskId: DiskId; target: string }[];
  /** Files kept beside this one, with the place each had on the hypervisor's host. */
  files: { name: string; role: 'domain' | 'nvram' | 'tpm'; path: string | null }[];
  /** Sentences: what belongs to the machine and is not in this point, and why. */
  notes: string[];
}
