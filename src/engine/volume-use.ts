import { open } from 'node:fs/promises';
import { findQemuLock, formatDeviceNumber, isHeldExclusively, readDeviceUsage } from '../lib/block-device.js';
import { CleanupStack } from '../lib/cleanup.js';
import { AppError, errnoOf } from '../lib/errors.js';
import type { VolumeId } from '../lib/id.js';
import { readInstance, type BlockDevice } from '../volume/index.js';
import type { EngineContext } from './context.js';
import { listDevices, requireAttached, verifyVolume, type AttachedVolume } from './volume-device.js';
import { requireVolumeFree, type VolumeUse } from './volume-users.js';

/** A volume's device, which cannot become another one until disposal. */
export interface HeldVolume extends AsyncDisposable {
  readonly volume: AttachedVolume;
  readonly device: BlockDevice;
}

export interface VolumeUseOptions {
  use: Extract<VolumeUse, 'read' | 'write'>;
  /** The run that uses it, or whoever else does. */
  self: string;
  signal: AbortSignal;
}

/**
 * Takes an attached volume into use: its device is looked for anew, nobody else may use it in a way that this use
 * must not be beside, and the kernel must not. Rejects with CONFLICT (not attached), VOLUME_GONE, VOLUME_MISMATCH,
 * VOLUME_IN_USE.
 */
export async function holdVolume(
  context: EngineContext,
  id: VolumeId,
  { use, self, signal }: VolumeUseOptions,
): Promise<HeldVolume> {
  const volume = await requireAttached(context, id);
  await requireVolumeFree(context, id, { use, self });
  const device = await verifyVolume(context, volume, await listDevices(context, signal));
  await using undo = new CleanupStack();
  undo.use(await holdDevice(device));
  await requireUnusedByKernel(device);
  const steps = undo.move();
  return { volume, device, [Symbol.asyncDispose]: () => steps.run() };
}

/**
 * Keeps the device's path and number its own: while it is open, the kernel gives them to no other device. VOLUME_MISMATCH
 * when it went before.
 */
export async function holdDevice(device: BlockDevice): Promise<AsyncDisposable> {
  const { devicePath, deviceNumber, instance } = device;
  const changed = (cause?: unknown): AppError =>
    new AppError('VOLUME_MISMATCH', `${devicePath} changed while it was looked at`, {
      cause,
      details: { devicePath },
    });
  await using undo = new CleanupStack();
  try {
    const handle = await open(devicePath, 'r');
    undo.defer(() => handle.close());
    const facts = await handle.stat();
    const isSame = facts.isBlockDevice() && formatDeviceNumber(facts.rdev) === deviceNumber;
    if (!isSame || (await readInstance(deviceNumber)) !== instance) throw changed();
  } catch (error) {
    if (errnoOf(error) === undefined || error instanceof AppError) throw error;
    throw changed(error);
  }
  const steps = undo.move();
  return { [Symbol.asyncDispose]: () => steps.run() };
}

/** VOLUME_IN_USE while it is mounted, swap space, held by LVM, md or a loop device, or in use by the kernel otherwise. */
export async function requireUnusedByKernel({ devicePath, deviceNumber }: BlockDevice): Promise<void> {
  const users = await (await readDeviceUsage()).usersOf(deviceNumber);
  if (users.length === 0 && (await isHeldExclusively(devicePath, 'read'))) users.push('in use by the system');
  if (users.length === 0) return;
  throw new AppError('VOLUME_IN_USE', `${devicePath} or a partition of it is ${users.join(', ')}`, {
    details: { devicePath, users },
  });
}

/** VOLUME_IN_USE while a qemu, of a guest or another server, has it open for writing. */
export async function requireNoQemu({ devicePath }: BlockDevice): Promise<void> {
  const said = await findQemuLock(devicePath);
  if (said === null) return;
  throw new AppError('VOLUME_IN_USE', `${devicePath} is open in a qemu process`, {
    details: { devicePath, said },
  });
}
