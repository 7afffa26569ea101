import { createHash } from 'node:crypto';
import { mkdtemp, rm } from 'node:fs/promises';
import path from 'node:path';
import {
  newId,
  type ApplianceId,
  type DiskId,
  type LayerId,
  type PointId,
  type RunId,
  type VmId,
} from '../../src/lib/id.js';
import { runTool } from '../../src/lib/process.js';
import { CLUSTER_BYTES } from '../../src/lib/units.js';
import { openRepository, createRepository, type RepositoryParts } from '../../repository/open.js';
import type { Lease } from '../../repository/lease.js';
import { OpenLayer } from '../../repository/partial-layer.js';
import type { PartialLayer, Repository } from '../../repository/repository.js';
import type { DraftDisk, PointDraft, PointManifest, VmRecord } from '../../repository/types.js';

/** What a test writes into one cluster: a byte that fills it, or zeroes written explicitly. */
export type Fill = number | 'zero';
export type Fills = ReadonlyMap<number, Fill>;

export interface LabPoint {
  pointId: PointId;
  draft: PointDraft;
  layer: PartialLayer;
}

/** A repository in memory-backed storage with one VM of one disk, whose layers tests fill with qemu-io. */
export class RepositoryLab implements AsyncDisposable {
  readonly directory: string;
  readonly root: string;
  readonly sizeBytes: number;
  readonly applianceId: ApplianceId;
  readonly vmId = newId<VmId>();
  readonly diskId = newId<DiskId>();
  readonly runId = newId<RunId>();
  repository: Repository;
  #previous: PointManifest | undefined;
  readonly #layers: PartialLayer[] = [];

  private constructor(facts: {
    directory: string;
    root: string;
    repository: Repository;
    sizeBytes: number;
    applianceId: ApplianceId;
  }) {
    this.directory = facts.directory;
    this.root = facts.root;
    this.repository = facts.repository;
    this.sizeBytes = facts.sizeBytes;
    this.applianceId = facts.applianceId;
  }

  static async create(options: { sizeBytes?: number; root?: string } = {}): Promise<RepositoryLab> {
    const directory = await mkdtemp('/dev/shm/holdfast-repository-');
    const root = options.root ?? path.join(directory, 'repository');
    const applianceId = newId<ApplianceId>();
    const repository = await createRepository({ root, hash: 'sha-256', applianceId });
    const sizeBytes = options.sizeBytes ?? 16 * CLUSTER_BYTES;
    const lab = new RepositoryLab({ directory, root, repository, sizeBytes, applianceId });
    await repository.putVm(lab.vmRecord());
    return lab;
  }

  vmRecord(): VmRecord {
    return {
      vmId: this.vmId,
      name: 'lab',
      disks: [
        {
          diskId: this.diskId,
          number: 0,
          name: 'vda',
          sizeBytes: this.sizeBytes,
          sourceLineage: 'lineage-1',
        },
      ],
    };
  }

  async reopen(parts: RepositoryParts = {}): Promise<Repository> {
    return openRepository({ root: this.root, applianceId: this.applianceId }, parts);
  }

  lease(repository: Repository = this.repository): Promise<Lease> {
    return repository.acquireVmLease(this.vmId, { runId: this.runId, purpose: 'test' });
  }

  /** The layer and draft of a point on top of `parent` (a full without one), ready to be committed. */
  async prepare(
    fills: Fills,
    options: {
      lease: Lease;
      parent?: PointManifest | undefined;
      repository?: Repository;
      sizeBytes?: number;
    },
  ): Promise<LabPoint> {
    const repository = options.repository ?? this.repository;
    const parentDisk = options.parent?.disks[0];
    const runId = newId<RunId>();
    const sizeBytes = options.sizeBytes ?? this.sizeBytes;
    const layer = await repository.createLayer(
      {
        vmId: this.vmId,
        diskId: this.diskId,
        runId,
        layerId: newId<LayerId>(),
        sizeBytes,
        parentLayerId: parentDisk?.layerId ?? null,
      },
      options.lease,
    );
    this.#layers.push(layer);
    await fillLayer(layer, fills, sizeBytes);
    const pointId = newId<PointId>();
    const disk: DraftDisk = {
      diskId: this.diskId,
      number: 0,
      name: 'vda',
      sizeBytes,
      sourceLineage: 'lineage-1',
      layerId: layer.layerId,
      parentLayerId: parentDisk?.layerId ?? null,
      parentPointId: options.parent?.pointId ?? null,
      method: parentDisk === undefined ? 'full' : 'bitmap',
      reason: { code: parentDisk === undefined ? 'FIRST_POINT' : 'BITMAP', sentence: 'for a test' },
      changeIdFrom: parentDisk?.changeIdTo ?? null,
      changeIdTo: `change-${pointId}`,
      bytesRead: 0,
      bytesWritten: 0,
      bytesZeroed: 0,
      bytesSkipped: 0,
    };
    const draft: PointDraft = {
      pointId,
      vmId: this.vmId,
      vmName: 'lab',
      runId,
      capturedAt: '2026-11-21T09:00:00.000Z',
      consistency: 'crash',
      disks: [disk],
    };
    return { pointId, draft, layer };
  }

