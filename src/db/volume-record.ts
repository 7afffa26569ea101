import type { VolumeId } from '../lib/id.js';
import {
  checkLength,
  fromJson,
  MAX_DEVICE_PATH_LENGTH,
  MAX_IDENTITY_LENGTH,
  MAX_NAME_LENGTH,
  toJson,
  uniqueKey,
} from './columns.js';
import type { DeviceMappingRow, VolumeRow } from './database.js';

export interface VolumeRecord {
  id: VolumeId;
  name: string;
  name_key: string;
  provider: string;
  identity: string;
  identity_key: string;
  size_bytes: number;
  created_at: string;
  facts: string;
}

export interface MappingRecord {
  volume_id: VolumeId;
  device_path: string;
  path_key: string;
  device_number: string;
  attached_at: string;
  verified_at: string;
}

/** A volume with its mapping joined to it: all null where it has none. */
export type JoinedRecord = VolumeRecord & (MappingRecord | Record<keyof MappingRecord, null>);

export function toVolumeRecord(row: Omit<VolumeRow, 'mapping'>): VolumeRecord {
  return {
    id: row.id,
    ...toNameColumns(row.name),
    provider: row.provider,
    ...toIdentityColumns(row.identity),
    size_bytes: row.sizeBytes,
    created_at: row.createdAt,
    facts: toJson(row.facts),
  };
}

export function toNameColumns(name: string): Pick<VolumeRecord, 'name' | 'name_key'> {
  checkLength(name, MAX_NAME_LENGTH, 'name');
  return { name, name_key: uniqueKey(name) };
}

export function toIdentityColumns(identity: string): Pick<VolumeRecord, 'identity' | 'identity_key'> {
  checkLength(identity, MAX_IDENTITY_LENGTH, 'identity');
  return { identity, identity_key: uniqueKey(identity) };
}

export function toMappingRecord(volumeId: VolumeId, mapping: DeviceMappingRow): MappingRecord {
  checkLength(mapping.devicePath, MAX_DEVICE_PATH_LENGTH, 'devicePath');
  return {
    volume_id: volumeId,
    device_path: mapping.devicePath,
    path_key: uniqueKey(mapping.devicePath),
    device_number: mapping.deviceNumber,
    attached_at: mapping.attachedAt,
    verified_at: mapping.verifiedAt,
  };
}

export function toVolumeRow(record: JoinedRecord): VolumeRow {
  return {
    id: record.id,
    name: record.name,
    provider: record.provider,
    identity: record.identity,
    sizeBytes: record.size_bytes,
    createdAt: record.created_at,
    facts: fromJson(record.facts),
    mapping: record.volume_id === null ? null : toMappingRow(record),
  };
}

function toMappingRow(record: MappingRecord): DeviceMappingRow {
  return {
    devicePath: record.device_path,
    deviceNumber: record.device_number,
    attachedAt: record.attached_at,
    verifiedAt: record.verified_at,
  };
}
