import { stat } from 'node:fs/promises';
import path from 'node:path';
import {
  blockDeviceBytes,
  findQemuLock,
  formatDeviceNumber,
  isHeldExclusively,
  readDeviceUsage,
} from '../lib/block-device.js';
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
    return formatDeviceNumber(facts.rdev);
  } catch (error) {
    const errno = errnoOf(error);
    if (error instanceof AppError || errno === undefined) throw error;
    throw new AppError('TARGET_IO', `${file} cannot be opened: ${errno}`, { cause: error });
  }
}

async function requireUnused(file: string, device: string): Promise<void> {
  const users = await (await readDeviceUsage()).usersOf(device);
  if (users.length > 0) {
    throw new AppError('TARGET_IN_USE', `${file} or a partition of it is ${users.join(', ')}`);
  }
  await requireExclusive(file);
  const lock = await findQemuLock(file);
  if (lock !== null) {
    throw new AppError('TARGET_IN_USE', `${file} is open in a qemu process`, { details: { said: lock } });
  }
}

async function requireExclusive(file: string): Promise<void> {
  let isHeld: boolean;
  try {
    isHeld = await isHeldExclusively(file, 'write');
  } catch (error) {
    throw new AppError('TARGET_IO', `${file} cannot be written: ${errnoOf(error) ?? 'unknown error'}`, {
      cause: error,
    });
  }
  if (isHeld) throw new AppError('TARGET_IN_USE', `${file} is in use by the system`);
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
