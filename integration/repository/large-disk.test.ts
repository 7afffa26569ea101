import { mkdtemp, rm, stat, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { newId, type DiskId, type LayerId, type PointId, type VmId } from '../../src/lib/id.js';
import { runTool } from '../../src/lib/process.js';
import { CLUSTER_BYTES, TIB } from '../../src/lib/units.js';
import { openChainReader } from '../../repository/chain-reader.js';
import { SumsFileWriter } from '../../repository/sums.js';
import type { BackingChain, ChainLayer } from '../../repository/types.js';

/**
 * Planning must cost what is stored, not what the disk could hold. Data never enters: layers are made
 * with qemu-img (preallocated metadata where many clusters are wanted) and sums that fit them.
 */
let directory: string;
beforeAll(async () => {
  directory = await mkdtemp('/dev/shm/holdfast-large-');
});
afterAll(async () => {
  await rm(directory, { recursive: true, force: true });
});

async function makeLayer(options: {
  sizeBytes: number;
  clusters: Iterable<number>;
  parent?: ChainLayer;
  preallocate?: boolean;
  writes?: string[];
}): Promise<ChainLayer> {
  const layerId = newId<LayerId>();
  const file = path.join(directory, `${layerId}.qcow2`);
  const preallocation = options.preallocate === true ? ',preallocation=metadata' : '';
  const backing =
    options.parent === undefined ? [] : ['-F', 'qcow2', '-b', path.basename(options.parent.path)];
  await runTool(
    'qemu-img',
    [
      'create',
      '-q',
      '-f',
      'qcow2',
      '-o',
      `cluster_size=65536${preallocation}`,
      ...backing,
      file,
      String(options.sizeBytes),
    ],
    { timeoutMs: 20_000, cwd: directory },
  );
  if (options.writes !== undefined) {
    const commands = options.writes.flatMap((command) => ['-c', command]);
    await runTool('qemu-io', ['-f', 'qcow2', ...commands, file], { timeoutMs: 20_000 });
  }
  const sumsPath = path.join(directory, `${layerId}.sums`);
  const facts = {
    hash: 'xxh3-128' as const,
    clusterBytes: CLUSTER_BYTES,
    layerId,
    diskBytes: options.sizeBytes,
  };
  await using sums = await SumsFileWriter.create(sumsPath, facts);
  for (const cluster of options.clusters) {
    const entry = Buffer.alloc(24, 1);
    entry.writeBigUInt64LE(BigInt(cluster));
    await sums.append(entry);
  }
  const sumsSha256 = await sums.finish();
  return {
    layerId,
    pointId: newId<PointId>(),
    sizeBytes: options.sizeBytes,
    path: file,
    sumsPath,
    sumsSha256,
  };
}

const chainOf = (...layers: ChainLayer[]): BackingChain => ({
  vmId: newId<VmId>(),
  diskId: newId<DiskId>(),
  layers,
});

describe('the chain reader on large disks', () => {
  it('walks a 4 TiB disk with a few islands in under two seconds', async () => {
    const islands = [0, 1, 20_000_000, 40_000_001, 67_108_863];
    const writes = islands.map((cluster) => `write -P 1 ${cluster * CLUSTER_BYTES} ${CLUSTER_BYTES}`);
    const base = await makeLayer({ sizeBytes: 4 * TIB, clusters: islands, writes });
    const top = await makeLayer({
      sizeBytes: 4 * TIB,
      clusters: [1],
      parent: base,
      writes: [`write -P 2 ${CLUSTER_BYTES} ${CLUSTER_BYTES}`],
    });
    const start = performance.now();
    await using reader = await openChainReader(chainOf(top, base));
    const copied: number[] = [];
    let coveredBytes = 0;
    for (let window = await reader.next(4096); window !== undefined; window = await reader.next(4096)) {
      for (let row = 0; row < window.rows.length; row += 5)
        copied.push((window.rows[row] ?? 0) / CLUSTER_BYTES);
      coveredBytes += window.copyBytes + window.zeroBytes;
    }
    expect(copied).toEqual(islands);
    expect(coveredBytes).toBe(4 * TIB);
    expect(performance.now() - start).toBeLessThan(2000);
  });

  it('plans a window of 37,000 clusters over three layers in some tens of milliseconds, in one row where it can', async () => {
    const clusters = 38_000;
    const sizeBytes = clusters * CLUSTER_BYTES;
    const everySecond = Array.from({ length: 100 }, (_, i) => i * 2);
    const writes = everySecond.map((cluster) => `write -P 1 ${cluster * CLUSTER_BYTES} ${CLUSTER_BYTES}`);
    const base = await makeLayer({ sizeBytes, clusters: Array(clusters).keys(), preallocate: true });
    const middle = await makeLayer({ sizeBytes, clusters: everySecond, writes, parent: base });
    const top = await makeLayer({ sizeBytes, clusters: [], parent: middle });
    await using reader = await openChainReader(chainOf(top, middle, base));
    await reader.window(0, 1000);
    const start = performance.now();
    const window = await reader.window(0, 37_000);
    const elapsedMs = performance.now() - start;
    expect(window.copyBytes).toBe(37_000 * CLUSTER_BYTES);
    expect(window.expect.length).toBe(37_000 * 17);
    // Metadata preallocation places data in L2-sized runs; the islands of the middle layer break the first.
    expect(window.rows.length / 5).toBeLessThan(250);
    expect(elapsedMs).toBeLessThan(250);
  });

  it('refuses a layer whose file has clusters that its sums do not list, far out in a hole', async () => {
    const far = 30_000_000;
    const layer = await makeLayer({
      sizeBytes: 4 * TIB,
      clusters: [0],
      writes: [`write -P 1 0 ${CLUSTER_BYTES}`, `write -P 1 ${far * CLUSTER_BYTES} ${CLUSTER_BYTES}`],
    });
    await using reader = await openChainReader(chainOf(layer));
    await reader.next(4096);
    await expect(reader.next(4096)).rejects.toMatchObject({
      code: 'LAYER_CORRUPT',
      details: { offset: far * CLUSTER_BYTES, layerId: layer.layerId },
    });
  });

  it('writes four million entries with little memory', async () => {
    const count = 4_000_000;
    const file = path.join(directory, 'many.sums');
    const facts = {
      hash: 'xxh3-128' as const,
      clusterBytes: CLUSTER_BYTES,
      layerId: newId<LayerId>(),
      diskBytes: count * CLUSTER_BYTES,
    };
    const before = process.memoryUsage().rss;
    await using writer = await SumsFileWriter.create(file, facts);
    const batch = Buffer.alloc(24 * 40_000, 7);
    for (let start = 0; start < count; start += 40_000) {
      for (let i = 0; i < 40_000; i += 1) {
        batch.writeUInt32LE(start + i, i * 24);
        batch.writeUInt32LE(0, i * 24 + 4);
      }
      await writer.append(batch);
    }
    await writer.finish();
    expect((await stat(file)).size).toBe(64 + count * 24 + 16);
    expect(process.memoryUsage().rss - before).toBeLessThan(150 * 1024 * 1024);
    await writeFile(file, '');
  });
});
