import { isUlid } from '../../lib/id.js';
import type { LibvirtHost } from './libvirt-host.js';

/** Checkpoints that Holdfast makes: `holdfast-<point id>`. */
function isOurs(name: string): boolean {
  return name.startsWith('holdfast-') && isUlid(name.slice('holdfast-'.length));
}

/**
 * The bitmaps of replaced images are gone with them, and libvirt does not know. Makes it forget the checkpoints
 * of ours that have no bitmap left: all their disks were replaced. One that still has a bitmap on another disk
 * stays, so that this disk goes on being counted; the next backup sees what is missing of it. Those of other
 * programs stay in any case. Answers notes.
 */
export async function forgetStaleCheckpoints(
  host: LibvirtHost,
  uuid: string,
  replaced: ReadonlySet<string>,
): Promise<string[]> {
  const notes: string[] = [];
  for (const name of await host.checkpoints(uuid)) {
    const disks = await host.checkpointDisks(uuid, name);
    if (!disks.some((disk) => replaced.has(disk))) continue;
    if (!isOurs(name)) {
      notes.push(`checkpoint ${name} of another program has lost its bitmaps on disks that were replaced`);
    } else if (disks.every((disk) => replaced.has(disk))) {
      await host.forgetCheckpoint(uuid, name);
    }
  }
  return notes;
}
