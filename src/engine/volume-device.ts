import type { DeviceMappingRow, VolumeRow } from '../db/database.js';
import { toTimestamp } from '../lib/clock.js';
import { AppError, isErrorCode } from '../lib/errors.js';
import type { VolumeId } from '../lib/id.js';
import { devicesWith, isContentIdentity, type BlockDevice } from '../volume/index.js';
import type { EngineContext } from './context.js';
import { refreshVolumeExports } from './volume-exports-refresh.js';
import { linkVolume, unlinkVolume } from './volume-link.js';

/** What else is known of a volume's device; JSON with its row. */
export interface VolumeFacts {
  type: string;
  model: string | null;
  /** As last seen. */
  identities: string[];
  /** The appearance of the device that is attached: proof as long as it lasts, whatever else looks the same. */
  instance: string | null;
  /** Since when an attached volume's device is known to be away. */
  goneSince: string | null;
}

export type AttachedVolume = VolumeRow & { mapping: DeviceMappingRow };

/** `isLost`: the device that was attached is not there any more, and no other has its identity. */
export type VolumeLook = { device: BlockDevice } | { device: null; error: AppError; isLost: boolean };

const LIST_TIMEOUT_MS = 60_000;

export function listDevices(context: EngineContext, signal?: AbortSignal): Promise<BlockDevice[]> {
  const limit = AbortSignal.timeout(LIST_TIMEOUT_MS);
  return context.volumeProvider.list({
    signal: signal === undefined ? limit : AbortSignal.any([signal, limit]),
  });
}

/** NOT_FOUND unless it is registered. */
export async function requireVolume(context: EngineContext, id: VolumeId): Promise<VolumeRow> {
  const row = await context.db.volumes.get(id);
  if (row === null)
    throw new AppError('NOT_FOUND', `there is no volume ${id}`, { details: { volumeId: id } });
  return row;
}

/** CONFLICT unless it is attached. */
export async function requireAttached(context: EngineContext, id: VolumeId): Promise<AttachedVolume> {
  const { mapping, ...row } = await requireVolume(context, id);
  if (mapping !== null) return { ...row, mapping };
  throw new AppError('CONFLICT', `volume ${row.name} is not attached`, { details: { volumeId: id } });
}

/** The column was written by this engine; its shape is the code's own. */
export function volumeFacts(row: Pick<VolumeRow, 'facts'>): VolumeFacts {
  return row.facts as VolumeFacts;
}

/**
 * Which of the devices is the volume. The very device that was attached and never went away is, if it still has
 * the identity; else the only one with the identity; else none.
 */
export function lookForVolume(volume: VolumeRow, devices: readonly BlockDevice[]): VolumeLook {
  const holders = devicesWith(volume.identity, devices);
  const attached = findAttached(volume, devices);
  const device =
    holders.find((holder) => holder === attached) ?? (holders.length === 1 ? holders[0] : undefined);
  if (device === undefined) return lookElsewhere(volume, { devices, holders, attached });
  if (device.sizeBytes === volume.sizeBytes) return { device };
  return {
    device: null,
    error: new AppError(
      'VOLUME_MISMATCH',
      `${device.devicePath} has ${device.sizeBytes} bytes, and volume ${volume.name} has ${volume.sizeBytes}`,
      { details: { ...about(volume), found: [seen(device)] } },
    ),
    isLost: false,
  };
}

/** The device whose appearance the attaching recorded. */
function findAttached(volume: VolumeRow, devices: readonly BlockDevice[]): BlockDevice | undefined {
  const { instance } = volumeFacts(volume);
  if (volume.mapping === null || instance === null) return undefined;
  return devices.find((device) => device.instance === instance);
}

/** Why no device is the volume. */
function lookElsewhere(
  volume: VolumeRow,
  facts: { devices: readonly BlockDevice[]; holders: BlockDevice[]; attached: BlockDevice | undefined },
): VolumeLook {
  const { devices, holders, attached } = facts;
  const { name, identity, mapping } = volume;
  const answer = (error: AppError, isLost: boolean): VolumeLook => ({ device: null, error, isLost });
  const mismatch = (message: string, found: readonly BlockDevice[]): AppError =>
    new AppError('VOLUME_MISMATCH', message, { details: { ...about(volume), found: found.map(seen) } });
  if (holders.length > 1) {
    const paths = holders.map(({ devicePath }) => devicePath).join(' and ');
    return answer(
      mismatch(`${paths} have the identity ${identity}: nobody can tell which is volume ${name}`, holders),
      false,
    );
  }
  if (attached !== undefined) {
    const message = `${attached.devicePath} is the device of volume ${name}, but its identity ${identity} is gone from it`;
    return answer(mismatch(message, [attached]), false);
  }
  const inPlace = devices.find(({ devicePath }) => devicePath === mapping?.devicePath);
  if (inPlace !== undefined) {
    return answer(
      mismatch(`${inPlace.devicePath} is not volume ${name}, and no other device is`, [inPlace]),
      true,
    );
  }
  const unread = devices.filter(({ problem }) => problem !== null).map(({ devicePath }) => devicePath);
  const rest = unread.length === 0 ? '' : `; ${unread.join(', ')} could not be looked into`;
  const gone = new AppError('VOLUME_GONE', `no device of this host is volume ${name} (${identity})${rest}`, {
    details: { ...about(volume), unread },
  });
  return answer(gone, unread.length === 0 || !isContentIdentity(identity));
}

