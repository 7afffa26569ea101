import { toTimestamp } from '../lib/clock.js';
import { isErrorCode, type AppError } from '../lib/errors.js';
import type { VolumeId } from '../lib/id.js';
import type { BlockDevice } from '../volume/index.js';
import { audit } from './audit.js';
import type { EngineContext } from './context.js';
import {
  listDevices,
  lookForVolume,
  recordMapping,
  volumeFacts,
  type AttachedVolume,
} from './volume-device.js';
import { unlinkVolume } from './volume-link.js';
import { requireVolumeFree } from './volume-users.js';

const CHECK_INTERVAL_MS = 60_000;
/** Disks behind a network come late after a start, and paths fail over. */
export const RELEASE_AFTER_MS = 30_000;

/** Looks after attached volumes. Calls must not overlap. */
export interface VolumeWatch {
  /**
   * Finds the device of each attached volume. Where it has another path the mapping follows; that it is gone is noted,
   * and at a later look the volume is released, unless something uses it.
   */
  check(): Promise<void>;
}

export function createVolumeWatch(context: EngineContext): VolumeWatch {
  const said = new Map<VolumeId, string>();
  return {
    async check() {
      const attached = await context.db.volumes.listAttached();
      if (attached.length === 0) return;
      const devices = await listDevices(context);
      for (const { mapping, ...row } of attached) {
        if (mapping === null) continue;
        const volume = { ...row, mapping };
        try {
          await checkVolume(context, volume, devices);
          said.delete(row.id);
        } catch (error) {
          if (isErrorCode(error, 'DATABASE_UNAVAILABLE')) throw error;
          const text = String(error);
          if (said.get(row.id) === text) continue;
          said.set(row.id, text);
          context.logger.warn({ err: error, volumeId: row.id }, 'an attached volume cannot be used');
        }
      }
    },
  };
}

/** Rejects with what is wrong with the volume, when it stays attached. */
async function checkVolume(
  context: EngineContext,
  volume: AttachedVolume,
  devices: readonly BlockDevice[],
): Promise<void> {
  const look = lookForVolume(volume, devices);
  if (look.device !== null) {
    await recordMapping(context, volume, { device: look.device, devices });
    return;
  }
  await unlinkVolume(context, volume.id);
  if (look.isLost && (await hasBeenGone(context, volume))) await release(context, volume, look.error);
  else throw look.error;
}

async function hasBeenGone(context: EngineContext, volume: AttachedVolume): Promise<boolean> {
  const facts = volumeFacts(volume);
  const nowMs = context.clock.nowMs();
  if (facts.goneSince !== null) return nowMs - Date.parse(facts.goneSince) >= RELEASE_AFTER_MS;
  await context.db.volumes.update(volume.id, { facts: { ...facts, goneSince: toTimestamp(nowMs) } });
  return false;
}

async function release(context: EngineContext, volume: AttachedVolume, why: AppError): Promise<void> {
  const { id, name, mapping } = volume;
  await requireVolumeFree(context, id, { use: 'detach', self: null });
  await context.db.volumes.detach(id);
  const details = { name, devicePath: mapping.devicePath, reason: why.message };
  await audit(context, null, { action: 'volume.release', subject: id, details });
  context.logger.warn({ volumeId: id, ...details }, 'a volume whose device is gone was released');
}

/** Checks now and every minute. One look at a time; one that fails is logged and tried again at the next. */
export function startVolumeWatch(context: EngineContext): AsyncDisposable {
  const watch = createVolumeWatch(context);
  let looking: Promise<void> | undefined;
  const look = async (): Promise<void> => {
    try {
      await watch.check();
    } catch (error) {
      context.logger.warn({ err: error }, 'looking after attached volumes failed');
    }
  };
  const start = (): void => {
    looking ??= look().finally(() => (looking = undefined));
  };
  const timer = setInterval(start, CHECK_INTERVAL_MS);
  start();
  return {
    async [Symbol.asyncDispose]() {
      clearInterval(timer);
      await looking;
    },
  };
}
