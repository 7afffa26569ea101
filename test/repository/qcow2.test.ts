import { copyFile, mkdtemp, readFile, rm, symlink, truncate, writeFile } from 'node:fs/promises';
import path from 'node:path';
import fc from 'fast-check';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { z } from 'zod';
import { AppError } from '../../src/lib/errors.js';
import { runTool } from '../../src/lib/process.js';
import { CLUSTER_DATA, CLUSTER_UNALLOCATED, CLUSTER_ZERO, Qcow2File } from '../../repository/qcow2.js';
import { parseQcow2Header } from '../../repository/qcow2-header.js';

let directory: string;
let base: string;
let top: string;
const SIZE = 700 * 1024 * 1024 + 512;

const tool = (name: string, args: string[]): Promise<{ stdout: string }> =>
  runTool(name, args, { timeoutMs: 20_000, cwd: directory });

beforeAll(async () => {
  directory = await mkdtemp('/dev/shm/holdfast-qcow2-');
  base = path.join(directory, 'base.qcow2');
  top = path.join(directory, 'top.qcow2');
  await tool('qemu-img', ['create', '-q', '-f', 'qcow2', '-o', 'cluster_size=65536', base, String(SIZE)]);
  await tool('qemu-img', ['create', '-q', '-f', 'qcow2', '-F', 'qcow2', '-b', 'base.qcow2', top]);
  await tool('qemu-io', [
    '-f',
    'qcow2',
    '-c',
    'write -P 1 0 1M',
    '-c',
    'write -P 2 600M 64k',
    '-c',
    `write -P 3 ${SIZE - 512} 512`,
    base,
  ]);
  await tool('qemu-io', [
    '-f',
    'qcow2',
    '-c',
    'write -P 4 512k 128k',
    '-c',
    'write -z 0 192k',
    '-c',
    'write -z -u 640M 1M',
    '-c',
    'write -P 5 537001984 100',
    top,
  ]);
});
afterAll(async () => {
  await rm(directory, { recursive: true, force: true });
});

const mapSchema = z.array(
  z.object({
    start: z.number(),
    length: z.number(),
    depth: z.number(),
    zero: z.boolean(),
    data: z.boolean(),
    present: z.boolean(),
    offset: z.number().optional(),
  }),
);

describe('Qcow2File', () => {
  it('reads header and backing file name', async () => {
    await using file = await Qcow2File.open(top);
    expect(file.header).toMatchObject({
      version: 3,
      clusterBytes: 65536,
      virtualBytes: SIZE,
      backingFile: 'base.qcow2',
      backingFormat: 'qcow2',
    });
  });

  it.each(['base', 'top'])('agrees with qemu-img map about every cluster of %s', async (name) => {
    const image = path.join(directory, `${name}.qcow2`);
    const { stdout } = await tool('qemu-img', ['map', '-f', 'qcow2', '--output=json', image]);
    const extents = mapSchema.parse(JSON.parse(stdout));
    await using file = await Qcow2File.open(image);
    const { kinds, hostOffsets } = await file.window(0, file.clusterCount);
    for (const { start, length, depth, zero, data, offset } of extents) {
      for (let at = start; at < start + length; at += 65536) {
        const cluster = Math.floor(at / 65536);
        // qemu-img map shows an unallocated part of a base as zero without data at depth 0 and present false.
        const own = depth === 0;
        const kind = kinds[cluster];
        if (own && data) {
          expect(kind).toBe(CLUSTER_DATA);
          expect(hostOffsets[cluster]).toBe((offset ?? 0) + at - start);
        } else {
          expect(kind === CLUSTER_ZERO ? zero : kind === CLUSTER_UNALLOCATED).toBe(true);
        }
      }
    }
    expect(kinds.some((kind) => kind === CLUSTER_DATA)).toBe(true);
  });

  it('sees ZERO clusters as zero and finds allocated regions without walking the holes', async () => {
    await using file = await Qcow2File.open(top);
    expect([...(await file.window(0, 3)).kinds]).toEqual([CLUSTER_ZERO, CLUSTER_ZERO, CLUSTER_ZERO]);
    expect(await file.firstAllocated(3, 8)).toBeUndefined();
    expect(await file.firstAllocated(3, 1000)).toBe(8);
    expect(await file.firstAllocated(10, 8192)).toBeUndefined();
    expect(await file.firstAllocated(10, 20_000)).toBe(Math.floor(537001984 / 65536));
    const beyond = await file.window(file.clusterCount - 1, 10);
    expect([...beyond.kinds]).toEqual(Array(10).fill(CLUSTER_UNALLOCATED));
  });

  it('refuses compressed clusters, links, cut files and other formats with LAYER_CORRUPT', async () => {
    const corrupt = { code: 'LAYER_CORRUPT' };
    const compressed = path.join(directory, 'compressed.qcow2');
    await tool('qemu-img', ['convert', '-c', '-f', 'qcow2', '-O', 'qcow2', base, compressed]);
    {
      await using file = await Qcow2File.open(compressed);
      await expect(file.window(0, 16)).rejects.toMatchObject(corrupt);
    }
    const link = path.join(directory, 'link.qcow2');
    await symlink(base, link);
    await expect(Qcow2File.open(link)).rejects.toMatchObject(corrupt);
    const cut = path.join(directory, 'cut.qcow2');
    await copyFile(base, cut);
    await truncate(cut, 150_000);
    await expect(Qcow2File.open(cut)).rejects.toMatchObject(corrupt);
    const raw = path.join(directory, 'raw');
    await writeFile(raw, Buffer.alloc(100_000));
    await expect(Qcow2File.open(raw)).rejects.toMatchObject(corrupt);
    await expect(Qcow2File.open(path.join(directory, 'none'))).rejects.toMatchObject({
      code: 'LAYER_NOT_FOUND',
    });
  });

  it.each([
    ['extended_l2=on', 'extended L2'],
    ['data_file=ext.raw', 'another file'],
    ['compression_type=zstd', 'compression'],
  ])('refuses an image made with %s', async (option, words) => {
    const image = path.join(directory, 'feature.qcow2');
    await tool('qemu-img', ['create', '-q', '-f', 'qcow2', '-o', option, image, '10M']);
    await expect(Qcow2File.open(image)).rejects.toMatchObject({
      code: 'LAYER_CORRUPT',
      message: expect.stringContaining(words) as string,
    });
  });
});

