import { rm, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { AppError, isErrorCode } from '../../lib/errors.js';
import { newUlid } from '../../lib/id.js';
import { parseDomain, type Domain } from '../../libvirt/domain.js';
import { attributeOf, childAt, childElements, parseXml, rootElement, textOf } from '../../libvirt/xml.js';
import { redefinedCheckpointXml } from './backup-xml.js';
import { askDomain, type DomainLink } from './domain-link.js';
import type { HypervisorHost } from './hypervisor-host.js';
import { removeStoredBitmap } from './stored-bitmap.js';

/** A checkpoint as libvirt knows it, anybody's. */
export interface Checkpoint {
  name: string;
  parent: string | null;
  disks: CheckpointDisk[];
}

export interface CheckpointDisk {
  target: string;
  bitmap: string;
  /** The bitmap is missing or inconsistent. Null while the machine is off: libvirt does not look then. */
  isBroken: boolean | null;
  /** What it has recorded, where libvirt tells. */
  dirtyBytes: number | null;
}

export interface CheckpointPlace {
  link: DomainLink;
  host: HypervisorHost;
  /** Of this host, for files handed to virsh. */
  runtimeDirectory: string;
}

interface Control {
  signal?: AbortSignal | undefined;
}

/** The checkpoints whose names are wanted, parents first. Rejects with NOT_FOUND when there is no such domain. */
export async function listCheckpoints(
  link: DomainLink,
  isWanted: (name: string) => boolean,
  control: Control,
): Promise<Checkpoint[]> {
  const list = await askDomain(link, ['checkpoint-list', '--name', '--topological'], control);
  const names = list.split('\n').filter((name) => name !== '' && isWanted(name));
  if (names.length === 0) return [];
  const { isActive } = await readDomain(link, control);
  const found: Checkpoint[] = [];
  for (const name of names) {
    const checkpoint = await readCheckpoint(link, { name, isActive }, control);
    if (checkpoint !== null) found.push(checkpoint);
  }
  return found;
}

/**
 * Removes a checkpoint with its bitmaps, also one whose bitmaps are lost or broken in part or at all, and bitmaps of its
 * name that libvirt does not know. Other checkpoints, parents or children, stay as they are. Gone already is
 * no error. While the machine is off libvirt removes no bitmap: those in local image files are taken out here, else it
 * rejects with SOURCE_REFUSED and nothing is changed.
 */
export async function removeCheckpoint(
  place: CheckpointPlace,
  name: string,
  control: Control = {},
): Promise<void> {
  const domain = await orNull(readDomain(place.link, control));
  if (domain === null) return;
  if (!domain.isActive) {
    for (const disk of domain.disks) await removeStoredBitmap(place, { disk, bitmap: name }, control);
    await forget(place.link, name, control);
    return;
  }
  try {
    await askDomain(place.link, ['checkpoint-delete', '--checkpointname', name], control);
  } catch (error) {
    if (!isErrorCode(error, 'NOT_FOUND') && !isBitmapLost(error)) throw error;
    await removeByDisk(place, { name, domain }, control);
  }
}

async function readDomain(link: DomainLink, control: Control): Promise<Domain> {
  return parseDomain(await askDomain(link, ['dumpxml'], control));
}

/** Null for what is not there (any more). */
async function orNull<T>(question: Promise<T>): Promise<T | null> {
  try {
    return await question;
  } catch (error) {
    if (isErrorCode(error, 'NOT_FOUND')) return null;
    throw error;
  }
}

/** Null when it went since the list was made. libvirt tells the size of a bitmap only when it is there and consistent. */
async function readCheckpoint(
  link: DomainLink,
  { name, isActive }: { name: string; isActive: boolean },
  control: Control,
): Promise<Checkpoint | null> {
  const size = isActive ? ['--size'] : [];
  const command = ['checkpoint-dumpxml', '--checkpointname', name, '--no-domain', ...size] as const;
  const xml = await orNull(askDomain(link, command, control));
  if (xml === null) return null;
  const root = rootElement(parseXml(xml), 'domaincheckpoint');
  const disks: CheckpointDisk[] = [];
  for (const disk of childElements(childAt(root, 'disks'), 'disk')) {
    const [target, bitmap] = [attributeOf(disk, 'name'), attributeOf(disk, 'bitmap')];
    if (target === null || bitmap === null) continue;
    const size = attributeOf(disk, 'size');
    const dirtyBytes = size === null ? null : Number(size);
    disks.push({ target, bitmap, isBroken: isActive ? size === null : null, dirtyBytes });
  }
  return { name, parent: textOf(childAt(root, 'parent', 'name')), disks };
}

/**
 * libvirt refuses the whole checkpoint when one of its bitmaps is not there. So it is told of a checkpoint of
 * one disk alone, and deletes that, disk after disk.
 */
async function removeByDisk(
  place: CheckpointPlace,
  { name, domain }: { name: string; domain: Domain },
  control: Control,
): Promise<void> {
  const { link } = place;
  const { disks } = domain;
  const all = disks.map(({ target }) => target);
  for (const { target, format } of disks) {
    if (format !== 'qcow2') continue;
    await redefine(place, redefinedCheckpointXml(name, { all, counted: [target] }), control);
    try {
      await askDomain(link, ['checkpoint-delete', '--checkpointname', name], control);
    } catch (error) {
      if (!isBitmapLost(error)) throw error;
    }
  }
  await forget(link, name, control);
}

async function redefine(place: CheckpointPlace, xml: string, control: Control): Promise<void> {
  await withXmlFile(place.runtimeDirectory, xml, (file) =>
    askDomain(place.link, ['checkpoint-create', '--redefine', '--xmlfile', file], control),
  );
}

/** What libvirt itself remembers of a checkpoint. */
async function forget(link: DomainLink, name: string, control: Control): Promise<void> {
  await orNull(askDomain(link, ['checkpoint-delete', '--metadata', '--checkpointname', name], control));
}

/** libvirt 9.0 and 11, src/qemu/qemu_checkpoint.c. */
function isBitmapLost(error: unknown): boolean {
  return error instanceof AppError && /bitmap '.*' not found in backing chain/.test(error.message);
}

/** virsh reads XML from files alone. */
export async function withXmlFile<T>(
  directory: string,
  xml: string,
  use: (file: string) => Promise<T>,
): Promise<T> {
  const file = path.join(directory, `x-${newUlid().slice(-12)}.xml`);
  try {
    await writeFile(file, xml, { mode: 0o600, flag: 'wx' });
    return await use(file);
  } finally {
    await rm(file, { force: true });
  }
}
