import path from 'node:path';
import type { VolumeRow } from '../db/database.js';
import { findDeviceNumber, readDeviceUsage, type DeviceUsage } from '../lib/block-device.js';
import { toTimestamp } from '../lib/clock.js';
import { AppError, isErrorCode, toAppError } from '../lib/errors.js';
import { newId, type VolumeId } from '../lib/id.js';
import { devicesWith, identityKind, MAX_IDENTITY_LENGTH, type BlockDevice } from '../volume/index.js';
import { audit } from './audit.js';
import type { EngineContext } from './context.js';
import type { Actor, Engine, NewVolume } from './engine.js';
import { toOperationView } from './operation-use-cases.js';
import { startRun } from './run-use-cases.js';
import type { FoundDeviceView, OperationView, VolumeView } from './types.js';
import { toRunError } from './views.js';
import {
  listDevices,
  lookForVolume,
  requireAttached,
  requireVolume,
  verifyVolume,
  type VolumeFacts,
} from './volume-device.js';
import { requireNoDisk, requireVolumeFree } from './volume-users.js';

type VolumeUseCases = Pick<
  Engine,
  | 'discoverVolumes'
  | 'createVolume'
  | 'listVolumes'
  | 'getVolume'
  | 'getVolumeDevice'
  | 'attachVolume'
  | 'detachVolume'
  | 'removeVolume'
>;

export function createVolumeUseCases(context: EngineContext): VolumeUseCases {
  const { db } = context;
  return {
    discoverVolumes: () => discover(context),
    createVolume: (input, actor) => createVolume(context, input, actor),
    async listVolumes(page) {
      const { rows, nextCursor } = await db.volumes.list(page);
      const devices = rows.length === 0 ? [] : await lookAround(context);
      return { items: rows.map((row) => toVolumeView(row, devices)), nextCursor };
    },
    getVolume: (id) => showVolume(context, id),
    async getVolumeDevice(id) {
      const volume = await requireAttached(context, id);
      const { devicePath, deviceNumber, sizeBytes } = await verifyVolume(
        context,
        volume,
        await listDevices(context),
      );
      return { devicePath, deviceNumber, sizeBytes };
    },
    async attachVolume(id, actor) {
      const { name, mapping } = await requireVolume(context, id);
      if (mapping !== null) {
        throw new AppError('CONFLICT', `volume ${name} is attached already`, {
          details: { volumeId: id, devicePath: mapping.devicePath },
        });
      }
      return operate(context, { kind: 'attach-volume', volumeId: id }, actor);
    },
    async detachVolume(id, actor) {
      await requireAttached(context, id);
      await requireVolumeFree(context, id, { use: 'detach', self: null });
      return operate(context, { kind: 'detach-volume', volumeId: id }, actor);
    },
    async removeVolume(id, actor) {
      const { name } = await requireVolume(context, id);
      await requireNoDisk(context, id);
      await db.volumes.remove(id);
      await audit(context, actor, { action: 'volume.remove', subject: id, details: { name } });
    },
  };
}

async function operate(
  context: EngineContext,
  request: { kind: 'attach-volume' | 'detach-volume'; volumeId: VolumeId },
  actor: Actor,
): Promise<OperationView> {
  const nothing = { repositoryId: null, vmId: null, pointId: null };
  return toOperationView(
    await startRun(context, { kind: request.kind, ...nothing, request, turn: 'none' }, actor),
  );
}

async function allVolumes(context: EngineContext): Promise<VolumeRow[]> {
  const rows: VolumeRow[] = [];
  let cursor: string | null = null;
  do {
    const page = await context.db.volumes.list({ limit: 200, cursor });
    rows.push(...page.rows);
    cursor = page.nextCursor;
  } while (cursor !== null);
  return rows;
}

async function discover(context: EngineContext): Promise<FoundDeviceView[]> {
  const devices = await listDevices(context);
  const usage = await readDeviceUsage();
  const volumes = await allVolumes(context);
  const places = new Map(volumes.map((row) => [lookForVolume(row, devices).device, row]));
  const views: FoundDeviceView[] = [];
  for (const device of devices) {
    const identities = ownIdentities(device, devices);
    const volume =
      places.get(device) ?? volumes.find(({ identity }) => identities.includes(identity)) ?? null;
    views.push(await toFoundDevice(device, { identities, usage, volume }));
  }
  return views;
}

async function toFoundDevice(
  device: BlockDevice,
  facts: { identities: string[]; usage: DeviceUsage; volume: VolumeRow | null },
): Promise<FoundDeviceView> {
  const { devicePath, deviceNumber, type, sizeBytes, model, pathOf, problem } = device;
  const { identities, usage, volume } = facts;
  const inUseBy = await usage.usersOf(deviceNumber);
  if (pathOf !== null) inUseBy.push(`a path of ${pathOf}`);
  if (problem !== null) inUseBy.push(`cannot be read: ${problem}`);
  if (volume?.mapping?.deviceNumber === deviceNumber) inUseBy.push(`attached as volume ${volume.name}`);
  return {
    devicePath,
    deviceNumber,
    type,
    sizeBytes,
    model,
    identities,
    inUseBy,
    volumeId: volume?.id ?? null,
  };
}

