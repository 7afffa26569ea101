import { chmod, chown, mkdir, rm } from 'node:fs/promises';
import path from 'node:path';
import type { CleanupStack } from '../../lib/cleanup.js';
import { AppError } from '../../lib/errors.js';
import { asTargetError, placeFile, requireAllowed, requireFree } from '../file-target.js';
import { lstatIfThere } from './placement.js';

/** Where libvirt keeps the state of emulated TPMs, each under the UUID of its domain (fixed when libvirt is built). */
export const SWTPM_DIRECTORY = '/var/lib/libvirt/swtpm';
/** `…/<version>/<file>`, as swtpm names them. */
const TPM_FILE = /\/(tpm2|tpm1\.2)\/([0-9A-Za-z][0-9A-Za-z._-]{0,63})$/;
/** libvirt's own choice for files of firmware variables; for a machine that has no file of its own beside them. */
export const NVRAM_DIRECTORY = '/var/lib/libvirt/qemu/nvram';

/**
 * A small file of the machine, placed when its disks are complete. libvirt gives it to the user that QEMU or swtpm
 * runs as when the machine starts; where it is configured not to, a replaced file's owner and mode are kept.
 */
export interface StateFile {
  path: string;
  content: Buffer;
  isOverwriting: boolean;
}

/** Firmware variables. Refuses a place that is forbidden or, unless it is to be replaced, taken. */
export async function planNvram(
  file: StateFile,
  forbiddenDirectories: readonly string[],
): Promise<StateFile> {
  await requireAllowed(file.path, forbiddenDirectories);
  await requireFree(file.path, file.isOverwriting);
  return file;
}

/**
 * State of the emulated TPM under the UUID it belongs to. What a path in the point says counts only for its
 * last two parts, which must be names of swtpm's. TARGET_EXISTS when the state of a domain that is gone is there.
 */
export async function planTpm(
  files: readonly { path: string; content: Buffer }[],
  spec: { swtpmDirectory: string; uuid: string; isOverwriting: boolean },
): Promise<StateFile[]> {
  if (files.length === 0) return [];
  const directory = path.join(spec.swtpmDirectory, spec.uuid);
  const facts = await lstatIfThere(directory);
  if (facts !== null && !spec.isOverwriting) {
    throw new AppError('TARGET_EXISTS', `${directory} is there: a TPM's state of a domain that is gone`);
  }
  return files.map(({ path: place, content }) => {
    const [, version = '', name = ''] = TPM_FILE.exec(place) ?? [];
    if (name === '') {
      throw new AppError('INVALID_INPUT', 'the point names a file of the TPM that is none', {
        details: { field: 'pointId' },
      });
    }
    return { path: path.join(directory, version, name), content, isOverwriting: spec.isOverwriting };
  });
}

/** Places the files, each in one step; what was made and did not replace anything is removed by `undo`. */
export async function placeStateFiles(
  files: readonly StateFile[],
  options: { owner: string; undo: CleanupStack },
): Promise<void> {
  for (const { path: place, content, isOverwriting } of files) {
    await makeParents(path.dirname(place), options.undo);
    const before = await lstatIfThere(place);
    await placeFile({ path: place, content }, { owner: options.owner, overwrite: isOverwriting });
    if (before === null) options.undo.defer(() => rm(place, { force: true }));
    else await giveAccess(place, before);
  }
}

/** The TPM's directories: `<uuid>`, which others may pass, and in it one for swtpm's user alone. */
async function makeParents(directory: string, undo: CleanupStack): Promise<void> {
  if ((await lstatIfThere(directory)) !== null) return;
  const parent = path.dirname(directory);
  if ((await lstatIfThere(parent)) === null) await makeDirectory(parent, 0o711, undo);
  await makeDirectory(directory, 0o700, undo);
}

async function makeDirectory(directory: string, mode: number, undo: CleanupStack): Promise<void> {
  const made = await asTargetError(mkdir(directory, { recursive: true }));
  await asTargetError(chmod(directory, mode));
  if (made !== undefined) undo.defer(() => rm(made, { recursive: true, force: true }));
}

/** Gives a file that replaced another the owner and the mode that one had. */
export async function giveAccess(
  file: string,
  { uid, gid, mode }: { uid: number; gid: number; mode: number },
): Promise<void> {
  await asTargetError(chown(file, uid, gid));
  await asTargetError(chmod(file, mode & 0o777));
}
