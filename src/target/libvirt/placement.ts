import type { Stats } from 'node:fs';
import { lstat, realpath, stat, statfs } from 'node:fs/promises';
import path from 'node:path';
import { AppError, errnoOf } from '../../lib/errors.js';
import { runTool } from '../../lib/process.js';
import { formatBytes } from '../../lib/units.js';
import type { Domain } from '../../libvirt/domain.js';
import type { DomainDisk } from '../../libvirt/domain-disk.js';
import { asTargetError } from '../file-target.js';
import type { MachineTargetDisk, MachineTargetSpec } from '../machine-target.js';
import type { TargetSpec } from '../target.js';
import type { LibvirtHost } from './libvirt-host.js';
import type { PlacedDisk } from './rewrite-disks.js';

/** Where one disk goes: for the copy, and for the definition. */
export interface Placement {
  disk: MachineTargetDisk;
  /** The guest's name of it (`vda`). */
  guestTarget: string;
  target: TargetSpec;
  placed: PlacedDisk;
  /** Of the file that is replaced: whoever could read the old one can read the new. */
  access: { uid: number; gid: number; mode: number } | null;
}

export interface WantedDisk {
  disk: MachineTargetDisk;
  guestTarget: string;
}

const QEMU_IMG_TIMEOUT_MS = 30_000;
const MAX_NAME_CHARACTERS = 120;

/** The directory that a place names; TARGET_IO when it is not there. */
export async function resolveDirectory(
  place: NonNullable<MachineTargetSpec['place']>,
  host: LibvirtHost,
): Promise<string> {
  const directory = place.kind === 'pool' ? await host.poolDirectory(place.name) : place.path;
  const facts = await asTargetError(stat(directory));
  if (!facts.isDirectory()) throw new AppError('TARGET_IO', `${directory} is not a directory`);
  return directory;
}

/** The machine's name as the beginning of a file name. */
export function fileStem(name: string): string {
  const stem = name.replaceAll(/[^0-9A-Za-z._-]/g, '_').slice(0, MAX_NAME_CHARACTERS);
  return stem.startsWith('.') ? `_${stem.slice(1)}` : stem;
}

/** New files, named after the machine and the disk's target. */
export function placeInDirectory(
  wanted: readonly WantedDisk[],
  place: { directory: string; name: string; format: 'qcow2' | 'raw' },
): Placement[] {
  return wanted.map(({ disk, guestTarget }) => {
    const file = path.join(place.directory, `${fileStem(place.name)}-${guestTarget}.${place.format}`);
    return {
      disk,
      guestTarget,
      target: { kind: 'file', path: file, format: place.format },
      placed: { kind: 'file', path: file, format: place.format },
      access: null,
    };
  });
}

/**
 * The places the domain's own disks have. CONFLICT for what cannot be put back there: a disk the domain does
 * not have now, one that is no local file or block device, and an image that stands on another.
 */
export async function placeInPlace(
  wanted: readonly WantedDisk[],
  current: Domain,
  host: LibvirtHost,
): Promise<Placement[]> {
  const placements: Placement[] = [];
  for (const { disk, guestTarget } of wanted) {
    const now = current.disks.find((candidate) => candidate.target === guestTarget);
    if (now === undefined) throw notInPlace(guestTarget, 'the domain does not have it now');
    const place = await localPath(now, host);
    placements.push(await placeOver({ disk, guestTarget }, now, place));
  }
  return placements;
}

async function localPath(disk: DomainDisk, host: LibvirtHost): Promise<string> {
  const { path: file, volume, type } = disk.location;
  if (disk.isEncrypted) throw notInPlace(disk.target, 'it is encrypted by libvirt');
  if (disk.isSliced) throw notInPlace(disk.target, 'it is a part of its image');
  if (disk.backing.length > 0) throw notInPlace(disk.target, 'its image stands on another');
  if (file !== null) return file;
  const ofVolume = volume === null ? '' : await host.volumePath(volume.pool, volume.name);
  if (path.isAbsolute(ofVolume)) return ofVolume;
  throw notInPlace(disk.target, `it is of type ${type}`);
}

async function placeOver(wanted: WantedDisk, now: DomainDisk, place: string): Promise<Placement> {
  const real = await resolveLinks(place);
  const facts = await lstatIfThere(real);
  if (facts?.isBlockDevice() === true) {
    return {
      ...wanted,
      target: { kind: 'device', path: real },
      placed: { kind: 'device', path: place, format: 'raw' },
      access: null,
    };
  }
  if (now.format !== 'raw' && now.format !== 'qcow2')
    throw notInPlace(now.target, `its format is ${now.format}`);
  if (facts !== null) await requireNoBacking(now.target, { file: real, format: now.format });
  return {
    ...wanted,
    target: { kind: 'file', path: real, format: now.format },
    placed: { kind: 'file', path: place, format: now.format },
    access: facts,
  };
}

/** An image that went with its disk is no obstacle; its directory must be there. */
async function resolveLinks(place: string): Promise<string> {
  try {
    return await realpath(place);
  } catch (error) {
    if (errnoOf(error) !== 'ENOENT') return asTargetError(Promise.reject(error as Error));
    return path.join(await asTargetError(realpath(path.dirname(place))), path.basename(place));
  }
}

/** libvirt's XML of a domain that is off mostly does not tell; the image does. */
async function requireNoBacking(target: string, image: { file: string; format: string }): Promise<void> {
  if (image.format === 'raw') return;
  const { stdout } = await runTool(
    'qemu-img',
    ['info', '-f', image.format, '--output=json', '--', image.file],
    { timeoutMs: QEMU_IMG_TIMEOUT_MS },
  );
  const facts = JSON.parse(stdout) as Record<string, unknown>;
  if (facts['backing-filename'] !== undefined) throw notInPlace(target, 'its image stands on another');
}

function notInPlace(target: string, why: string): AppError {
  return new AppError(
    'CONFLICT',
    `disk ${target} cannot be restored in place: ${why}; name a directory or a pool`,
    { details: { disk: target } },
  );
}

/** TARGET_FULL when what is written for certain does not fit; an old file stays until the new one is complete. */
export async function requireRoom(placements: readonly Placement[]): Promise<void> {
  const needed = new Map<number, { directory: string; bytes: number }>();
  for (const { disk, target } of placements) {
    if (target.kind !== 'file') continue;
    const directory = path.dirname(target.path);
    const { dev } = await asTargetError(stat(directory));
    const bytes = (needed.get(dev)?.bytes ?? 0) + disk.leastBytes;
    needed.set(dev, { directory, bytes });
  }
  for (const { directory, bytes } of needed.values()) {
    const { bavail, bsize } = await asTargetError(statfs(directory));
    const freeBytes = bavail * bsize;
    if (freeBytes >= bytes) continue;
    throw new AppError(
      'TARGET_FULL',
      `${directory} has ${formatBytes(freeBytes)} free, and at least ${formatBytes(bytes)} are needed`,
      { details: { directory, freeBytes, neededBytes: bytes } },
    );
  }
}

export async function lstatIfThere(file: string): Promise<Stats | null> {
  try {
    return await lstat(file);
  } catch (error) {
    if (errnoOf(error) === 'ENOENT') return null;
    return asTargetError(Promise.reject(error as Error));
  }
}