/** Those that no other device has. */
function ownIdentities({ identities }: BlockDevice, devices: readonly BlockDevice[]): string[] {
  return identities.filter((identity) => devicesWith(identity, devices).length === 1);
}

async function createVolume(
  context: EngineContext,
  { name, identity, devicePath }: NewVolume,
  actor: Actor,
): Promise<VolumeView> {
  const devices = await listDevices(context);
  const found =
    devicePath === null
      ? findByIdentity(identity ?? '', devices)
      : await findByPath(devicePath, identity, devices);
  await requireUnknown(context, found.device);
  const { device } = found;
  const { type, model, identities, sizeBytes } = device;
  const nowMs = context.clock.nowMs();
  const facts: VolumeFacts = { type, model, identities, instance: null, goneSince: null };
  const row = {
    id: newId<VolumeId>(nowMs),
    name: name ?? path.basename(device.devicePath),
    provider: context.volumeProvider.name,
    identity: found.identity,
    sizeBytes,
    createdAt: toTimestamp(nowMs),
    facts,
  };
  await context.db.volumes.insert(row);
  await audit(context, actor, {
    action: 'volume.create',
    subject: row.id,
    details: { name: row.name, identity: row.identity },
  });
  return toVolumeView({ ...row, mapping: null }, devices);
}

interface Found {
  device: BlockDevice;
  identity: string;
}

function findByIdentity(identity: string, devices: readonly BlockDevice[]): Found {
  if (identityKind(identity) === null || identity.length > MAX_IDENTITY_LENGTH) {
    throw new AppError('INVALID_INPUT', 'an identity is one of those that `holdfast volume discover` shows', {
      details: { field: 'identity' },
    });
  }
  const holders = devicesWith(identity, devices);
  const [device] = holders;
  if (device === undefined) {
    throw new AppError('VOLUME_GONE', `no device of this host has the identity ${identity}`, {
      details: { identity },
    });
  }
  if (holders.length > 1) throw ambiguous(identity, holders);
  return { device, identity };
}

async function findByPath(
  devicePath: string,
  wanted: string | null,
  devices: readonly BlockDevice[],
): Promise<Found> {
  const refuse = (message: string): AppError =>
    new AppError('INVALID_INPUT', message, { details: { field: 'devicePath', devicePath } });
  if (wanted !== null) throw refuse('give either an identity or a path');
  const number = await findDeviceNumber(devicePath);
  if (number === null) throw refuse('there is no block device at this path');
  const device = devices.find(({ deviceNumber }) => deviceNumber === number);
  if (device === undefined) throw refuse('the device is empty, or not one that can be a volume');
  if (device.pathOf !== null) throw refuse(`the device is a path of ${device.pathOf}: register that`);
  const [identity] = ownIdentities(device, devices);
  if (identity !== undefined) return { device, identity };
  const [shared] = device.identities;
  if (shared !== undefined) throw ambiguous(shared, devicesWith(shared, devices));
  throw refuse(
    'nothing tells this device from another: it has no serial number and nothing on it that names it',
  );
}

function ambiguous(identity: string, holders: readonly BlockDevice[]): AppError {
  const devicePaths = holders.map(({ devicePath }) => devicePath);
  return new AppError('CONFLICT', `${devicePaths.join(' and ')} have the same identity ${identity}`, {
    details: { field: 'identity', devicePaths },
  });
}

/** A device has several identities, and is one volume. */
async function requireUnknown(context: EngineContext, device: BlockDevice): Promise<void> {
  const other = (await allVolumes(context)).find(({ identity }) => device.identities.includes(identity));
  if (other === undefined) return;
  throw new AppError('CONFLICT', `${device.devicePath} is volume ${other.name} already`, {
    details: { field: 'identity', volumeId: other.id },
  });
}

/** The devices, or why they cannot be listed. */
async function lookAround(context: EngineContext): Promise<BlockDevice[] | AppError> {
  try {
    return await listDevices(context);
  } catch (error) {
    return toAppError(error);
  }
}

/** The mapping follows the device when that has another path. */
async function showVolume(context: EngineContext, id: VolumeId): Promise<VolumeView> {
  const { mapping, ...row } = await requireVolume(context, id);
  const devices = await lookAround(context);
  if (mapping !== null && !(devices instanceof AppError)) {
    try {
      await verifyVolume(context, { ...row, mapping }, devices);
    } catch (error) {
      // The view says it. NOT_FOUND: it was detached meanwhile.
      if (!isErrorCode(error, 'VOLUME_GONE', 'VOLUME_MISMATCH', 'NOT_FOUND')) throw error;
    }
  }
  return toVolumeView(await requireVolume(context, id), devices);
}

function toVolumeView(volume: VolumeRow, devices: BlockDevice[] | AppError): VolumeView {
  const { id, name, identity, sizeBytes, createdAt, mapping } = volume;
  const look =
    devices instanceof AppError ? { device: null, error: devices } : lookForVolume(volume, devices);
  return {
    id,
    name,
    provider: 'host',
    identity,
    sizeBytes,
    createdAt,
    mapping,
    devicePath: look.device?.devicePath ?? null,
    problem: look.device === null ? toRunError(look.error) : null,
  };
}
