import type { DiskId, VmId } from '../lib/id.js';
import { checkLength, fromJson, MAX_NAME_LENGTH, toJson, uniqueKey } from './columns.js';
import type { DiskRow, VmRow } from './database.js';

export interface VmRecord {
  id: VmId;
  name: string;
  name_key: string;
  created_at: string;
  source_key: string | null;
  source: string | null;
  facts: string | null;
}

export interface DiskRecord {
  id: DiskId;
  vm_id: VmId;
  disk_number: number;
  name: string;
  name_key: string;
  size_bytes: number;
  lineage: string;
  source: string;
  facts: string | null;
}

export function toVmRecord(vm: VmRow): VmRecord {
  checkLength(vm.name, MAX_NAME_LENGTH, 'name');
  return {
    id: vm.id,
    name: vm.name,
    name_key: uniqueKey(vm.name),
    created_at: vm.createdAt,
    source_key: vm.sourceKey,
    source: toJson(vm.source),
    facts: toJson(vm.facts),
  };
}

export function toDiskRecord(disk: DiskRow): DiskRecord {
  checkLength(disk.name, MAX_NAME_LENGTH, 'disk name');
  return {
    id: disk.id,
    vm_id: disk.vmId,
    disk_number: disk.number,
    name: disk.name,
    name_key: uniqueKey(disk.name),
    size_bytes: disk.sizeBytes,
    lineage: disk.lineage,
    source: toJson(disk.source),
    facts: toJson(disk.facts),
  };
}

export function toVmRow(vm: VmRecord, disks: DiskRecord[]): VmRow {
  return {
    id: vm.id,
    name: vm.name,
    createdAt: vm.created_at,
    sourceKey: vm.source_key,
    source: fromJson(vm.source ?? 'null'),
    facts: fromJson(vm.facts ?? 'null'),
    disks: disks.filter((disk) => disk.vm_id === vm.id).map(toDiskRow),
  };
}

function toDiskRow(disk: DiskRecord): DiskRow {
  return {
    id: disk.id,
    vmId: disk.vm_id,
    number: disk.disk_number,
    name: disk.name,
    sizeBytes: disk.size_bytes,
    lineage: disk.lineage,
    source: fromJson(disk.source),
    facts: fromJson(disk.facts ?? 'null'),
  };
}
