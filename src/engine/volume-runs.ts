import type { RunRow, VolumeRow } from '../db/database.js';
import { CleanupStack } from '../lib/cleanup.js';
import { AppError } from '../lib/errors.js';
import { formatBytes } from '../lib/units.js';
import { devicesWith, isContentIdentity, type BlockDevice } from '../volume/index.js';
import type { ActiveRun } from './active-run.js';
import type { EngineContext } from './context.js';
import type { RunRequest, RunResult } from './types.js';
import { listDevices, lookForVolume, recordMapping, requireVolume } from './volume-device.js';
import { unlinkVolume } from './volume-link.js';
import { holdDevice, requireNoQemu, requireUnusedByKernel } from './volume-use.js';
import { requireVolumeFree } from './volume-users.js';

type VolumeRunRequest = Extract<RunRequest, { kind: 'attach-volume' | 'detach-volume' }>;

const volumeIdOf = (row: RunRow): VolumeRunRequest['volumeId'] => (row.request as VolumeRunRequest).volumeId;

/**
 * Gives a volume its device, which is its alone from then on. Refused unless exactly one device has the identity, the
 * size is right, and nobody uses the device.
 */
export async function executeAttachVolume(context: EngineContext, run: ActiveRun): Promise<RunResult> {
  await run.enter('discover');
  const volume = await requireVolume(context, volumeIdOf(run.row));
  if (volume.mapping !== null) {
    throw new AppError('CONFLICT', `volume ${volume.name} is attached already`, {
      details: { volumeId: volume.id, devicePath: volume.mapping.devicePath },
    });
  }
  const devices = await listDevices(context, run.signal);
  const sized = await followSize({ context, run }, volume, devices);
  const look = lookForVolume(sized, devices);
  if (look.device === null) throw look.error;
  const { device } = look;
  await using cleanup = new CleanupStack();
  cleanup.use(await holdDevice(device));
  await requireUnusedByKernel(device);
  await requireNoQemu(device);
  await run.enter('finalize');
  await run.insist(() => recordMapping(context, sized, { device, devices }));
  const { devicePath } = device;
  run.log('info', {
    code: 'VOLUME_ATTACHED',
    message: `volume ${volume.name} is ${devicePath}`,
    details: { volumeId: volume.id, devicePath, deviceNumber: device.deviceNumber },
  });
  return { kind: 'attach-volume', volumeId: volume.id, devicePath };
}

/**
 * What belongs to the device itself stays its identity when the device grows, e.g. a logical volume: the size is recorded
 * anew. What stands in the content may have been copied to another, larger device: then the size is proof.
 */
async function followSize(
  { context, run }: { context: EngineContext; run: ActiveRun },
  volume: VolumeRow,
  devices: readonly BlockDevice[],
): Promise<VolumeRow> {
  const [device, ...others] = devicesWith(volume.identity, devices);
  if (device === undefined || others.length > 0 || isContentIdentity(volume.identity)) return volume;
  const { sizeBytes } = device;
  if (sizeBytes === volume.sizeBytes) return volume;
  await run.insist(() => context.db.volumes.update(volume.id, { sizeBytes }));
  run.log('warning', {
    code: 'VOLUME_RESIZED',
    message: `${device.devicePath} has ${formatBytes(sizeBytes)} now and had ${formatBytes(volume.sizeBytes)}`,
    details: { volumeId: volume.id, sizeBytes, sizeBytesBefore: volume.sizeBytes },
  });
  return { ...volume, sizeBytes };
}

/** Takes the device from a volume that nothing uses. */
export async function executeDetachVolume(context: EngineContext, run: ActiveRun): Promise<RunResult> {
  await run.enter('discover');
  const volume = await requireVolume(context, volumeIdOf(run.row));
  await requireVolumeFree(context, volume.id, { use: 'detach', self: run.id });
  await run.enter('finalize');
  await unlinkVolume(context, volume.id);
  await run.insist(() => context.db.volumes.detach(volume.id));
  run.log('info', {
    code: 'VOLUME_DETACHED',
    message: `volume ${volume.name} is detached`,
    details: { volumeId: volume.id, devicePath: volume.mapping?.devicePath ?? null },
  });
  return { kind: 'detach-volume', volumeId: volume.id };
}

/** Of a run that died: its result when what it was for had happened, else null. The mapping is one row: there is no half of it. */
export async function recoverVolumeRun(context: EngineContext, row: RunRow): Promise<RunResult | null> {
  const volume = await context.db.volumes.get(volumeIdOf(row));
  if (volume === null) return null;
  const { id: volumeId, mapping } = volume;
  if (row.kind === 'attach-volume') {
    return mapping === null ? null : { kind: row.kind, volumeId, devicePath: mapping.devicePath };
  }
  return mapping === null ? { kind: 'detach-volume', volumeId } : null;
}
