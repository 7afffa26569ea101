import { mkdir, mkdtemp, open, rm, stat, writeFile, type FileHandle } from 'node:fs/promises';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { runTool } from '../../src/lib/process.js';
import { CLUSTER_BYTES, GIB, KIB, MIB, TIB } from '../../src/lib/units.js';
import { SeededRandom } from '../../integration/lab/disk-image.js';
import { LayerTables } from '../../repository/layer-tables.js';
import { CLUSTER_DATA, CLUSTER_UNALLOCATED, CLUSTER_ZERO, Qcow2File } from '../../repository/qcow2.js';
import { checkImage } from '../../repository/qemu-img.js';

const ENTRY_BYTES = 24;
const ZERO_BIT = 1n << 63n;

/** What each written cluster is filled with; 0 for a ZERO cluster. */
type Fills = ReadonlyMap<number, number>;

let directory: string;
beforeEach(async () => {
  directory = await mkdtemp('/dev/shm/holdfast-tables-');
});
afterEach(async () => {
  await rm(directory, { recursive: true, force: true });
});

const tool = (command: string, args: string[]): Promise<{ stdout: string }> =>
  runTool(command, args, { timeoutMs: 30_000, cwd: directory });

async function createEmpty(
  name: string,
  sizeBytes: number,
  options: { clusterBytes?: number; backing?: string } = {},
): Promise<string> {
  const { clusterBytes = CLUSTER_BYTES, backing } = options;
  const parent = backing === undefined ? [] : ['-F', 'qcow2', '-b', backing];
  const format = ['-f', 'qcow2', '-o', `cluster_size=${clusterBytes},lazy_refcounts=off,compat=1.1`];
  await tool('qemu-img', ['create', '-q', ...format, ...parent, name, String(sizeBytes)]);
  return path.join(directory, name);
}

/** Stands for the copy engine: appends data clusters and remembers where. */
class Appender {
  #end: number;
  constructor(
    private readonly file: FileHandle,
    private readonly clusterBytes: number,
    start: number,
  ) {
    this.#end = start;
  }
  readonly reserve = (bytes: number): number => {
    const place = this.#end;
    this.#end += Math.ceil(bytes / this.clusterBytes) * this.clusterBytes;
    return place;
  };
  /** In an order of its own, as with several connections. */
  async write(
    fills: [number, number][],
    random: SeededRandom,
  ): Promise<{ entries: Buffer; places: Float64Array }> {
    const entries = Buffer.alloc(fills.length * ENTRY_BYTES);
    const places = new Float64Array(fills.length);
    const order = fills.map((fill, index) => ({ fill, index, key: random.next() }));
    for (const { fill, index } of order.sort((a, b) => a.key - b.key)) {
      const [cluster, value] = fill;
      entries.writeBigUInt64LE(BigInt(cluster) | (value === 0 ? ZERO_BIT : 0n), index * ENTRY_BYTES);
      if (value === 0) continue;
      const place = this.reserve(this.clusterBytes);
      await this.file.write(Buffer.alloc(this.clusterBytes, value), 0, this.clusterBytes, place);
      places[index] = place;
    }
    return { entries, places };
  }
}

async function writeLayer(
  file: string,
  fills: Fills,
  options: { clusterBytes?: number; windowClusters?: number } = {},
): Promise<void> {
  const { clusterBytes = CLUSTER_BYTES, windowClusters = 100 } = options;
  const random = new SeededRandom(7);
  await using tables = await LayerTables.open(file);
  await using data = await open(file, 'r+');
  const appender = new Appender(data, clusterBytes, tables.startOffset);
  const all = [...fills].sort(([a], [b]) => a - b);
  for (let at = 0; at < all.length; at += windowClusters) {
    await tables.append(await appender.write(all.slice(at, at + windowClusters), random), appender.reserve);
  }
  await tables.finish(appender.reserve);
}

/** QEMU finds nothing wrong, not even a leak, and its map and ours show exactly these clusters. */
async function expectLayer(file: string, fills: Fills, clusterBytes = CLUSTER_BYTES): Promise<void> {
  expect(await checkImage(file)).toEqual({ errors: 0, leaks: 0 });
  await using image = await Qcow2File.open(file);
  expect((await stat(file)).size % clusterBytes).toBe(0);
  const byFill = [...fills].map(([cluster, value]) => [cluster, value === 0 ? CLUSTER_ZERO : CLUSTER_DATA]);
  const found: number[][] = [];
  for (let at = 0; at < image.clusterCount;) {
    at = image.nextPossible(at, image.clusterCount);
    if (at === Infinity) break;
    const count = Math.min(clusterBytes / 8, image.clusterCount - at);
    const { kinds, hostOffsets } = await image.window(at, count);
    for (let i = 0; i < count; i += 1) {
      if (kinds[i] === CLUSTER_UNALLOCATED) continue;
      found.push([at + i, kinds[i] ?? -1]);
      if (kinds[i] !== CLUSTER_DATA) continue;
      const bytes = await image.readBytes(hostOffsets[i] ?? 0, clusterBytes);
      expect(bytes.equals(Buffer.alloc(clusterBytes, fills.get(at + i)))).toBe(true);
    }
    at += count;
  }
  expect(found).toEqual(byFill.sort(([a = 0], [b = 0]) => a - b));
}

