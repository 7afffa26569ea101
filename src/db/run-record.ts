import type { PointId, RepositoryId, RunId, VmId } from '../lib/id.js';
import { fromJson, toJson } from './columns.js';
import type { RunRow } from './database.js';

export interface RunRecord {
  id: RunId;
  kind: string;
  state: string;
  stage: string | null;
  vm_id: VmId | null;
  repository_id: RepositoryId | null;
  point_id: PointId | null;
  /** VM and repository together; null unless the run has both and takes turns with others of that pair. */
  pair_key: string | null;
  /** Equal to pair_key while running, else null; unique. */
  running_key: string | null;
  attempt: number;
  created_at: string;
  started_at: string | null;
  ended_at: string | null;
  progress_at: string | null;
  is_cancel_requested: number;
  worker_id: string | null;
  heartbeat_at: string | null;
  /** Sequence number of the newest run event. */
  last_event: number;
  request: string;
  progress: string;
  error: string;
  result: string;
}

export function toRunRecord(row: RunRow, { takesTurns }: { takesTurns: boolean }): RunRecord {
  const hasPair = takesTurns && row.vmId !== null && row.repositoryId !== null;
  const pairKey = hasPair ? `${row.vmId}${row.repositoryId}` : null;
  return {
    id: row.id,
    kind: row.kind,
    state: row.state,
    stage: row.stage,
    vm_id: row.vmId,
    repository_id: row.repositoryId,
    point_id: row.pointId,
    pair_key: pairKey,
    running_key: row.state === 'running' ? pairKey : null,
    attempt: row.attempt,
    created_at: row.createdAt,
    started_at: row.startedAt,
    ended_at: row.endedAt,
    progress_at: row.progressAt,
    is_cancel_requested: row.cancelRequested ? 1 : 0,
    worker_id: row.workerId,
    heartbeat_at: row.heartbeatAt,
    last_event: 0,
    request: toJson(row.request),
    progress: toJson(row.progress),
    error: toJson(row.error),
    result: toJson(row.result),
  };
}

export function toRunRow(record: RunRecord): RunRow {
  return {
    id: record.id,
    kind: record.kind,
    state: record.state,
    stage: record.stage,
    vmId: record.vm_id,
    repositoryId: record.repository_id,
    pointId: record.point_id,
    attempt: record.attempt,
    createdAt: record.created_at,
    startedAt: record.started_at,
    endedAt: record.ended_at,
    progressAt: record.progress_at,
    cancelRequested: record.is_cancel_requested !== 0,
    workerId: record.worker_id,
    heartbeatAt: record.heartbeat_at,
    request: fromJson(record.request),
    progress: fromJson(record.progress),
    error: fromJson(record.error),
    result: fromJson(record.result),
  };
}
