import { createCipheriv, createHash } from 'node:crypto';
import { createReadStream } from 'node:fs';
import { open, rm, stat, type FileHandle } from 'node:fs/promises';
import { pipeline } from 'node:stream/promises';
import { runTool } from '../../src/lib/process.js';
import { MIB } from '../../src/lib/units.js';

export type ImageFormat = 'raw' | 'qcow2';
const TOOL_TIMEOUT_MS = 120_000;
const CHUNK_BYTES = 4 * MIB;

/** A run of bytes of a disk with seeded incompressible content. */
export interface Region {
  offset: number;
  length: number;
  /** Default: the offset. */
  seed?: number;
}

/** Numbers that depend on the seed alone: mulberry32 (public domain, Tommy Ettinger). */
export class SeededRandom {
  #state: number;

  constructor(seed: number) {
    this.#state = seed >>> 0;
  }

  /** 0 ≤ x < 1 */
  next(): number {
    this.#state = (this.#state + 0x6d2b79f5) >>> 0;
    let t = this.#state;
    t = Math.imul(t ^ (t >>> 15), t | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  }

  /** An integer, low ≤ x < high. */
  between(low: number, high: number): number {
    return low + Math.floor(this.next() * (high - low));
  }

  pick<T>(items: readonly T[]): T {
    const item = items[this.between(0, items.length)];
    if (item === undefined) throw new RangeError('nothing to pick from');
    return item;
  }
}

/** Incompressible bytes that depend on the seed alone: an AES key stream, a gigabyte and more a second. */
export function seededBytes(seed: number, length: number): Buffer {
  const key = createHash('sha256').update(String(seed)).digest().subarray(0, 16);
  return createCipheriv('aes-128-ctr', key, Buffer.alloc(16)).update(Buffer.alloc(length));
}

/** Writes regions into a raw file that exists. */
export async function writeRegions(path: string, regions: readonly Region[]): Promise<void> {
  const file = await open(path, 'r+');
  try {
    for (const region of regions) await writeRegion(file, region);
  } finally {
    await file.close();
  }
}

async function writeRegion(file: FileHandle, region: Region): Promise<void> {
  const seed = region.seed ?? region.offset;
  for (let done = 0; done < region.length; done += CHUNK_BYTES) {
    const length = Math.min(CHUNK_BYTES, region.length - done);
    // Each chunk has its own stream, or every chunk of a region would hold the same bytes.
    await file.write(seededBytes(seed * 4099 + done / CHUNK_BYTES, length), 0, length, region.offset + done);
  }
}

/** A sparse raw file of exactly `sizeBytes`, with the given regions written. */
export async function makeRaw(options: {
  path: string;
  sizeBytes: number;
  regions?: readonly Region[];
}): Promise<void> {
  const file = await open(options.path, 'wx');
  try {
    await file.truncate(options.sizeBytes);
  } finally {
    await file.close();
  }
  await writeRegions(options.path, options.regions ?? []);
}

/** A QCOW2 file with the given regions written. The size must be whole sectors. */
export async function makeQcow2(options: {
  path: string;
  sizeBytes: number;
  regions?: readonly Region[];
  backing?: { path: string; format: ImageFormat };
}): Promise<void> {
  const { path, sizeBytes, backing } = options;
  const backingArgs = backing === undefined ? [] : ['-b', backing.path, '-F', backing.format];
  await qemuImg(['create', '-q', '-f', 'qcow2', ...backingArgs, path, String(sizeBytes)]);
  await writeRegionsToImage({ path, format: 'qcow2', regions: options.regions ?? [] });
}

/** Writes regions into the virtual disk of an image that nobody has open; persistent bitmaps record it. */
export async function writeRegionsToImage(options: {
  path: string;
  format: ImageFormat;
  regions: readonly Region[];
}): Promise<void> {
  for (const region of options.regions) {
    const content = `${options.path}.region`;
    await makeRaw({
      path: content,
      sizeBytes: region.length,
      regions: [{ ...region, offset: 0, seed: region.seed ?? region.offset }],
    });
    try {
      await qemuIo({ ...options, commands: [`write -s ${content} ${region.offset} ${region.length}`] });
    } finally {
      await rm(content, { force: true });
    }
  }
}

/**
 * Runs qemu-io commands (`write -P 0xAA 0 64k`, `write -z 1M 64k`, `discard 2M 1M`) on an image or on an
 * NBD URI (`format: 'raw'`). Fails when one of them fails.
 */
export async function qemuIo(options: {
  path: string;
  format: ImageFormat;
  commands: readonly string[];
}): Promise<void> {
  const BATCH = 500;
  for (let first = 0; first < options.commands.length; first += BATCH) {
    const batch = options.commands.slice(first, first + BATCH).flatMap((command) => ['-c', command]);
    await runTool('qemu-io', ['-f', options.format, '-d', 'unmap', ...batch, options.path], {
      timeoutMs: TOOL_TIMEOUT_MS,
    });
  }
}

export async function qemuImg(args: readonly string[]): Promise<string> {
  return (await runTool('qemu-img', args, { timeoutMs: TOOL_TIMEOUT_MS })).stdout;
}

/** Fails unless `qemu-img check` finds nothing at all. */
export async function expectCleanImage(path: string): Promise<void> {
  await qemuImg(['check', '-q', '-f', 'qcow2', path]);
}

/** Adds a persistent bitmap that records every later write to the image. */
export async function addBitmap(path: string, name: string): Promise<void> {
  await qemuImg(['bitmap', '--add', '-f', 'qcow2', path, name]);
}

/** The whole virtual disk, as guests see it, as a raw file. `from` is an image with its chain, or an NBD URI with `raw`. */
export async function exportRaw(from: string, format: ImageFormat, to: string): Promise<void> {
  await qemuImg(['convert', '-q', '-f', format, '-O', 'raw', from, to]);
}

/** SHA-256 (hex) of a file. */
export async function sha256File(path: string): Promise<string> {
  const hash = createHash('sha256');
  await pipeline(createReadStream(path, { highWaterMark: CHUNK_BYTES }), hash);
  return hash.digest('hex');
}

/** SHA-256 (hex) of a whole virtual disk, read by stock qemu-img. `scratch` is a path for the raw copy, removed again. */
export async function sha256Disk(from: string, format: ImageFormat, scratch: string): Promise<string> {
  try {
    await exportRaw(from, format, scratch);
    return await sha256File(scratch);
  } finally {
    await rm(scratch, { force: true });
  }
}

export type Difference = { kind: 'size'; left: number; right: number } | { kind: 'byte'; offset: number };

/** Where two files first differ, to the byte; null when they are the same, sizes too. */
export async function firstDifference(left: string, right: string): Promise<Difference | null> {
  const sizes = { left: (await stat(left)).size, right: (await stat(right)).size };
  if (sizes.left !== sizes.right) return { kind: 'size', ...sizes };
  const files = [await open(left, 'r'), await open(right, 'r')] as const;
  try {
    return await compareFrom(files, sizes.left);
  } finally {
    for (const file of files) await file.close();
  }
}

async function compareFrom(
  files: readonly [FileHandle, FileHandle],
  size: number,
): Promise<Difference | null> {
  const buffers = [Buffer.alloc(CHUNK_BYTES), Buffer.alloc(CHUNK_BYTES)] as const;
  for (let position = 0; position < size; position += CHUNK_BYTES) {
    const length = Math.min(CHUNK_BYTES, size - position);
    await Promise.all(
      files.map((file, index) => readWhole(file, buffers[index] ?? buffers[0], { position, length })),
    );
    const [a, b] = [buffers[0].subarray(0, length), buffers[1].subarray(0, length)];
    if (!a.equals(b)) return { kind: 'byte', offset: position + a.findIndex((byte, at) => byte !== b[at]) };
  }
  return null;
}

async function readWhole(
  file: FileHandle,
  buffer: Buffer,
  { position, length }: { position: number; length: number },
): Promise<void> {
  for (let done = 0; done < length;) {
    const { bytesRead } = await file.read(buffer, done, length - done, position + done);
    if (bytesRead === 0) throw new Error(`the file ended at ${position + done}`);
    done += bytesRead;
  }
}
