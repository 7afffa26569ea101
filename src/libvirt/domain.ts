import { AppError } from '../lib/errors.js';
import { readDisk, type DomainDisk } from './domain-disk.js';
import {
  attributeOf,
  childAt,
  childElements,
  parseXml,
  rootElement,
  textOf,
  type XmlElement,
} from './xml.js';

/**
 * Metadata with which the owner of a domain keeps disks out of backups, each by target or serial:
 * `<metadata><holdfast:backup xmlns:holdfast="urn:holdfast:domain:1"><holdfast:exclude disk="vdb"/>…`
 */
export const METADATA_NAMESPACE = 'urn:holdfast:domain:1';

/** What a domain's XML says that a backup or a restore needs to know. */
export interface Domain {
  name: string;
  uuid: string;
  /** The XML is that of a QEMU that is there, whether it runs or is paused. */
  isActive: boolean;
  disks: DomainDisk[];
  /** UEFI variables: a file of the hypervisor's host. Null without, or when they are not a local file. */
  nvram: { path: string; format: string } | null;
  tpm: DomainTpm | null;
  /** `none`: the domain has no channel for a guest agent. Inactive XML never says connected. */
  agent: 'none' | 'disconnected' | 'connected';
  /** Whom the running QEMU runs as, where libvirt's DAC driver says so. */
  runsAs: { uid: number; gid: number } | null;
}

export interface DomainTpm {
  /** emulator: swtpm, whose state is a directory of the host; others have none that could be kept. */
  backend: string;
  version: '1.2' | '2.0';
  /** Where the domain says that the state is kept; null: where libvirt puts it by itself. */
  statePath: string | null;
}

const UUID = /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/;
const AGENT_CHANNEL = 'org.qemu.guest_agent.0';

/** A UUID in the canonical form libvirt prints, from user input; INVALID_INPUT when it is none. */
export function parseDomainUuid(text: string): string {
  const uuid = text.toLowerCase();
  if (!UUID.test(uuid)) throw new AppError('INVALID_INPUT', 'not a UUID', { details: { field: 'uuid' } });
  return uuid;
}

/** Reads `virsh dumpxml`, active or inactive. Rejects with SOURCE_FORMAT what is no domain. */
export function parseDomain(xml: string): Domain {
  const root = rootElement(parseXml(xml), 'domain');
  const name = textOf(childAt(root, 'name'));
  const uuid = textOf(childAt(root, 'uuid'))?.toLowerCase();
  if (name === null || uuid === undefined || !UUID.test(uuid)) {
    throw new AppError('SOURCE_FORMAT', 'the domain XML has no name or no UUID');
  }
  const devices = childAt(root, 'devices');
  const excluded = excludedDisks(root);
  return {
    name,
    uuid,
    isActive: attributeOf(root, 'id') !== null,
    disks: childElements(devices, 'disk').map((element) => readDisk(element, { devices, excluded })),
    nvram: readNvram(root),
    tpm: readTpm(devices),
    agent: readAgent(devices),
    runsAs: readRunsAs(root),
  };
}

function excludedDisks(root: XmlElement): ReadonlySet<string> {
  const excluded = new Set<string>();
  for (const backup of inOurNamespace(childAt(root, 'metadata'), 'backup')) {
    for (const exclude of inOurNamespace(backup, 'exclude')) {
      const disk = attributeOf(exclude, 'disk');
      if (disk !== null) excluded.add(disk);
    }
  }
  return excluded;
}

function inOurNamespace(parent: XmlElement | null, name: string): XmlElement[] {
  return childElements(parent).filter(
    (element) => element.namespaceURI === METADATA_NAMESPACE && element.localName === name,
  );
}

/** Plain text, or since libvirt 8.5 `<nvram type='file'><source file=…/>`. */
function readNvram(root: XmlElement): Domain['nvram'] {
  const nvram = childAt(root, 'os', 'nvram');
  const source = childAt(nvram, 'source');
  const path = source === null ? textOf(nvram) : attributeOf(source, 'file');
  if (path === null) return null;
  return { path, format: attributeOf(nvram, 'format') ?? 'raw' };
}

function readTpm(devices: XmlElement | null): DomainTpm | null {
  const backend = childAt(devices, 'tpm', 'backend');
  if (backend === null) return null;
  return {
    backend: attributeOf(backend, 'type') ?? 'unknown',
    version: attributeOf(backend, 'version') === '1.2' ? '1.2' : '2.0',
    statePath: attributeOf(childAt(backend, 'source'), 'path'),
  };
}

function readAgent(devices: XmlElement | null): Domain['agent'] {
  for (const channel of childElements(devices, 'channel')) {
    const target = childAt(channel, 'target');
    if (attributeOf(target, 'name') !== AGENT_CHANNEL) continue;
    return attributeOf(target, 'state') === 'connected' ? 'connected' : 'disconnected';
  }
  return 'none';
}

function readRunsAs(root: XmlElement): Domain['runsAs'] {
  const dac = childElements(root, 'seclabel').find((label) => attributeOf(label, 'model') === 'dac');
  const ids = /^\+(\d{1,10}):\+(\d{1,10})$/.exec(textOf(childAt(dac, 'label')) ?? '');
  return ids === null ? null : { uid: Number(ids[1]), gid: Number(ids[2]) };
}
