import { findDeviceNumber } from '../lib/block-device.js';
import type { CleanupStack } from '../lib/cleanup.js';
import { AppError, isErrorCode, toAppError } from '../lib/errors.js';
import type { TargetSpec } from '../target/target.js';
import { devicesWith, identityKind, isContentIdentity, type BlockDevice } from '../volume/index.js';
import type { ActiveRun } from './active-run.js';
import type { EngineContext } from './context.js';
import type { RestoreTargetSpec } from './types.js';
import { listDevices, requireAttached, volumeFacts, type AttachedVolume } from './volume-device.js';
import { holdVolume } from './volume-use.js';

/**
 * Where the disk is written: a volume is its device, held until the cleanup runs. The device of a volume is written
 * as that volume only: TARGET_IN_USE for its bare path.
 */
export async function resolveTarget(
  { context, run, cleanup }: { context: EngineContext; run: ActiveRun; cleanup: CleanupStack },
  target: RestoreTargetSpec,
): Promise<TargetSpec> {
  if (target.kind === 'device') await requireNoVolume(context, target.path);
  if (target.kind !== 'volume') return target;
  const held = await holdVolume(context, target.volumeId, { use: 'write', self: run.id, signal: run.signal });
  const { device } = cleanup.use(held);
  return { kind: 'device', path: device.devicePath };
}

async function requireNoVolume(context: EngineContext, file: string): Promise<void> {
  const number = await findDeviceNumber(file);
  const attached = number === null ? [] : await context.db.volumes.listAttached();
  const volume = attached.find(({ mapping }) => mapping?.deviceNumber === number);
  if (volume === undefined) return;
  throw new AppError('TARGET_IN_USE', `${file} is attached as volume ${volume.name}`, {
    details: { volumeId: volume.id },
  });
}

/**
 * What a volume is known by may have stood in what the restore wrote over. The device is still held, so it is the
 * same; when it now has another identity of the same kind, which is nobody else's, that is the volume's from now on.
 * Else the run's log says what is to be done.
 */
export async function followRestored(
  parts: { context: EngineContext; run: ActiveRun },
  target: RestoreTargetSpec,
): Promise<void> {
  if (target.kind !== 'volume') return;
  const { context, run } = parts;
  try {
    const volume = await requireAttached(context, target.volumeId);
    if (isContentIdentity(volume.identity)) await followContent(parts, volume);
  } catch (error) {
    run.signal.throwIfAborted();
    const { code, message } = toAppError(error);
    run.log('warning', {
      code,
      message: `by what the volume is known now could not be found out: ${message}`,
      details: { volumeId: target.volumeId },
    });
  }
}

async function followContent(
  parts: { context: EngineContext; run: ActiveRun },
  volume: AttachedVolume,
): Promise<void> {
  const { context, run } = parts;
  const { name, identity: was, mapping } = volume;
  const devices = await listDevices(context, run.signal);
  const device = devices.find(({ deviceNumber }) => deviceNumber === mapping.deviceNumber);
  if (device === undefined || device.identities.includes(was)) return;
  const is = await adoptIdentity(parts, volume, { device, devices });
  const rest =
    is === null
      ? 'it cannot be used until it is registered anew, by an identity that no other device has'
      : `it is known by ${is} now`;
  run.log('warning', {
    code: 'VOLUME_IDENTITY_CHANGED',
    message: `the restore wrote over ${was}, by which volume ${name} was known; ${rest}`,
    details: { volumeId: volume.id, was, is, devicePath: device.devicePath },
  });
}

/** Null when the device has none that is its own. */
async function adoptIdentity(
  { context, run }: { context: EngineContext; run: ActiveRun },
  volume: AttachedVolume,
  { device, devices }: { device: BlockDevice; devices: readonly BlockDevice[] },
): Promise<string | null> {
  const kind = identityKind(volume.identity);
  const identity = device.identities.find((each) => identityKind(each) === kind);
  if (identity === undefined || devicesWith(identity, devices).length > 1) return null;
  const facts = { ...volumeFacts(volume), identities: device.identities };
  try {
    await run.insist(() => context.db.volumes.update(volume.id, { identity, facts }));
    return identity;
  } catch (error) {
    // Another volume is known by it, whose device is away.
    if (isErrorCode(error, 'CONFLICT')) return null;
    throw error;
  }
}
