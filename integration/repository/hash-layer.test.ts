import { createHash } from 'node:crypto';
import { open, readFile } from 'node:fs/promises';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { newId, type LayerId, type PointId } from '../../src/lib/id.js';
import { runTool } from '../../src/lib/process.js';
import { CLUSTER_BYTES, MIB } from '../../src/lib/units.js';
import { connectNbd } from '../../src/nbd/index.js';
import type { Lease } from '../../repository/lease.js';
import { OpenLayer } from '../../repository/partial-layer.js';
import type { PartialLayer } from '../../repository/repository.js';
import { SumsReader } from '../../repository/sums-reader.js';
import type { PointManifest } from '../../repository/types.js';
import { RepositoryLab, packEntries, type Fill } from '../../test/repository/repository-lab.js';
import { startQemuNbd } from '../lab/nbd-server.js';

const TIMEOUT = { timeoutMs: 20_000 };

let lab: RepositoryLab;
let lease: Lease;
let layers: PartialLayer[];
beforeEach(async () => {
  lab = await RepositoryLab.create();
  lease = await lab.lease();
  layers = [];
});
afterEach(async () => {
  for (const layer of layers) if (layer instanceof OpenLayer) await layer.sums.close();
  await lease[Symbol.asyncDispose]();
  await lab[Symbol.asyncDispose]();
});

async function makeLayer(options: { parent?: PointManifest; sizeBytes?: number } = {}): Promise<OpenLayer> {
  const layer = await lab.repository.createLayer(
    {
      vmId: lab.vmId,
      diskId: lab.diskId,
      runId: lab.runId,
      layerId: newId<LayerId>(),
      sizeBytes: options.sizeBytes ?? lab.sizeBytes,
      parentLayerId: options.parent?.disks[0]?.layerId ?? null,
    },
    lease,
  );
  layers.push(layer);
  if (layer instanceof OpenLayer) return layer;
  throw new Error('a layer of another kind');
}

/** Somebody else's writes: stock qemu-io, over NBD as an agent's, or on the file. */
async function write(layer: PartialLayer, commands: string[]): Promise<void> {
  const socketPath = path.join(lab.directory, 'w.sock');
  await using server = await startQemuNbd({
    image: layer.path,
    format: 'qcow2',
    socketPath,
    extra: ['--discard=unmap'],
  });
  await qemuIo('raw', server.uri, commands);
}

async function qemuIo(format: string, image: string, commands: string[]): Promise<void> {
  await runTool('qemu-io', ['-f', format, ...commands.flatMap((command) => ['-c', command]), image], TIMEOUT);
}

/** Hashes the layer and commits it, which holds its sums against its clusters; answers sums and digest. */
async function hashAndCommit(
  layer: OpenLayer,
  parent?: PointManifest,
): Promise<{ point: PointManifest; digest: string; entries: Buffer }> {
  const { digest } = await lab.repository.hashLayer(layer);
  const disk = parent?.disks[0];
  const pointId = newId<PointId>();
  const point = await lab.repository.commitPoint(
    {
      pointId,
      vmId: lab.vmId,
      vmName: 'lab',
      runId: lab.runId,
      capturedAt: '2026-11-21T09:00:00.000Z',
      consistency: 'crash',
      disks: [
        {
          diskId: lab.diskId,
          number: 0,
          name: 'vda',
          sizeBytes: layer.sizeBytes,
          sourceLineage: 'lineage-1',
          layerId: layer.layerId,
          parentLayerId: disk?.layerId ?? null,
          parentPointId: parent?.pointId ?? null,
          method: disk === undefined ? 'full' : 'bitmap',
          reason: { code: disk === undefined ? 'FIRST_POINT' : 'BITMAP', sentence: 'for a test' },
          changeIdFrom: disk?.changeIdTo ?? null,
          changeIdTo: `change-${pointId}`,
          bytesRead: 0,
          bytesWritten: 0,
          bytesZeroed: 0,
          bytesSkipped: 0,
        },
      ],
    },
    [layer],
    { lease },
  );
  return { point, digest, entries: await readEntries(point) };
}

