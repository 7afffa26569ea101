import { randomBytes } from 'node:crypto';
import {
  attributeOf,
  childAt,
  childElements,
  parseXml,
  rootElement,
  serializeXml,
  type XmlElement,
} from '../../libvirt/xml.js';
import { containMachine } from './contain-machine.js';
import { makeChild, removeElement } from './edit-xml.js';
import { rewriteDisks, type DiskPlan } from './rewrite-disks.js';

/** What becomes of a domain's XML. */
export interface DomainPlan extends DiskPlan {
  name: string;
  uuid: string;
  /** A second machine beside the old one: nothing that must be unique may be the same. */
  isNew: boolean;
  /** Emulators this host's libvirt knows; any other is not run. */
  emulators: ReadonlySet<string>;
  /** Where the firmware's variables will be; null leaves that to libvirt, which starts with fresh ones. */
  nvramPath: string | null;
}

export interface RewrittenDomain {
  /** For `virsh define`. */
  xml: string;
  /** The same without what reaches into the host: for trying whether libvirt takes it. */
  trialXml: string;
  notes: string[];
  /** `place: path` of everything of the host that it uses outside its disks. */
  hostPaths: string[];
}

/** Devices that even a trial would open on the host, or need there although a definition does not. */
const LEFT_OUT_OF_TRIAL = ['interface', 'hostdev', 'filesystem', 'vsock', 'shmem'];

/**
 * The definition of the restored machine, from that of the point. The XML comes from a repository: libvirt
 * runs programs and opens files that a definition names, so what does not belong to the machine itself is
 * removed or told (see `containMachine`). Throws SOURCE_FORMAT for what is no domain.
 */
export function rewriteDomain(xml: string, plan: DomainPlan): RewrittenDomain {
  const document = parseXml(xml);
  const root = rootElement(document, 'domain');
  const notes: string[] = [];
  root.removeAttribute('id');
  setText(root, 'name', plan.name);
  setText(root, 'uuid', plan.uuid);
  for (const entry of childElements(childAt(root, 'sysinfo', 'system'), 'entry')) {
    if (attributeOf(entry, 'name') === 'uuid') entry.textContent = plan.uuid;
  }
  // Guests look at the generation to learn that they were put back; libvirt makes a new one.
  for (const generation of childElements(root, 'genid')) generation.textContent = '';
  notes.push(...rewriteDisks(childAt(root, 'devices'), plan));
  notes.push(...rewriteNvram(root, plan));
  if (plan.isNew) notes.push(...makeUnique(childAt(root, 'devices')));
  const { notes: removed, hostPaths } = containMachine(root, plan.emulators);
  notes.push(...removed);
  const text = serializeXml(document);
  for (const name of LEFT_OUT_OF_TRIAL) {
    for (const device of childElements(childAt(root, 'devices'), name)) removeElement(device);
  }
  return { xml: text, trialXml: serializeXml(document), notes, hostPaths };
}

function setText(parent: XmlElement, name: string, value: string): void {
  const element = childAt(parent, name);
  if (element !== null) element.textContent = value;
}

function rewriteNvram(root: XmlElement, plan: DomainPlan): string[] {
  const os = childAt(root, 'os');
  const nvram = childAt(os, 'nvram');
  if (plan.nvramPath === null) {
    if (nvram === null) return [];
    clearNvram(nvram);
    if (attributeOf(nvram, 'template') === null) removeElement(nvram);
    return ['the firmware starts with fresh variables: the point does not keep them'];
  }
  if (os === null) return [];
  const place = nvram ?? makeChild(os, 'nvram');
  clearNvram(place);
  place.textContent = plan.nvramPath;
  return [];
}

function clearNvram(nvram: XmlElement): void {
  nvram.removeAttribute('type');
  nvram.textContent = '';
}

/** Everything two machines on one host or network cannot both have. */
function makeUnique(devices: XmlElement | null): string[] {
  const notes: string[] = [];
  for (const device of childElements(devices)) {
    const isHostDevice = device.nodeName === 'hostdev' || attributeOf(device, 'type') === 'hostdev';
    if (isHostDevice) {
      removeElement(device);
      notes.push(`a ${device.nodeName} that takes a device of the host was left out of the new machine`);
    } else if (device.nodeName === 'interface') {
      renewInterface(device);
    } else if (device.nodeName === 'graphics') {
      renewGraphics(device);
    } else if (device.nodeName === 'vsock') {
      const address = childAt(device, 'cid');
      address?.setAttribute('auto', 'yes');
      address?.removeAttribute('address');
    } else if (device.nodeName === 'channel' && attributeOf(device, 'type') === 'unix') {
      // libvirt makes a path of its own for the new name.
      removeElement(childAt(device, 'source'));
    } else if (device.nodeName === 'tpm' && attributeOf(childAt(device, 'backend'), 'type') === 'emulator') {
      notes.push('the TPM of the new machine is empty: what was sealed to the old one does not open');
    }
  }
  return notes;
}

function renewInterface(device: XmlElement): void {
  childAt(device, 'mac')?.setAttribute('address', newMac());
  // Names of the host's end of the wire and of a switch's port.
  const target = childAt(device, 'target');
  if (attributeOf(target, 'dev') !== null) target?.removeAttribute('dev');
  childAt(device, 'source')?.removeAttribute('portid');
  childAt(device, 'virtualport', 'parameters')?.removeAttribute('interfaceid');
}

function renewGraphics(device: XmlElement): void {
  for (const name of ['port', 'tlsPort', 'websocket', 'socket']) device.removeAttribute(name);
  if (['vnc', 'spice', 'rdp'].includes(attributeOf(device, 'type') ?? '')) {
    device.setAttribute('autoport', 'yes');
  }
  for (const listen of childElements(device, 'listen')) listen.removeAttribute('socket');
}

/** In QEMU's range of locally made addresses, which libvirt uses too. */
function newMac(): string {
  return ['52', '54', '00', ...[...randomBytes(3)].map((byte) => byte.toString(16).padStart(2, '0'))].join(
    ':',
  );
}
