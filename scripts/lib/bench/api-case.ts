import path from 'node:path';
import { openDatabase, type PointRow, type VmRow } from '../../../src/db/index.js';
import { systemClock } from '../../../src/lib/clock.js';
import { newId, type DiskId, type LayerId, type PointId, type RepositoryId } from '../../../src/lib/id.js';
import { silentLogger } from '../../../src/lib/log.js';
import { dataOf } from '../api-client.js';
import type { BenchDaemon } from './holdfast.js';
import { median, percentile } from './usage.js';

const POINTS = 100_000;
const VMS = 100;
const REQUESTS = 1000;
const FIRST_POINT_MS = Date.UTC(2020, 0, 1);

export interface ApiResult {
  points: number;
  requests: number;
  medianMs: number;
  p99Ms: number;
  maxMs: number;
}

/** Fills the index of a daemon that is not running. */
export async function seedPoints(stateDirectory: string, repositoryRoot: string): Promise<void> {
  await using db = await openDatabase(
    {
      kind: 'sqlite',
      file: path.join(stateDirectory, 'holdfast.db'),
      url: null,
      socketPath: null,
      connections: 1,
      queryTimeoutMs: 600_000,
      connectTimeoutMs: 10_000,
    },
    { logger: silentLogger(), clock: systemClock },
  );
  await db.migrate();
  const repositoryId = newId<RepositoryId>();
  const createdAt = new Date(FIRST_POINT_MS).toISOString();
  await db.repositories.insert({
    id: repositoryId,
    name: 'list',
    root: repositoryRoot,
    hash: 'xxh3-128',
    createdAt,
  });
  const vms = Array.from({ length: VMS }, (_, index) => makeVm(index, createdAt));
  const points = Array.from({ length: POINTS }, (_, index) => {
    const vm = vms[index % VMS];
    if (vm === undefined) throw new RangeError('no VM');
    return makePoint(repositoryId, vm, index);
  });
  await db.points.replaceRepository(repositoryId, { vms, points });
}

function makeVm(index: number, createdAt: string): VmRow {
  const id = newId<VmRow['id']>();
  const disk = {
    id: newId<DiskId>(),
    vmId: id,
    number: 0,
    name: 'disk0',
    sizeBytes: 2 ** 33,
    lineage: `list:${index}`,
  };
  return {
    ...{ id, name: `list-${index}`, createdAt, sourceKey: null, source: null, facts: null },
    disks: [{ ...disk, source: null, facts: null }],
  };
}

function makePoint(repositoryId: RepositoryId, vm: VmRow, index: number) {
  const at = new Date(FIRST_POINT_MS + index * 60_000).toISOString();
  const sequence = Math.floor(index / VMS) + 1;
  const pointId = newId<PointId>();
  const layerId = newId<LayerId>();
  const disks = vm.disks.map(({ id, number, name, sizeBytes, lineage }) => ({
    ...{ diskId: id, number, name, sizeBytes, sourceLineage: lineage, layerId },
    ...{ parentLayerId: null, parentPointId: null, method: 'full' as const },
    reason: { code: 'REQUESTED' as const, sentence: 'A full backup was asked for.' },
    ...{ changeIdFrom: null, changeIdTo: `holdfast-${pointId}`, bytesRead: 2 ** 31, bytesWritten: 2 ** 31 },
    ...{ bytesZeroed: 0, bytesSkipped: 0, layerFileBytes: 2 ** 31, sumsSha256: '0'.repeat(64) },
  }));
  const head = {
    repositoryId,
    vmId: vm.id,
    runId: newId<PointRow['runId']>(),
    sequence,
    type: 'full' as const,
  };
  const times = { capturedAt: at, committedAt: at };
  const point: PointRow = {
    ...head,
    ...times,
    id: pointId,
    fileBytes: 2 ** 31,
    manifest: {
      ...head,
      ...times,
      ...{
        formatVersion: 1,
        pointId,
        vmName: vm.name,
        consistency: 'crash',
        hash: 'xxh3-128',
        previous: null,
        disks,
      },
    },
  };
  const layers = disks.map(({ diskId }) => ({
    id: layerId,
    pointId,
    repositoryId,
    diskId,
    parentLayerId: null,
  }));
  return { point, layers };
}

/** Pages of 50 by cursor from the newest on, one request after another, timed at the client. */
export async function runApiCase(daemon: BenchDaemon): Promise<ApiResult> {
  const times: number[] = [];
  let cursor: string | null = null;
  for (let request = 0; request < REQUESTS; request += 1) {
    const startMs = performance.now();
    const query: { limit: number; cursor?: string } = { limit: 50, ...(cursor === null ? {} : { cursor }) };
    const page: { nextCursor: string | null } = dataOf(
      await daemon.api.GET('/backups', { params: { query } }),
    );
    times.push(performance.now() - startMs);
    cursor = page.nextCursor;
  }
  return {
    points: POINTS,
    requests: REQUESTS,
    medianMs: median(times),
    p99Ms: percentile(times, 0.99),
    maxMs: Math.max(...times),
  };
}