async function readEntries(point: PointManifest): Promise<Buffer> {
  const sums = path.join(lab.diskDirectory(), `${point.disks[0]?.layerId ?? ''}.sums`);
  await using reader = await SumsReader.open(sums);
  const parts: Buffer[] = [];
  for await (const { data } of reader.window(0, 2 ** 32)) parts.push(Buffer.from(data));
  return Buffer.concat(parts);
}

async function contentOf(point: PointManifest): Promise<Buffer> {
  const raw = path.join(lab.directory, 'out.raw');
  const source = path.join(lab.diskDirectory(), `${point.disks[0]?.layerId ?? ''}.qcow2`);
  await runTool('qemu-img', ['convert', '-f', 'qcow2', '-O', 'raw', source, raw], TIMEOUT);
  return (await readFile(raw)).subarray(0, point.disks[0]?.sizeBytes);
}

async function expectSound(): Promise<void> {
  expect((await lab.repository.check({ content: true })).findings).toEqual([]);
}

const entriesOf = (fills: [number, Fill][], sizeBytes = lab.sizeBytes): Buffer =>
  packEntries(fills, sizeBytes);
const sha256 = (data: Buffer): string => createHash('sha256').update(data).digest('hex');
const K = CLUSTER_BYTES / 1024;

describe('hashLayer', () => {
  it('makes the entries a copy would have made: data, zeroes written as data, explicit zeroes, a hole punched', async () => {
    const layer = await makeLayer();
    await write(layer, [
      `write -P 0x11 0 ${2 * K}k`,
      `write -P 0 ${3 * K}k ${K}k`,
      `write -z ${5 * K}k ${K}k`,
      `write -P 0x77 ${7 * K}k ${K}k`,
      `discard ${7 * K}k ${K}k`,
    ]);
    const { digest, entries, point } = await hashAndCommit(layer);
    const zeroes: [number, Fill][] = [
      [3, 'zero'],
      [5, 'zero'],
      [7, 'zero'],
    ];
    expect(entries).toEqual(entriesOf([[0, 0x11], [1, 0x11], ...zeroes]));
    expect(digest).toBe(
      sha256(
        entriesOf([
          [0, 0x11],
          [1, 0x11],
        ]),
      ),
    );
    expect(await contentOf(point)).toEqual(
      Buffer.concat([Buffer.alloc(2 * CLUSTER_BYTES, 0x11), Buffer.alloc(14 * CLUSTER_BYTES)]),
    );
    await expectSound();
  });

  it('takes zeroes of an incremental into the digest: they hide what the parent has', async () => {
    const { point: parent } = await hashAndCommit(await filled(0x10));
    const layer = await makeLayer({ parent });
    await write(layer, [
      `write -P 0x22 ${K}k ${K}k`,
      `write -z ${2 * K}k ${K}k`,
      `write -P 0 ${4 * K}k ${K}k`,
    ]);
    const { digest, entries, point } = await hashAndCommit(layer, parent);
    expect(entries).toEqual(
      entriesOf([
        [1, 0x22],
        [2, 'zero'],
        [4, 'zero'],
      ]),
    );
    expect(digest).toBe(sha256(entries));
    const disk = Buffer.alloc(lab.sizeBytes, 0x10);
    disk.fill(0x22, CLUSTER_BYTES, 2 * CLUSTER_BYTES);
    disk.fill(0, 2 * CLUSTER_BYTES, 3 * CLUSTER_BYTES);
    disk.fill(0, 4 * CLUSTER_BYTES, 5 * CLUSTER_BYTES);
    expect((await contentOf(point)).equals(disk)).toBe(true);
    await expectSound();
  });

  it('hashes whole clusters of which only a part was written: QEMU copies the rest from the parent', async () => {
    const { point: parent } = await hashAndCommit(await filled(0x10));
    const layer = await makeLayer({ parent });
    await write(layer, [`write -P 0x33 ${K * 1024 + 1000} 77`, `write -z ${3 * K + 4}k 8k`]);
    const { entries } = await hashAndCommit(layer, parent);
    const first = Buffer.alloc(CLUSTER_BYTES, 0x10).fill(0x33, 1000, 1077);
    const third = Buffer.alloc(CLUSTER_BYTES, 0x10).fill(0, 4096, 3 * 4096);
    expect(entries.length).toBe(80);
    expect(entries.subarray(8, 40)).toEqual(createHash('sha256').update(first).digest());
    expect(entries.subarray(48, 80)).toEqual(createHash('sha256').update(third).digest());
    await expectSound();
  });

  it('hashes the last cluster of an odd disk up to its exact end', async () => {
    const sizeBytes = 3 * CLUSTER_BYTES + 1000;
    const layer = await makeLayer({ sizeBytes });
    await write(layer, [`write -P 0x44 ${3 * CLUSTER_BYTES} 1000`]);
    const { entries, digest } = await hashAndCommit(layer);
    expect(entries).toEqual(entriesOf([[3, 0x44]], sizeBytes));
    expect(digest).toBe(sha256(entries));
    await expectSound();
  });

  it('takes a zero that ends inside a sector for zero', async () => {
    const sizeBytes = CLUSTER_BYTES + 1000;
    const { point: parent } = await hashAndCommit(await filled(0x10, sizeBytes));
    const layer = await makeLayer({ parent, sizeBytes });
    await write(layer, [`write -z ${CLUSTER_BYTES} 1000`]);
    const { entries } = await hashAndCommit(layer, parent);
    expect(entries).toEqual(entriesOf([[1, 'zero']], sizeBytes));
    await expectSound();
  });

  it('refuses bytes written between the end of the disk and the end of its last sector', async () => {
    const layer = await makeLayer({ sizeBytes: 3 * CLUSTER_BYTES + 1000 });
    await write(layer, [`write -P 0x44 ${3 * CLUSTER_BYTES} 1024`]);
    await expect(lab.repository.hashLayer(layer)).rejects.toMatchObject({
      code: 'LAYER_CORRUPT',
      message: expect.stringContaining('beyond the end of its disk') as string,
    });
  });

  it('a disk that grew: the parent ends inside a cluster, and what lies beyond is zero until it is written', async () => {
    const small = CLUSTER_BYTES + 1000;
    const { point: parent } = await hashAndCommit(await filled(0x10, small));
    const layer = await makeLayer({ parent, sizeBytes: 8 * CLUSTER_BYTES });
    await write(layer, [`write -P 0x55 ${CLUSTER_BYTES + 5000} 100`, `write -P 0x66 ${4 * K}k ${K}k`]);
    const { point, entries } = await hashAndCommit(layer, parent);
    const disk = Buffer.alloc(8 * CLUSTER_BYTES).fill(0x10, 0, small);
    disk
      .fill(0x55, CLUSTER_BYTES + 5000, CLUSTER_BYTES + 5100)
      .fill(0x66, 4 * CLUSTER_BYTES, 5 * CLUSTER_BYTES);
    expect(entries.length).toBe(80);
    expect((await contentOf(point)).equals(disk)).toBe(true);
    await expectSound();
  });

  it('a layer nothing was written to has no entries', async () => {
    const { entries, digest } = await hashAndCommit(await makeLayer());
    expect([entries.length, digest]).toEqual([0, sha256(Buffer.alloc(0))]);
  });

  it('reads a large sparse layer in windows, in order, and says how far it is', async () => {
    const sizeBytes = 40 * 1024 * MIB;
    const layer = await makeLayer({ sizeBytes });
    // On both sides of a window's end, of an L2 table's end, and at the end of the disk.
    const clusters = [0, 2047, 2048, 4095, 8191, 8192, 500_000, sizeBytes / CLUSTER_BYTES - 1];
    await write(
      layer,
      clusters.map((cluster) => `write -P 0x5a ${cluster * K}k ${K}k`),
    );
    const shares: number[] = [];
    await lab.repository.hashLayer(layer, { onProgress: (share) => shares.push(share) });
    await layer.sums.finish();
    await using reader = await SumsReader.open(path.join(lab.root, layer.partialSums));
    const found: number[] = [];
    for await (const { clusterIndex } of reader.entries()) found.push(clusterIndex);
    expect(found).toEqual(clusters);
    expect(shares.at(-1)).toBe(1);
    expect(shares).toEqual([...shares].sort((a, b) => a - b));
  });

  it('refuses a layer that somebody still has open for writing, and takes it when it is closed', async () => {
    const layer = await makeLayer();
    const socketPath = path.join(lab.directory, 'open.sock');
    const server = await startQemuNbd({ image: layer.path, format: 'qcow2', socketPath });
    try {
      const limits = { connectTimeoutMs: 5000, requestTimeoutMs: 5000 };
      await using client = await connectNbd({ uri: server.uri, ...limits });
      await client.pwrite(0, Buffer.alloc(CLUSTER_BYTES, 1));
      await expect(lab.repository.hashLayer(layer)).rejects.toMatchObject({ code: 'CONFLICT' });
      expect(layer.sums.entryCount).toBe(0);
    } finally {
      await server.stop();
    }
    await lab.repository.hashLayer(layer);
    expect(layer.sums.entryCount).toBe(1);
  });

  it('hashes the live state of a layer with an internal snapshot and a bitmap', async () => {
    const layer = await makeLayer();
    await write(layer, [`write -P 0x11 0 ${K}k`]);
    await runTool('qemu-img', ['snapshot', '-c', 'before', layer.path], TIMEOUT);
    await runTool('qemu-img', ['bitmap', '-f', 'qcow2', '--add', layer.path, 'b0'], TIMEOUT);
    await write(layer, [`write -P 0x22 0 ${K}k`]);
    const { entries } = await hashAndCommit(layer);
    expect(entries).toEqual(entriesOf([[0, 0x22]]));
    await expectSound();
  });

  it.each<[string, string, (layer: OpenLayer, parent: PointManifest) => Promise<unknown>]>([
    [
      'compressed clusters',
      'LAYER_CORRUPT',
      (layer) => qemuIo('qcow2', layer.path, [`write -c -P 0x11 0 ${K}k`]),
    ],
    [
      'another backing file',
      'PARENT_MISMATCH',
      (layer) =>
        runTool(
          'qemu-img',
          ['rebase', '-u', '-f', 'qcow2', '-F', 'raw', '-b', '/etc/passwd', layer.path],
          TIMEOUT,
        ),
    ],
    [
      'no backing file any more',
      'PARENT_MISMATCH',
      (layer) => runTool('qemu-img', ['rebase', '-u', '-f', 'qcow2', '-b', '', layer.path], TIMEOUT),
    ],
    [
      'another size',
      'PARENT_MISMATCH',
      (layer) => runTool('qemu-img', ['resize', '-q', '-f', 'qcow2', layer.path, '+1M'], TIMEOUT),
    ],
    [
      'an L2 table outside of the file',
      'LAYER_CORRUPT',
      async (layer) => {
        await qemuIo('qcow2', layer.path, [`write -P 0x11 0 ${K}k`]);
        await using file = await open(layer.path, 'r+');
        const header = Buffer.alloc(48);
        await file.read(header, 0, 48, 0);
        const entry = Buffer.from([0x80, 0, 0, 0x40, 0, 0, 0, 0]);
        await file.write(entry, 0, 8, Number(header.readBigUInt64BE(40)));
      },
    ],
  ])('refuses a layer that is not what it was created as: %s', async (_title, code, harm) => {
    const { point: parent } = await hashAndCommit(await filled(0x10));
    const layer = await makeLayer({ parent });
    await harm(layer, parent);
    await expect(lab.repository.hashLayer(layer)).rejects.toMatchObject({ code });
    expect(layer.sums.entryCount).toBe(0);
  });

  it('gives up when it is cancelled', async () => {
    const layer = await makeLayer();
    await write(layer, [`write -P 0x11 0 ${K}k`]);
    const signal = AbortSignal.abort();
    await expect(lab.repository.hashLayer(layer, { signal })).rejects.toMatchObject({ code: 'CANCELLED' });
  });
});

/** A full whose every byte is `fill`. */
async function filled(fill: number, sizeBytes = lab.sizeBytes): Promise<OpenLayer> {
  const layer = await makeLayer({ sizeBytes });
  await write(layer, [`write -P ${fill} 0 ${sizeBytes}`]);
  return layer;
}