describe('parseQcow2Header on hostile bytes', () => {
  it('answers a sound header or LAYER_CORRUPT, never anything else', async () => {
    const good = (await readFile(top)).subarray(0, 65536);
    const changes = fc.array(
      fc.record({ at: fc.integer({ min: 0, max: 700 }), value: fc.integer({ min: 0, max: 255 }) }),
      { minLength: 1, maxLength: 6 },
    );
    fc.assert(
      fc.property(
        changes,
        fc.integer({ min: 0, max: 65536 }),
        fc.integer({ min: 0, max: 2 ** 40 }),
        (edits, length, fileBytes) => {
          const data = Buffer.from(good);
          for (const { at, value } of edits) data[at] = value;
          try {
            const header = parseQcow2Header(data.subarray(0, length), fileBytes, 'fuzz');
            expect(header.l1Offset + header.l1Entries * 8).toBeLessThanOrEqual(fileBytes);
            expect(header.l1Entries).toBeLessThanOrEqual(4 * 1024 * 1024);
          } catch (error) {
            expect(error).toBeInstanceOf(AppError);
            expect(error).toMatchObject({ code: 'LAYER_CORRUPT' });
          }
        },
      ),
      { numRuns: 3000 },
    );
  });

  it('reads a file whose tables were damaged without leaving it', async () => {
    const good = await readFile(top);
    const image = path.join(directory, 'fuzzed.qcow2');
    await fc.assert(
      fc.asyncProperty(
        fc.array(
          fc.record({
            at: fc.integer({ min: 0, max: good.length - 1 }),
            value: fc.integer({ min: 0, max: 255 }),
          }),
          {
            minLength: 1,
            maxLength: 12,
          },
        ),
        async (edits) => {
          const data = Buffer.from(good);
          for (const { at, value } of edits) data[at] = value;
          await writeFile(image, data);
          try {
            await using file = await Qcow2File.open(image);
            const { kinds, hostOffsets } = await file.window(0, Math.min(20_000, file.clusterCount));
            kinds.forEach((kind, i) => {
              if (kind === CLUSTER_DATA) expect(hostOffsets[i]).toBeLessThan(data.length);
            });
          } catch (error) {
            expect(error).toMatchObject({ code: 'LAYER_CORRUPT' });
          }
        },
      ),
      { numRuns: 60 },
    );
  });
});
