import { attributeOf, childAt, parseXml, rootElement } from '../../libvirt/xml.js';

/** A disk of the domain, as the XML of a backup job tells it. */
export interface JobDisk {
  /** libvirt's name of the disk. */
  target: string;
  /** Null for a disk that is not backed up. */
  backup: {
    /** File of the hypervisor's host that keeps what the guest overwrites. */
    scratch: string;
    /** Checkpoint whose changes are exported; null for none. */
    since: string | null;
    /** Whether the new checkpoint counts this disk's changes. */
    isCounted: boolean;
  } | null;
}

/** Name under which libvirt exports a disk's changes. */
export const CHANGES = 'changes';

/** libvirt's `<domainbackup>` in pull mode, over a Unix socket; every disk's export has the name of its target. */
export function backupXml(socket: string, disks: readonly JobDisk[]): string {
  const lines = disks.map(({ target, backup }) => {
    if (backup === null) return `<disk${attributes({ name: target, backup: 'no' })}/>`;
    const mode =
      backup.since === null
        ? { backupmode: 'full' }
        : { backupmode: 'incremental', incremental: backup.since, exportbitmap: CHANGES };
    const names = { name: target, backup: 'yes', type: 'file', exportname: target };
    return `<disk${attributes({ ...names, ...mode })}><driver type="qcow2"/><scratch${attributes({ file: backup.scratch })}/></disk>`;
  });
  const server = `<server${attributes({ transport: 'unix', socket })}/>`;
  return `<domainbackup mode="pull">${server}<disks>${lines.join('')}</disks></domainbackup>`;
}

/** libvirt's `<domaincheckpoint>`; null when there is no disk whose changes it could count. */
export function checkpointXml(
  checkpoint: { name: string; description: string },
  disks: readonly JobDisk[],
): string | null {
  const counted = disks.filter(({ backup }) => backup?.isCounted === true).map(({ target }) => target);
  if (counted.length === 0) return null;
  const description = `<description>${escape(checkpoint.description)}</description>`;
  const all = disks.map(({ target }) => target);
  return document(checkpoint.name, description, { all, counted });
}

/**
 * A checkpoint whose bitmaps are there and that libvirt is to know again; libvirt wants a time of making,
 * which it uses for nothing.
 */
export function redefinedCheckpointXml(
  name: string,
  targets: { all: readonly string[]; counted: readonly string[] },
): string {
  return document(name, '<creationTime>1</creationTime>', targets);
}

function document(
  name: string,
  middle: string,
  targets: { all: readonly string[]; counted: readonly string[] },
): string {
  const lines = targets.all.map((target) => {
    const isCounted = targets.counted.includes(target);
    const kind = isCounted ? { checkpoint: 'bitmap', bitmap: name } : { checkpoint: 'no' };
    return `<disk${attributes({ name: target, ...kind })}/>`;
  });
  return `<domaincheckpoint><name>${escape(name)}</name>${middle}<disks>${lines.join('')}</disks></domaincheckpoint>`;
}

/** The Unix socket of the server in `virsh backup-dumpxml`; null when it is none that listens on one. */
export function socketOfBackup(xml: string): string | null {
  const server = childAt(rootElement(parseXml(xml), 'domainbackup'), 'server');
  return attributeOf(server, 'transport') === 'unix' ? attributeOf(server, 'socket') : null;
}

function attributes(pairs: Record<string, string>): string {
  return Object.entries(pairs)
    .map(([name, value]) => ` ${name}="${escape(value)}"`)
    .join('');
}

const ENTITIES: Record<string, string> = { '&': '&amp;', '<': '&lt;', '>': '&gt;', '"': '&quot;' };

function escape(text: string): string {
  return text.replaceAll(/[&<>"]/g, (character) => ENTITIES[character] ?? character);
}
