import { attributeOf, childAt, childElements, textOf, type XmlElement } from '../../libvirt/xml.js';
import { removeElement } from './edit-xml.js';

/** What every guest may read: random numbers, and firmware as packages bring it. */
const HARMLESS_PATHS = /^\/(dev\/(u?random|hwrng)$|usr\/share\/(?!.*\.\.))/;
/** Told elsewhere, or free text of management tools that libvirt does not act upon. */
const NOT_SEARCHED = new Set(['disk', 'metadata', 'emulator', 'nvram', 'title', 'description']);

export interface Containment {
  /** What was removed or is worth knowing. */
  notes: string[];
  /** `place: path` of everything of the host that the definition names outside its disks. */
  hostPaths: string[];
}

/**
 * Keeps a definition from a repository from doing on the host what no backup should bring along unseen.
 * Whoever can write to the repository could have put it there, and libvirt acts as root.
 *
 * Removed: an emulator that this host's libvirt does not name itself (libvirt runs it when it takes the
 * definition), everything of another namespace (`qemu:commandline` …), scripts of interfaces (run as root), and
 * labels of the security driver (`type='none'` would switch confinement off). Kept, but told: host devices, and
 * paths of the host: when the machine starts, libvirt gives such files to QEMU's user and may write to them.
 */
export function containMachine(root: XmlElement, emulators: ReadonlySet<string>): Containment {
  const devices = childAt(root, 'devices');
  const notes = [
    ...removeForeignEmulator(devices, emulators),
    ...removeForeignElements(root),
    ...removeScripts(devices),
    ...removeLabels(root),
    ...tellHostDevices(devices),
  ];
  return { notes, hostPaths: findHostPaths(root) };
}

function removeForeignEmulator(devices: XmlElement | null, emulators: ReadonlySet<string>): string[] {
  const notes: string[] = [];
  for (const emulator of childElements(devices, 'emulator')) {
    const path = textOf(emulator) ?? '';
    if (emulators.has(path)) continue;
    removeElement(emulator);
    notes.push(`the emulator ${path} is none of this host's libvirt: its own is used`);
  }
  return notes;
}

function removeForeignElements(root: XmlElement): string[] {
  const notes: string[] = [];
  const walk = (parent: XmlElement): void => {
    for (const element of childElements(parent)) {
      if (element.nodeName === 'metadata' && parent === root) continue;
      if (element.namespaceURI === null || element.namespaceURI === '') {
        walk(element);
        continue;
      }
      removeElement(element);
      notes.push(`<${element.nodeName}> was left out: add it by hand with \`virsh edit\` if you trust it`);
    }
  };
  walk(root);
  return notes;
}

function removeScripts(devices: XmlElement | null): string[] {
  const notes: string[] = [];
  for (const device of childElements(devices)) {
    for (const name of ['script', 'downscript']) {
      for (const script of childElements(device, name)) {
        removeElement(script);
        notes.push(`the script ${attributeOf(script, 'path') ?? ''} of an interface was left out`);
      }
    }
  }
  return notes;
}

function removeLabels(root: XmlElement): string[] {
  const notes: string[] = [];
  for (const label of [...root.getElementsByTagName('seclabel')]) {
    const type = attributeOf(label, 'type');
    if (label.parentNode === root && type !== null && type !== 'dynamic') {
      notes.push(`a security label of type ${type} was left out: the host's default is used`);
    }
    removeElement(label);
  }
  return notes;
}

function tellHostDevices(devices: XmlElement | null): string[] {
  return childElements(devices, 'hostdev').map(
    (device) => `the machine takes a ${attributeOf(device, 'type') ?? 'device'} device of this host`,
  );
}

/** `place: path` of every path of the host that a definition names outside its disks. */
export function findHostPaths(root: XmlElement): string[] {
  const found: string[] = [];
  const walk = (element: XmlElement, place: string): void => {
    const children = childElements(element);
    const values = [...element.attributes].map(({ value }) => value);
    if (children.length === 0) values.push(textOf(element) ?? '');
    for (const value of values) {
      if (value.startsWith('/') && !HARMLESS_PATHS.test(value)) found.push(`${place}: ${value}`);
    }
    for (const child of children) {
      if (!NOT_SEARCHED.has(child.nodeName)) walk(child, `${place}/${child.nodeName}`);
    }
  };
  for (const child of childElements(root)) {
    if (!NOT_SEARCHED.has(child.nodeName)) walk(child, child.nodeName);
  }
  return found;
}
