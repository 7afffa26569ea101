import { constants } from 'node:fs';
import { open, realpath } from 'node:fs/promises';
import path from 'node:path';
import { blockDeviceBytes } from '../lib/block-device.js';
import { withDeadline } from '../lib/deadline.js';
import { AppError, errnoOf } from '../lib/errors.js';
import { hasQcow2Magic, parseQcow2Start, QCOW2_EXTERNAL_DATA } from '../lib/qcow2.js';
import { alignDown, alignUp, SECTOR_BYTES } from '../lib/units.js';
import type { ExportDefinition } from '../exports/index.js';

/** How an image is opened: a node with everything under it, for `blockdev-add`. */
export type BlockNode = Record<string, unknown>;

export interface ExportImage {
  node: BlockNode;
  /** What a server of it offers: whole sectors. */
  sizeBytes: number;
  /** It has no backing file. */
  isStandalone: boolean;
}

/** A backing file's name ends in the first cluster, of up to 2 MiB, and QEMU writes it near the start. */
const HEADER_READ_BYTES = 64 * 1024;
/** No chain of ours is longer, and a circle ends. */
const MAX_LAYERS = 500;
/** Of dead storage: QEMU is not asked to open what we could not read, or it would stand still for all clients. */
const READ_TIMEOUT_MS = 10_000;

interface Layer {
  file: string;
  format: string;
}

interface LayerFacts {
  driver: 'file' | 'host_device';
  fileBytes: number;
  start: Buffer;
}

/**
 * Looks at an export's image and all it stands on, and says how to open it: every layer with its format as the
 * layer above states it, nothing guessed. A read-only export opens all of them read-only. All must lie in one of
 * `allowed`, where that is not null: whoever writes an image could name any file in its header. Rejects with
 * NOT_FOUND, EXPORT_REFUSED, SOURCE_FORMAT, SOURCE_SIZE_MISMATCH, CHAIN_BROKEN or TIMEOUT.
 */
export function readImage(
  definition: ExportDefinition,
  allowed: readonly string[] | null,
): Promise<ExportImage> {
  return withDeadline(walkChain(definition, allowed), {
    timeoutMs: READ_TIMEOUT_MS,
    what: `reading the headers of ${definition.imagePath}`,
  });
}

async function walkChain(
  definition: ExportDefinition,
  allowed: readonly string[] | null,
): Promise<ExportImage> {
  const nodes: BlockNode[] = [];
  let sizeBytes: number | undefined;
  let layer: Layer | null = { file: definition.imagePath, format: definition.format };
  while (layer !== null) {
    if (nodes.length === MAX_LAYERS) {
      throw new AppError('CHAIN_BROKEN', `the chain has more than ${MAX_LAYERS} layers, or goes in a circle`);
    }
    const { file, format }: Layer = layer;
    const isTop = nodes.length === 0;
    const filename = allowed === null ? file : await resolveAllowed(file, { allowed, isTop });
    const facts = await readLayer(filename, isTop);
    const isReadOnly = definition.isReadOnly || !isTop;
    nodes.push(describeNode({ filename, format, driver: facts.driver, isReadOnly }));
    if (format === 'raw') {
      if (nodes.length === 1) refuseContainer(definition, facts.start);
      sizeBytes ??= alignUp(facts.fileBytes, SECTOR_BYTES);
      layer = null;
    } else {
      const { virtualBytes, backing } = readContainer(facts.start, file);
      sizeBytes ??= alignDown(virtualBytes, SECTOR_BYTES);
      layer = backing === null ? null : resolveBacking(file, backing);
    }
  }
  checkSize(definition, sizeBytes ?? 0);
  const node = nodes.reduceRight((lower, upper) => ({ ...upper, backing: lower }));
  return { node, sizeBytes: sizeBytes ?? 0, isStandalone: nodes.length === 1 };
}

function describeNode(options: {
  filename: string;
  format: string;
  driver: LayerFacts['driver'];
  isReadOnly: boolean;
}): BlockNode {
  const { filename, format, driver, isReadOnly } = options;
  const access = {
    'read-only': isReadOnly,
    'auto-read-only': false,
    ...(isReadOnly ? {} : { discard: 'unmap' }),
  };
  return {
    driver: format,
    ...access,
    file: { driver, filename, ...access },
    ...(format === 'qcow2' ? { backing: null } : {}),
  };
}

