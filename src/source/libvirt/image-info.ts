import path from 'node:path';
import { z } from 'zod';
import { AppError } from '../../lib/errors.js';
import { runTool, ToolError } from '../../lib/process.js';

const bitmapSchema = z.object({ name: z.string(), flags: z.array(z.string()) });
const infoSchema = z.object({
  'virtual-size': z.number().int().nonnegative(),
  encrypted: z.boolean().optional(),
  'backing-filename': z.string().optional(),
  'full-backing-filename': z.string().optional(),
  'backing-filename-format': z.string().optional(),
  'format-specific': z
    .object({ data: z.object({ compat: z.string().optional(), bitmaps: z.array(bitmapSchema).optional() }) })
    .optional(),
});

/** What the header of a QCOW2 image of this host says. */
export interface ImageInfo {
  sizeBytes: number;
  /** Version 2 of the format (compat 0.10) has no bitmaps. */
  canHaveBitmaps: boolean;
  isEncrypted: boolean;
  bitmaps: { name: string; isInconsistent: boolean }[];
  backing: { path: string; format: string | null } | null;
}

interface Control {
  timeoutMs: number;
  signal: AbortSignal;
}

/** Longer chains are a loop or a mistake; libvirt's own limit is 200. */
const MAX_CHAIN = 200;

/**
 * Reads the header only, also of an image that somebody has open (the bitmaps in it are then marked in-use).
 * Null when this host has no such image or it cannot be read.
 */
export async function readImageInfo(image: string, control: Control): Promise<ImageInfo | null> {
  let stdout: string;
  try {
    const args = ['info', '--force-share', '-f', 'qcow2', '--output=json', '--', image];
    ({ stdout } = await runTool('qemu-img', args, control));
  } catch (error) {
    if (error instanceof ToolError) return null;
    throw error;
  }
  const info = infoSchema.parse(JSON.parse(stdout));
  const facts = info['format-specific']?.data;
  const backing = info['full-backing-filename'] ?? info['backing-filename'];
  return {
    sizeBytes: info['virtual-size'],
    canHaveBitmaps: facts?.compat !== '0.10',
    isEncrypted: info.encrypted === true,
    bitmaps: (facts?.bitmaps ?? []).map(({ name, flags }) => ({
      name,
      isInconsistent: flags.includes('in-use') || !flags.includes('auto'),
    })),
    backing:
      backing === undefined ? null : { path: backing, format: info['backing-filename-format'] ?? null },
  };
}

/**
 * Rejects with SOURCE_FORMAT unless every image of the chain states the format of the next and all are QCOW2
 * or raw files of this host without encryption; SOURCE_UNREACHABLE when one cannot be read.
 */
export async function checkImageChain(top: string, control: Control): Promise<void> {
  let image = top;
  for (let depth = 0; depth < MAX_CHAIN; depth += 1) {
    const info = await readImageInfo(image, control);
    if (info === null) {
      throw new AppError('SOURCE_UNREACHABLE', `the image ${image} cannot be read`, { details: { image } });
    }
    if (info.isEncrypted) throw unusable(image, 'is encrypted: it can be read while the machine runs');
    const { backing } = info;
    if (backing === null) return;
    if (backing.format === null) throw unusable(image, 'has a backing file without a stated format');
    if (!path.isAbsolute(backing.path)) throw unusable(image, 'has a backing file that is no local path');
    if (backing.format === 'raw') return;
    if (backing.format !== 'qcow2') throw unusable(image, `has a backing file of format ${backing.format}`);
    image = backing.path;
  }
  throw unusable(top, `stands on more than ${MAX_CHAIN} images`);
}

function unusable(image: string, why: string): AppError {
  return new AppError('SOURCE_FORMAT', `the image ${image} ${why}`, { details: { image } });
}