function about({ id, identity, sizeBytes, mapping }: VolumeRow): Record<string, unknown> {
  return { volumeId: id, identity, sizeBytes, attachedAs: mapping?.devicePath ?? null };
}

function seen({ devicePath, sizeBytes, identities }: BlockDevice): Record<string, unknown> {
  return { devicePath, sizeBytes, identities };
}

/**
 * The device of an attached volume, checked just now; the mapping follows it when it has another path. Rejects with
 * VOLUME_GONE or VOLUME_MISMATCH.
 */
export async function verifyVolume(
  context: EngineContext,
  volume: AttachedVolume,
  devices: readonly BlockDevice[],
): Promise<BlockDevice> {
  const look = lookForVolume(volume, devices);
  if (look.device === null) {
    await unlinkVolume(context, volume.id);
    throw look.error;
  }
  await recordMapping(context, volume, { device: look.device, devices });
  return look.device;
}

/**
 * Records where the volume is, also of one that had no mapping yet. VOLUME_IN_USE when the device is another volume's.
 */
export async function recordMapping(
  context: EngineContext,
  volume: VolumeRow,
  { device, devices }: { device: BlockDevice; devices: readonly BlockDevice[] },
): Promise<void> {
  const { db, logger } = context;
  const { mapping } = volume;
  const { devicePath, deviceNumber } = device;
  const verifiedAt = toTimestamp(context.clock.nowMs());
  const next = { devicePath, deviceNumber, attachedAt: mapping?.attachedAt ?? verifiedAt, verifiedAt };
  const before = volumeFacts(volume).instance;
  const record = (): Promise<void> =>
    mapping === null ? db.volumes.attach(volume.id, next) : db.volumes.updateMapping(volume.id, next);
  await claimPlace(context, { volume, devices, record });
  await rememberDevice(context, volume, device);
  if (mapping !== null && mapping.devicePath !== devicePath) {
    logger.warn(
      { volumeId: volume.id, was: mapping.devicePath, is: devicePath },
      'the device of a volume has another path now',
    );
  }
  const isLinkNew = await linkVolume(context, volume.id, devicePath);
  if (!isLinkNew && before === device.instance) return;
  await refreshVolumeExports(context, volume.id, { isOtherDevice: isSameBoot(before, device.instance) });
}

/** Two appearances since the last start of the host, one after the other. */
function isSameBoot(before: string | null, now: string | null): boolean {
  return before !== now && before?.split('/')[0] === now?.split('/')[0];
}

async function rememberDevice(context: EngineContext, volume: VolumeRow, device: BlockDevice): Promise<void> {
  const { type, model, identities, instance } = device;
  const facts: VolumeFacts = { type, model, identities, instance, goneSince: null };
  if (JSON.stringify(facts) === JSON.stringify(volume.facts)) return;
  await context.db.volumes.update(volume.id, { facts });
}

/** As often as there can be others in the way: one has the path, another the number. */
const MAX_STALE = 2;

/**
 * Path and number are unique. Another volume that is recorded there is either there, then this one cannot have the
 * device, or its record is out of date, then it gives way.
 */
async function claimPlace(
  context: EngineContext,
  claim: { volume: VolumeRow; devices: readonly BlockDevice[]; record: () => Promise<void> },
): Promise<void> {
  for (let round = 0; ; round += 1) {
    try {
      await claim.record();
      return;
    } catch (error) {
      const other = isErrorCode(error, 'CONFLICT') ? (error as AppError).details['volumeId'] : undefined;
      if (typeof other !== 'string' || other === claim.volume.id || round === MAX_STALE) throw error;
      await giveWay(context, { id: other as VolumeId, claim, error: error as AppError });
    }
  }
}

async function giveWay(
  context: EngineContext,
  {
    id,
    claim,
    error,
  }: { id: VolumeId; claim: { volume: VolumeRow; devices: readonly BlockDevice[] }; error: AppError },
): Promise<void> {
  const other = await context.db.volumes.get(id);
  if (other === null || other.mapping === null) return;
  const { device } = lookForVolume(other, claim.devices);
  if (device?.devicePath === other.mapping.devicePath) {
    throw new AppError('VOLUME_IN_USE', `${device.devicePath} is attached as volume ${other.name}`, {
      cause: error,
      details: { volumeId: id, devicePath: device.devicePath },
    });
  }
  const nowhere = `gone:${id}`;
  await context.db.volumes.updateMapping(id, {
    ...other.mapping,
    devicePath: nowhere,
    deviceNumber: nowhere,
  });
  context.logger.warn(
    { volumeId: id, was: other.mapping.devicePath },
    'another device is where a volume was attached',
  );
}