  /** A committed point on top of the last one this lab committed. */
  async commit(
    fills: Fills,
    options: {
      parent?: PointManifest | null;
      sizeBytes?: number;
      configFiles?: { name: string; content: Buffer }[];
    } = {},
  ): Promise<PointManifest> {
    await using lease = await this.lease();
    const parent = options.parent === null ? undefined : (options.parent ?? this.#previous);
    const { sizeBytes, configFiles } = options;
    const point = await this.prepare(fills, {
      lease,
      parent,
      ...(sizeBytes === undefined ? {} : { sizeBytes }),
    });
    const manifest = await this.repository.commitPoint(point.draft, [point.layer], {
      lease,
      ...(configFiles === undefined ? {} : { configFiles }),
    });
    this.#previous = manifest;
    return manifest;
  }

  diskDirectory(): string {
    return path.join(this.root, 'vms', this.vmId, 'layers', this.diskId);
  }

  pointFile(pointId: PointId): string {
    return path.join(this.root, 'vms', this.vmId, 'points', `${pointId}.json`);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const layer of this.#layers) if (layer instanceof OpenLayer) await layer.sums.close();
    await rm(this.directory, { recursive: true, force: true });
  }
}

/** Writes the clusters with qemu-io and the entries a copy session would have answered. */
export async function fillLayer(layer: PartialLayer, fills: Fills, sizeBytes: number): Promise<void> {
  const sorted = [...fills].sort(([a], [b]) => a - b);
  const commands = sorted.flatMap(([cluster, fill]) => {
    const offset = cluster * CLUSTER_BYTES;
    const length = Math.min(CLUSTER_BYTES, layer.virtualBytes - offset);
    const used = Math.min(CLUSTER_BYTES, sizeBytes - offset);
    if (fill === 'zero') return ['-c', `write -z ${offset} ${length}`];
    const tail = length - used;
    const writes = ['-c', `write -P ${fill} ${offset} ${used}`];
    return tail === 0 ? writes : ['-c', `write -P 0 ${offset} ${length}`, ...writes];
  });
  if (commands.length > 0) {
    await runTool('qemu-io', ['-f', 'qcow2', ...commands, layer.path], { timeoutMs: 20_000 });
  }
  await layer.sums.append(packEntries(sorted, sizeBytes));
}

export function packEntries(fills: Iterable<[number, Fill]>, sizeBytes: number): Buffer {
  const entries: Buffer[] = [];
  for (const [cluster, fill] of fills) {
    const entry = Buffer.alloc(40);
    const flag = fill === 'zero' ? 1n << 63n : 0n;
    entry.writeBigUInt64LE(BigInt(cluster) | flag, 0);
    if (fill !== 'zero') hashOfFill(cluster, fill, sizeBytes).copy(entry, 8);
    entries.push(entry);
  }
  return Buffer.concat(entries);
}

export function hashOfFill(cluster: number, fill: number, sizeBytes: number): Buffer {
  const length = Math.min(CLUSTER_BYTES, sizeBytes - cluster * CLUSTER_BYTES);
  return createHash('sha256').update(Buffer.alloc(length, fill)).digest();
}

/** What a disk holds after these layers, oldest first. */
export function expectedDisk(layers: readonly { fills: Fills; sizeBytes: number }[]): Buffer {
  const sizeBytes = layers.at(-1)?.sizeBytes ?? 0;
  const disk = Buffer.alloc(sizeBytes);
  for (const { fills, sizeBytes: layerBytes } of layers) {
    for (const [cluster, fill] of fills) {
      const offset = cluster * CLUSTER_BYTES;
      disk.fill(fill === 'zero' ? 0 : fill, offset, Math.min(offset + CLUSTER_BYTES, layerBytes));
    }
  }
  return disk;
}
