import { open, readFile, readdir, stat } from 'node:fs/promises';
import { constants } from 'node:fs';
import path from 'node:path';
import { blockDeviceBytes } from '../lib/block-device.js';
import { AppError, errnoOf } from '../lib/errors.js';
import { runTool } from '../lib/process.js';
import type { Target, TargetOpenOptions, TargetSpec } from './target.js';

type DeviceSpec = Extract<TargetSpec, { kind: 'device' }>;

const PROBE_TIMEOUT_MS = 30_000;
/** blkid(8): nothing found. */
const BLKID_NOTHING = 2;

/**
 * A block device of this host. Never written while it or a part of it is mounted, used as swap or held
 * (by LVM, md, a loop …); without `overwrite` also not when anything recognisable is on it.
 * Everything the disk does not hold is zeroed.
 */
export function openDeviceTarget(spec: DeviceSpec): Target {
  const check = async (request: TargetOpenOptions): Promise<void> => {
    const device = await identify(spec.path);
    await requireUnused(spec.path, device);
    const sizeBytes = await blockDeviceBytes(spec.path);
    if (sizeBytes < request.sizeBytes) {
      throw new AppError('TARGET_TOO_SMALL', `${spec.path} has ${sizeBytes} of ${request.sizeBytes} bytes`);
    }
    if (!request.overwrite) await requireBlank(spec.path);
  };
  return {
    identity: async () => `device:${await identify(spec.path)}`,
    check,
    async open(request) {
      await check(request);
      return {
        sink: { kind: 'file', path: spec.path, isZeroed: false },
        isZeroed: false,
        complete: () => Promise.resolve(),
        [Symbol.asyncDispose]: () => Promise.resolve(),
      };
    },
  };
}

/** major:minor of a block device, as in sysfs and mountinfo. */
async function identify(file: string): Promise<string> {
  if (!path.isAbsolute(file) || file.includes('\u0000')) {
    throw new AppError('INVALID_INPUT', 'the path of a device must be absolute', {
      details: { field: 'path' },
    });
  }
  try {
    const facts = await stat(file);
    if (!facts.isBlockDevice()) throw new AppError('INVALID_INPUT', `${file} is not a block device`);
    return formatNumber(facts.rdev);
  } catch (error) {
    const errno = errnoOf(error);
    if (error instanceof AppError || errno === undefined) throw error;
    throw new AppError('TARGET_IO', `${file} cannot be opened: ${errno}`, { cause: error });
  }
}

async function requireUnused(file: string, device: string): Promise<void> {
  const numbers = await withPartitions(device);
  const mounted = mountedDevices(await readFile('/proc/self/mountinfo', 'utf8'));
  for (const number of numbers) {
    if (mounted.has(number)) throw new AppError('TARGET_IN_USE', `${file} or a partition of it is mounted`);
    const holders = await listIfThere(`/sys/dev/block/${number}/holders`);
    if (holders.length > 0) {
      throw new AppError('TARGET_IN_USE', `${file} is held by ${holders.join(', ')}`);
    }
  }
  await requireNoLoop(file, numbers);
  await requireExclusive(file);
  await requireNoGuest(file);
}

/** The device and its partitions, which are folders with a `dev` file below it in sysfs. */
async function withPartitions(device: string): Promise<string[]> {
  const folder = `/sys/dev/block/${device}`;
  const numbers = [device];
  for (const name of await listIfThere(folder)) {
    const partition = await readIfThere(path.join(folder, name, 'partition'));
    if (partition === null) continue;
    const number = await readIfThere(path.join(folder, name, 'dev'));
    if (number !== null) numbers.push(number.trim());
  }
  return numbers;
}

/** Third field of each line of /proc/self/mountinfo, see proc(5). */
function mountedDevices(mountinfo: string): Set<string> {
  return new Set(mountinfo.split('\n').map((line) => line.split(' ')[2] ?? ''));
}

/** A loop device over a device neither claims it nor shows as its holder. */
async function requireNoLoop(file: string, numbers: readonly string[]): Promise<void> {
  for (const name of await listIfThere('/sys/block')) {
    if (!name.startsWith('loop')) continue;
    const backing = (await readIfThere(`/sys/block/${name}/loop/backing_file`))?.trimEnd();
    if (backing === undefined) continue;
    const number = await deviceNumber(backing);
    if (number !== null && numbers.includes(number)) {
      throw new AppError('TARGET_IN_USE', `${file} or a partition of it is held by ${name}`);
    }
  }
}

/** major:minor of a block device, null for anything else and for what is not there (any more). */
async function deviceNumber(file: string): Promise<string | null> {
  try {
    const facts = await stat(file);
    return facts.isBlockDevice() ? formatNumber(facts.rdev) : null;
  } catch (error) {
    if (errnoOf(error) === 'ENOENT' || errnoOf(error) === 'ENOTDIR') return null;
    throw error;
  }
}

/** As the kernel packs it for user space (makedev(3)). */
function formatNumber(rdev: number): string {
  const major = Math.floor(rdev / 256) & 0xfff;
  const minor = (rdev & 0xff) | ((rdev >>> 12) & 0xfff00);
  return `${major}:${minor}`;
}

/** O_EXCL without O_CREAT on a block device fails with EBUSY while the kernel uses it (open(2)): mounts elsewhere, swap, LVM. */
async function requireExclusive(file: string): Promise<void> {
  try {
    const handle = await open(file, constants.O_RDWR | constants.O_EXCL);
    await handle.close();
  } catch (error) {
    const errno = errnoOf(error);
    if (errno === 'EBUSY') {
      throw new AppError('TARGET_IN_USE', `${file} is in use by the system`, { cause: error });
    }
    throw new AppError('TARGET_IO', `${file} cannot be written: ${errno ?? 'unknown error'}`, {
      cause: error,
    });
  }
}

/** A guest's qemu opens its disk without O_EXCL but holds qemu's own lock on it, which any qemu tool meets. */
async function requireNoGuest(file: string): Promise<void> {
  const info = await runTool('qemu-img', ['info', '-f', 'raw', '--output=json', '--', file], {
    timeoutMs: PROBE_TIMEOUT_MS,
    acceptExitCodes: [0, 1],
  });
  if (info.exitCode !== 0) {
    throw new AppError('TARGET_IN_USE', `${file} is open in a qemu process`, {
      details: { said: info.stderr.trim().slice(-500) },
    });
  }
}

async function requireBlank(file: string): Promise<void> {
  const probe = await runTool('blkid', ['-p', '--', file], {
    timeoutMs: PROBE_TIMEOUT_MS,
    acceptExitCodes: [0, BLKID_NOTHING],
  });
  if (probe.exitCode !== BLKID_NOTHING) {
    throw new AppError('TARGET_NOT_EMPTY', `${file} already holds something`, {
      details: { found: probe.stdout.trim().slice(0, 500) },
    });
  }
}

async function listIfThere(folder: string): Promise<string[]> {
  try {
    return await readdir(folder);
  } catch (error) {
    if (errnoOf(error) === 'ENOENT') return [];
    throw error;
  }
}

async function readIfThere(file: string): Promise<string | null> {
  try {
    return await readFile(file, 'utf8');
  } catch (error) {
    if (errnoOf(error) === 'ENOENT' || errnoOf(error) === 'ENOTDIR') return null;
    throw error;
  }
}
