import { mkdir, readlink, rename, rm, symlink } from 'node:fs/promises';
import path from 'node:path';
import { errnoOf } from '../lib/errors.js';
import { newUlid, type VolumeId } from '../lib/id.js';
import type { EngineContext } from './context.js';

/**
 * A link to the device of an attached volume, for whoever keeps a path for long: an export's file outlives a restart
 * of the host, and by the name it had before, another disk may be there then. The directory is emptied by the
 * restart, and the link comes back when the device was found to be the volume.
 */
export function volumeLinkPath(context: EngineContext, id: VolumeId): string {
  return path.join(context.runtimeDirectory, 'volumes', id);
}

/** Answers whether the link was not there, or led elsewhere. */
export async function linkVolume(context: EngineContext, id: VolumeId, devicePath: string): Promise<boolean> {
  const link = volumeLinkPath(context, id);
  if ((await targetOf(link)) === devicePath) return false;
  await mkdir(path.dirname(link), { recursive: true, mode: 0o700 });
  const partial = `${link}.${newUlid()}`;
  await symlink(devicePath, partial);
  await rename(partial, link);
  return true;
}

/** None there is fine. */
export async function unlinkVolume(context: EngineContext, id: VolumeId): Promise<void> {
  await rm(volumeLinkPath(context, id), { force: true });
}

async function targetOf(link: string): Promise<string | null> {
  try {
    return await readlink(link);
  } catch (error) {
    if (errnoOf(error) === 'ENOENT') return null;
    throw error;
  }
}
