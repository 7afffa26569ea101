import { constants } from 'node:fs';
import { open } from 'node:fs/promises';
import path from 'node:path';
import { blockDeviceBytes } from '../lib/block-device.js';
import { withDeadline } from '../lib/deadline.js';
import { AppError, errnoOf } from '../lib/errors.js';
import { alignDown, alignUp, SECTOR_BYTES } from '../lib/units.js';
import type { ExportDefinition } from '../exports/index.js';
import { hasQcow2Magic, HEADER_READ_BYTES, readQcow2Facts } from './qcow2-header.js';

/** How an image is opened: a node with everything under it, for `blockdev-add`. */
export type BlockNode = Record<string, unknown>;

export interface ExportImage {
  node: BlockNode;
  /** What a server of it offers: whole sectors. */
  sizeBytes: number;
}

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
 * layer above states it, nothing guessed. A read-only export opens all of them read-only. Rejects with NOT_FOUND,
 * SOURCE_FORMAT, SOURCE_SIZE_MISMATCH, CHAIN_BROKEN or TIMEOUT.
 */
export function readImage(definition: ExportDefinition): Promise<ExportImage> {
  return withDeadline(walkChain(definition), {
    timeoutMs: READ_TIMEOUT_MS,
    what: `reading the headers of ${definition.imagePath}`,
  });
}

async function walkChain(definition: ExportDefinition): Promise<ExportImage> {
  const nodes: BlockNode[] = [];
  let sizeBytes: number | undefined;
  let layer: Layer | null = { file: definition.imagePath, format: definition.format };
  while (layer !== null) {
    if (nodes.length === MAX_LAYERS) {
      throw new AppError('CHAIN_BROKEN', `the chain has more than ${MAX_LAYERS} layers, or goes in a circle`);
    }
    const { file, format }: Layer = layer;
    const facts = await readLayer(file, nodes.length === 0);
    const isReadOnly = definition.isReadOnly || nodes.length > 0;
    nodes.push(describeNode({ file, format, driver: facts.driver, isReadOnly }));
    if (format === 'raw') {
      if (nodes.length === 1) refuseContainer(definition, facts.start);
      sizeBytes ??= alignUp(facts.fileBytes, SECTOR_BYTES);
      layer = null;
    } else {
      const { virtualBytes, backing } = readQcow2Facts(facts.start, file);
      sizeBytes ??= alignDown(virtualBytes, SECTOR_BYTES);
      layer = backing === null ? null : resolveBacking(file, backing);
    }
  }
  checkSize(definition, sizeBytes ?? 0);
  const node = nodes.reduceRight((lower, upper) => ({ ...upper, backing: lower }));
  return { node, sizeBytes: sizeBytes ?? 0 };
}

function describeNode(options: {
  file: string;
  format: string;
  driver: LayerFacts['driver'];
  isReadOnly: boolean;
}): BlockNode {
  const { file, format, driver, isReadOnly } = options;
  const access = {
    'read-only': isReadOnly,
    'auto-read-only': false,
    ...(isReadOnly ? {} : { discard: 'unmap' }),
  };
  return {
    driver: format,
    ...access,
    file: { driver, filename: file, ...access },
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
    const errno = errnoOf(error) ?? 'unknown error';
    throw isTop
      ? new AppError('NOT_FOUND', `${file} cannot be opened: ${errno}`, { cause: error, details: { file } })
      : new AppError('CHAIN_BROKEN', `the backing file ${file} cannot be opened: ${errno}`, {
          cause: error,
          details: { file },
        });
  }
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