/** The disk as QEMU reads it, compared with the fills of a whole chain by `qemu-io`. */
async function expectReads(name: string, patterns: [offset: number, length: number, value: number][]) {
  const commands = patterns.flatMap(([offset, length, value]) => [
    '-c',
    `read -P ${value} ${offset} ${length}`,
  ]);
  const { stdout } = await tool('qemu-io', ['-r', '-f', 'qcow2', ...commands, name]);
  expect(stdout).not.toContain('Pattern verification failed');
  expect(stdout.match(/^read /gm)).toHaveLength(patterns.length);
}

describe('the tables of a layer that is appended to', () => {
  it('an empty layer stays what qemu-img made', async () => {
    const file = await createEmpty('empty.qcow2', 10 * MIB);
    await writeLayer(file, new Map());
    expect(await checkImage(file)).toEqual({ errors: 0, leaks: 0 });
    await expectReads('empty.qcow2', [[0, 10 * MIB, 0]]);
  });

  it('data and ZERO clusters, also in an odd last cluster, over a parent', async () => {
    const sizeBytes = 10 * MIB + 512;
    const last = 160;
    const parent: Fills = new Map([
      [0, 1],
      [1, 2],
      [5, 3],
      [last, 4],
    ]);
    await writeLayer(await createEmpty('parent.qcow2', sizeBytes), parent);
    await expectLayer(path.join(directory, 'parent.qcow2'), parent);
    const child: Fills = new Map([
      [1, 0],
      [2, 0],
      [5, 9],
      [last, 0],
    ]);
    await writeLayer(await createEmpty('child.qcow2', sizeBytes, { backing: 'parent.qcow2' }), child);
    await expectLayer(path.join(directory, 'child.qcow2'), child);
    await expectReads('parent.qcow2', [
      [0, CLUSTER_BYTES, 1],
      [CLUSTER_BYTES, CLUSTER_BYTES, 2],
      [last * CLUSTER_BYTES, 512, 4],
    ]);
    await expectReads('child.qcow2', [
      [0, CLUSTER_BYTES, 1],
      [CLUSTER_BYTES, 2 * CLUSTER_BYTES, 0],
      [5 * CLUSTER_BYTES, CLUSTER_BYTES, 9],
      [last * CLUSTER_BYTES, 512, 0],
    ]);
    const info = await tool('qemu-img', ['info', '-f', 'qcow2', '--output=json', 'child.qcow2']);
    expect(JSON.parse(info.stdout)).toMatchObject({
      'backing-filename': 'parent.qcow2',
      'backing-filename-format': 'qcow2',
      'virtual-size': sizeBytes,
      'format-specific': {
        data: { compat: '1.1', 'lazy-refcounts': false, 'refcount-bits': 16, corrupt: false },
      },
    });
  });

  it('is a layer that QEMU goes on writing to', async () => {
    const fills: Fills = new Map([
      [0, 1],
      [3, 0],
      [8192, 7],
    ]);
    await writeLayer(await createEmpty('layer.qcow2', GIB), fills);
    await tool('qemu-io', [
      '-f',
      'qcow2',
      ...['-c', 'write -P 5 3k 4k', '-c', 'write -P 6 196608 512', '-c', 'write -P 8 900M 1M', 'layer.qcow2'],
    ]);
    expect(await checkImage(path.join(directory, 'layer.qcow2'))).toEqual({ errors: 0, leaks: 0 });
    await expectReads('layer.qcow2', [
      [0, 3 * KIB, 1],
      [3 * KIB, 4 * KIB, 5],
      [3 * CLUSTER_BYTES, 512, 6],
      [512 * MIB, CLUSTER_BYTES, 7],
      [900 * MIB, MIB, 8],
    ]);
  });

  it.each([
    ['4 TiB, clusters far apart', 4 * TIB, [0, 8191, 8192, 1_000_000, 4 * 16_777_216 - 1]],
    ['64 TiB, whose L1 table fills many clusters', 64 * TIB, [12, 64 * 16_777_216 - 1]],
  ])('%s', async (_what, sizeBytes, clusters) => {
    const fills: Fills = new Map(clusters.map((cluster, index) => [cluster, index + 1]));
    const file = await createEmpty('large.qcow2', sizeBytes);
    await writeLayer(file, fills, { windowClusters: 2 });
    await expectLayer(file, fills);
  });

  it.each([512, 4096])(
    'clusters of %d bytes, at sizes around what one refcount block and one refcount table hold',
    async (clusterBytes) => {
      const perBlock = clusterBytes / 2;
      const perTable = perBlock * (clusterBytes / 8);
      // Some 16 MiB and a few hundred of the larger clusters: the small ones need another table.
      const around = (count: number): number[] => [-5, -3, -2, -1, 0].map((it) => count + it);
      const counts = [...around(perBlock), ...(clusterBytes === 512 ? around(perTable).slice(2) : [])];
      counts.push(clusterBytes === 512 ? 2 * perTable + 11 : 3 * perBlock);
      for (const count of counts) {
        const name = `small-${count}.qcow2`;
        const file = await createEmpty(name, 64 * MIB, { clusterBytes });
        const fills: Fills = new Map(Array.from({ length: count }, (_, i) => [2 * i, 1 + (i % 255)]));
        await writeLayer(file, fills, { clusterBytes, windowClusters: 1000 });
        expect(await checkImage(file)).toEqual({ errors: 0, leaks: 0 });
        await expectReads(name, [
          [0, clusterBytes, 1],
          [2 * (count - 1) * clusterBytes, clusterBytes, 1 + ((count - 1) % 255)],
        ]);
        await rm(file);
      }
    },
    60_000,
  );

  it('random clusters in random windows are what QEMU reads', async () => {
    const random = new SeededRandom(99);
    for (let round = 0; round < 10; round += 1) {
      const clusters = random.between(1, 3000);
      const fills = new Map<number, number>();
      for (let i = random.between(0, 200); i > 0; i -= 1) {
        fills.set(random.between(0, clusters), random.between(0, 4));
      }
      const name = `random-${round}.qcow2`;
      const file = await createEmpty(name, clusters * CLUSTER_BYTES);
      await writeLayer(file, fills, { windowClusters: random.between(1, 50) });
      await expectLayer(file, fills);
      const reads = [...fills].map(([cluster, value]): [number, number, number] => [
        cluster * CLUSTER_BYTES,
        CLUSTER_BYTES,
        value,
      ]);
      if (reads.length > 0) await expectReads(name, reads);
    }
  });

  it('a layer that was begun and not finished shows no cluster', async () => {
    const file = await createEmpty('cut.qcow2', GIB);
    await using tables = await LayerTables.open(file);
    await using data = await open(file, 'r+');
    const appender = new Appender(data, CLUSTER_BYTES, tables.startOffset);
    const fills: [number, number][] = [
      [0, 1],
      [9000, 2],
    ];
    await tables.append(await appender.write(fills, new SeededRandom(1)), appender.reserve);
    await expectReads('cut.qcow2', [[0, GIB, 0]]);
  });
});

