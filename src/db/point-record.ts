import type { Knex } from 'knex';
import type { PointManifest } from '../../repository/index.js';
import type { DiskId, LayerId, PointId, RepositoryId, RunId, VmId } from '../lib/id.js';
import { chunks, CHUNK_ROWS, fromJson, toJson } from './columns.js';
import type { LayerRow, PointRow } from './database.js';

export interface PointRecord {
  id: PointId;
  vm_id: VmId;
  repository_id: RepositoryId;
  run_id: RunId;
  sequence_number: number;
  point_type: 'full' | 'incremental';
  captured_at: string;
  committed_at: string;
  file_bytes: number;
}

export interface ManifestRecord {
  point_id: PointId;
  manifest: string;
}

export interface LayerRecord {
  id: LayerId;
  point_id: PointId;
  repository_id: RepositoryId;
  disk_id: DiskId;
  parent_layer_id: LayerId | null;
}

/** Inserts points with manifests and layers, parents first, in statements of bounded size. */
export async function insertPoints(
  trx: Knex,
  content: readonly { point: PointRow; layers: LayerRow[] }[],
): Promise<void> {
  for (const some of chunks(content, CHUNK_ROWS)) {
    await trx<PointRecord>('recovery_points').insert(some.map(({ point }) => toPointRecord(point)));
    await trx<ManifestRecord>('point_manifests').insert(
      some.map(({ point }) => ({ point_id: point.id, manifest: toJson(point.manifest) })),
    );
  }
  const layers = content.flatMap((entry) => entry.layers.map(toLayerRecord));
  for (const some of chunks(layers, CHUNK_ROWS)) await trx<LayerRecord>('layers').insert(some);
}

function toPointRecord(point: PointRow): PointRecord {
  return {
    id: point.id,
    vm_id: point.vmId,
    repository_id: point.repositoryId,
    run_id: point.runId,
    sequence_number: point.sequence,
    point_type: point.type,
    captured_at: point.capturedAt,
    committed_at: point.committedAt,
    file_bytes: point.fileBytes,
  };
}

function toLayerRecord(layer: LayerRow): LayerRecord {
  return {
    id: layer.id,
    point_id: layer.pointId,
    repository_id: layer.repositoryId,
    disk_id: layer.diskId,
    parent_layer_id: layer.parentLayerId,
  };
}

export function toPointRow(record: PointRecord & ManifestRecord): PointRow {
  return {
    id: record.id,
    vmId: record.vm_id,
    repositoryId: record.repository_id,
    runId: record.run_id,
    sequence: record.sequence_number,
    type: record.point_type,
    capturedAt: record.captured_at,
    committedAt: record.committed_at,
    fileBytes: record.file_bytes,
    manifest: fromJson(record.manifest) as PointManifest,
  };
}