/** The start of a layer. Only files and block devices: opening anything else could wait, or do something. */
async function readLayer(file: string, isTop: boolean): Promise<LayerFacts> {
  const handle = await openLayer(file, isTop);
  try {
    const facts = await handle.stat();
    if (!facts.isFile() && !facts.isBlockDevice()) {
      throw new AppError('SOURCE_FORMAT', `${file} is neither a file nor a block device`, {
        details: { file },
      });
    }
    const start = Buffer.alloc(HEADER_READ_BYTES);
    const { bytesRead } = await handle.read(start, 0, start.length, 0);
    return {
      driver: facts.isBlockDevice() ? 'host_device' : 'file',
      fileBytes: facts.isBlockDevice() ? await blockDeviceBytes(file) : facts.size,
      start: start.subarray(0, bytesRead),
    };
  } finally {
    await handle.close();
  }
}

async function openLayer(file: string, isTop: boolean): ReturnType<typeof open> {
  try {
    return await open(file, constants.O_RDONLY | constants.O_NONBLOCK);
  } catch (error) {
    throw unopened(file, isTop, error);
  }
}

/** The file without links: what was looked at here is what QEMU opens. EXPORT_REFUSED when it lies elsewhere. */
async function resolveAllowed(
  file: string,
  { allowed, isTop }: { allowed: readonly string[]; isTop: boolean },
): Promise<string> {
  let real: string;
  try {
    real = await realpath(file);
  } catch (error) {
    throw unopened(file, isTop, error);
  }
  for (const directory of allowed) {
    // One that is not there has nothing in it.
    const realDirectory = await realpath(directory).catch(() => undefined);
    if (realDirectory === undefined) continue;
    if (real === realDirectory || real.startsWith(path.join(realDirectory, '/'))) return real;
  }
  throw new AppError('EXPORT_REFUSED', `${file} lies in none of imageDirectories`, {
    details: { file, real },
  });
}

function unopened(file: string, isTop: boolean, cause: unknown): AppError {
  const problem = `${file} cannot be opened: ${errnoOf(cause) ?? 'unknown error'}`;
  return isTop
    ? new AppError('NOT_FOUND', problem, { cause, details: { file } })
    : new AppError('CHAIN_BROKEN', `the backing file ${problem}`, { cause, details: { file } });
}

/** CHAIN_BROKEN when it names a backing file without a format, or another file for its data: nothing is opened by a guess. */
function readContainer(start: Buffer, file: string): { virtualBytes: number; backing: Layer | null } {
  const broken = (problem: string): AppError =>
    new AppError('CHAIN_BROKEN', `${file} ${problem}`, { details: { file } });
  const { virtualBytes, incompatible, backingFile, backingFormat } = parseQcow2Start(
    start,
    (problem) =>
      new AppError('SOURCE_FORMAT', `${file} cannot be read as qcow2: ${problem}`, { details: { file } }),
  );
  if ((incompatible & QCOW2_EXTERNAL_DATA) !== 0n) throw broken('keeps its data in another file');
  if (backingFile === null) return { virtualBytes, backing: null };
  if (backingFormat === null) throw broken('does not state the format of its backing file');
  return { virtualBytes, backing: { file: backingFile, format: backingFormat } };
}

/** A relative name is beside the file that has it, as QEMU sees it. */
function resolveBacking(file: string, backing: Layer): Layer {
  const broken = (problem: string): AppError =>
    new AppError('CHAIN_BROKEN', `the backing file of ${file} ${problem}`, { details: { file } });
  if (/^[^/]*:/.test(backing.file)) throw broken('is not named by a path');
  if (backing.format !== 'qcow2' && backing.format !== 'raw') {
    throw broken(`has the format ${backing.format.slice(0, 40)}; only qcow2 and raw are served`);
  }
  return { file: path.resolve(path.dirname(file), backing.file), format: backing.format };
}

/** Served as raw, the first write of a client would destroy the container. */
function refuseContainer({ imagePath }: ExportDefinition, start: Buffer): void {
  if (!hasQcow2Magic(start)) return;
  throw new AppError('SOURCE_FORMAT', `${imagePath} is a qcow2 file, and its export says raw`, {
    details: { file: imagePath },
  });
}

function checkSize({ sizeBytes: stated }: ExportDefinition, actual: number): void {
  if (stated === null || alignUp(stated, SECTOR_BYTES) === actual) return;
  throw new AppError('SOURCE_SIZE_MISMATCH', `the disk has ${actual} bytes, and the export says ${stated}`, {
    details: { statedBytes: stated, actualBytes: actual },
  });
}