describe('refusals', () => {
  it.each([
    ['a cluster of an earlier table', [9000, 1]],
    ['a cluster beyond the disk', [GIB / CLUSTER_BYTES]],
  ])('%s', async (_what, clusters) => {
    await using tables = await LayerTables.open(await createEmpty('layer.qcow2', GIB));
    const entries = Buffer.alloc(clusters.length * ENTRY_BYTES);
    clusters.forEach((cluster, index) => entries.writeBigUInt64LE(BigInt(cluster), index * ENTRY_BYTES));
    const placed = { entries, places: new Float64Array(clusters.length).fill(tables.startOffset) };
    await expect(tables.append(placed, () => tables.startOffset)).rejects.toMatchObject({ code: 'INTERNAL' });
  });

  it('what is no layer, or is not there', async () => {
    const raw = path.join(directory, 'raw');
    await writeFile(raw, Buffer.alloc(MIB));
    await expect(LayerTables.open(raw)).rejects.toMatchObject({ code: 'LAYER_CORRUPT' });
    const old = path.join(directory, 'old.qcow2');
    await tool('qemu-img', ['create', '-q', '-f', 'qcow2', '-o', 'compat=0.10', old, '1M']);
    await expect(LayerTables.open(old)).rejects.toMatchObject({ code: 'LAYER_CORRUPT' });
    const missing = LayerTables.open(path.join(directory, 'none'));
    await expect(missing).rejects.toMatchObject({ code: 'REPOSITORY_IO' });
  });

  it('a full file system says REPOSITORY_FULL', async () => {
    const mountPoint = path.join(directory, 'mount');
    await mkdir(mountPoint);
    await tool('mount', ['-t', 'tmpfs', '-o', 'size=512k', 'tmpfs', mountPoint]);
    try {
      await createEmpty('mount/layer.qcow2', GIB);
      await writeFile(path.join(mountPoint, 'filler'), Buffer.alloc(400 * KIB)).catch(() => undefined);
      await using tables = await LayerTables.open(path.join(mountPoint, 'layer.qcow2'));
      let end = tables.startOffset;
      const reserve = (bytes: number): number => (end += bytes) - bytes;
      const entries = Buffer.alloc(2 * ENTRY_BYTES);
      entries.writeBigUInt64LE(9000n, ENTRY_BYTES);
      const work = async (): Promise<void> => {
        await tables.append({ entries, places: Float64Array.of(0, 0) }, reserve);
        await tables.finish(reserve);
      };
      await expect(work()).rejects.toMatchObject({ code: 'REPOSITORY_FULL' });
    } finally {
      await tool('umount', [mountPoint]);
    }
  });
});
