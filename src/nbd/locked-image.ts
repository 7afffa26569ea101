import { stat } from 'node:fs/promises';
import { blockDeviceBytes } from '../lib/block-device.js';
import { AppError, errnoOf } from '../lib/errors.js';
import { ToolError } from '../lib/process.js';
import { startQemuNbd, type QemuNbd, type QemuNbdOptions } from './qemu-nbd.js';

export type LockedImageOptions = Omit<QemuNbdOptions, 'isReadOnly' | 'imagePath'> & { path: string };

/**
 * A read-only `qemu-nbd` on an image that nobody may write meanwhile, neither on this host nor, where locks
 * work across hosts, on another. SOURCE_BUSY when somebody has it open for writing.
 *
 * QEMU's QCOW2 driver refuses writers beside a reader, its raw driver does not (seen with 7.2: `qemu-nbd -r` opens
 * the raw disk of a running machine). `blkdebug` is QEMU's way to say what a reader will not share; reads and block
 * status pass through it untouched. A machine that starts meanwhile is refused by QEMU ("Failed to get \"write\"
 * lock"): the other choice would be to copy a disk in motion.
 */
export async function serveLocked(options: LockedImageOptions): Promise<QemuNbd> {
  const { path, ...rest } = options;
  try {
    const imagePath = options.format === 'raw' ? await unsharedRaw(path) : path;
    return await startQemuNbd({ ...rest, imagePath, isReadOnly: true });
  } catch (error) {
    throw explain(path, error);
  }
}

async function unsharedRaw(filename: string): Promise<string> {
  const isDevice = (await stat(filename)).isBlockDevice();
  const image = { driver: isDevice ? 'host_device' : 'file', filename };
  const file = { driver: 'blkdebug', image, 'unshare-child-perms': ['write', 'resize'] };
  return `json:${JSON.stringify({ driver: 'raw', file })}`;
}

/** qemu's words are looked at because no exit code tells a lock from a missing file. */
function explain(path: string, error: unknown): unknown {
  if (!(error instanceof ToolError)) {
    const errno = error instanceof AppError ? undefined : errnoOf(error);
    if (errno === undefined) return error;
    return new AppError('SOURCE_UNREACHABLE', `${path} cannot be opened: ${errno}`, { cause: error });
  }
  const options = { cause: error, details: { ...error.details, path } };
  if (/Failed to get .*lock/.test(error.stderrTail)) {
    return new AppError('SOURCE_BUSY', `${path} is in use by another process or host`, options);
  }
  if (/No such file|Permission denied/.test(error.stderrTail)) {
    return new AppError('SOURCE_UNREACHABLE', `${path} cannot be opened: ${error.message}`, options);
  }
  if (error.stderrTail.includes('Bitmap')) {
    return new AppError('SNAPSHOT_LOST', `${path} lost its bitmap since it was looked at`, options);
  }
  return new AppError('SOURCE_FORMAT', `${path}: ${error.message}`, options);
}

/** Exact bytes of a raw file or block device, which need not be a multiple of the sector. */
export async function rawImageBytes(file: string): Promise<number> {
  try {
    const facts = await stat(file);
    if (facts.isFile()) return facts.size;
    if (!facts.isBlockDevice()) {
      throw new AppError('SOURCE_FORMAT', `${file} is neither a file nor a block device`);
    }
    return await blockDeviceBytes(file);
  } catch (error) {
    const errno = errnoOf(error);
    if (error instanceof AppError || errno === undefined) throw error;
    throw new AppError('SOURCE_UNREACHABLE', `${file} cannot be opened: ${errno}`, { cause: error });
  }
}
