import type { Domain } from '../../libvirt/domain.js';
import { bitmapNameFor, pointOfBitmap } from '../bitmap-name.js';
import type { MachineRecord } from '../source.js';
import { listCheckpoints, type Checkpoint } from './checkpoints.js';
import type { DomainLink } from './domain-link.js';
import type { ImageInfo } from './image-info.js';

/** A record of one disk. */
export interface DiskRecord {
  name: string;
  isInconsistent: boolean;
  /** What it holds now; null when it cannot be told. */
  dirtyBytes: number | null;
}

/** All records of a domain whose names are of our form. */
export interface DomainRecords {
  machine: MachineRecord[];
  byTarget: Map<string, DiskRecord[]>;
}

/** Exactly our form: a checkpoint whose name merely holds such an id is somebody else's. */
function isOurs(name: string): boolean {
  const point = pointOfBitmap(name);
  return point !== null && name === bitmapNameFor(point);
}

/**
 * What libvirt and the disks agree upon. Of an active domain libvirt looks into QEMU's bitmaps itself (the size of a
 * checkpoint is there only when they are whole, recording and consistent), which needs no monitor command and
 * does not taint the domain. Of one that is off the images are the truth; `images` has those that could be read.
 */
export async function readRecords(
  link: DomainLink,
  facts: { domain: Domain; images: ReadonlyMap<string, ImageInfo> },
  control: { signal: AbortSignal },
): Promise<DomainRecords> {
  const { domain, images } = facts;
  const checkpoints = await listCheckpoints(link, isOurs, control);
  const byTarget = domain.isActive ? recordsOfCheckpoints(checkpoints) : recordsOfImages(images);
  const names = new Set(checkpoints.map(({ name }) => name));
  // After a migration, or when an older image was put back, images have bitmaps of which libvirt knows nothing.
  for (const records of [...byTarget.values(), ...recordsOfImages(images).values()]) {
    for (const { name } of records) names.add(name);
  }
  const targets = new Set(domain.disks.map(({ target }) => target));
  const machine = [...names].map((name) => ({
    name,
    pointId: pointOfBitmap(name),
    isBroken: isBroken(name, {
      checkpoint: checkpoints.find((checkpoint) => checkpoint.name === name),
      byTarget,
      isKnown: (target) => targets.has(target) && (domain.isActive || images.has(target)),
    }),
  }));
  return { machine, byTarget };
}

function recordsOfCheckpoints(checkpoints: readonly Checkpoint[]): Map<string, DiskRecord[]> {
  const byTarget = new Map<string, DiskRecord[]>();
  for (const { name, disks } of checkpoints) {
    for (const { target, bitmap, isBroken, dirtyBytes } of disks) {
      if (bitmap !== name) continue;
      const records = byTarget.get(target) ?? [];
      records.push({ name, isInconsistent: isBroken !== false, dirtyBytes });
      byTarget.set(target, records);
    }
  }
  return byTarget;
}

function recordsOfImages(images: ReadonlyMap<string, ImageInfo>): Map<string, DiskRecord[]> {
  const byTarget = new Map<string, DiskRecord[]>();
  for (const [target, { bitmaps }] of images) {
    const ours = bitmaps.filter(({ name }) => isOurs(name));
    byTarget.set(
      target,
      ours.map((bitmap) => ({ ...bitmap, dirtyBytes: null })),
    );
  }
  return byTarget;
}

/** No disk that can be looked at has a usable bitmap of it: nothing is lost by removing it. */
function isBroken(
  name: string,
  facts: {
    checkpoint: Checkpoint | undefined;
    byTarget: DomainRecords['byTarget'];
    isKnown: (target: string) => boolean;
  },
): boolean {
  const { checkpoint, byTarget, isKnown } = facts;
  const isUsable = (target: string): boolean =>
    (byTarget.get(target) ?? []).some((record) => record.name === name && !record.isInconsistent);
  const holders = [...byTarget].filter(([, records]) => records.some((record) => record.name === name));
  const targets = new Set([
    ...(checkpoint?.disks ?? []).map(({ target }) => target),
    ...holders.map(([target]) => target),
  ]);
  const known = [...targets].filter(isKnown);
  return known.length > 0 && !known.some(isUsable);
}
