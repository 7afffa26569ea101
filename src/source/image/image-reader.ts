import path from 'node:path';
import { z } from 'zod';
import { AppError } from '../../lib/errors.js';
import { runTool, ToolError } from '../../lib/process.js';
import { BASE_ALLOCATION, DIRTY_BITMAP_PREFIX } from '../../nbd/extents.js';
import { rawImageBytes, serveLocked } from '../../nbd/locked-image.js';
import type { ServerPlace } from '../../nbd/qemu-nbd.js';
import type { DiskReader } from '../disk-reader.js';
import type { ChangeRecord, ImageDiskSource } from '../source.js';

export interface ImageReaderOptions extends ServerPlace {
  connections: number;
}

const INFO_TIMEOUT_MS = 30_000;

const bitmapSchema = z.object({ name: z.string(), flags: z.array(z.string()) });
const infoSchema = z.object({
  'virtual-size': z.number().int().nonnegative(),
  'backing-filename': z.string().optional(),
  'backing-filename-format': z.string().optional(),
  'format-specific': z.object({ data: z.object({ bitmaps: z.array(bitmapSchema).optional() }) }).optional(),
});

/**
 * A local image file or block device, read through a private read-only `qemu-nbd` with the stated
 * format. A running guest's disk is kept out by qemu's image lock: it would be copied in motion.
 */
export function openImageReader(config: ImageDiskSource, options: ImageReaderOptions): DiskReader {
  if (!path.isAbsolute(config.path) || config.path.includes('\u0000')) {
    throw new AppError('INVALID_INPUT', 'the path of an image source must be absolute', {
      details: { field: 'source.path' },
    });
  }
  return {
    consistency: 'offline',
    async probe({ signal }) {
      const lineage = `image:${path.normalize(config.path)}`;
      const rawBytes = await rawImageBytes(config.path);
      const common = { lineage, recordKeeper: 'given', noRecordReason: null } as const;
      if (config.format === 'raw') return { ...common, sizeBytes: rawBytes, records: [] };
      const info = await readInfo(config, signal);
      return { ...common, sizeBytes: info['virtual-size'], records: records(info) };
    },
    async open({ bitmap, signal }) {
      const { path: file, format } = config;
      const server = await serveLocked({ ...options, path: file, format, bitmap, signal });
      const dirtyContext = bitmap === null ? null : `${DIRTY_BITMAP_PREFIX}${bitmap}`;
      return {
        endpoint: {
          kind: 'nbd',
          uri: server.uri,
          connections: options.connections,
          metaContexts: [BASE_ALLOCATION, ...(dirtyContext === null ? [] : [dirtyContext])],
        },
        dirtyContext,
        [Symbol.asyncDispose]: () => server.stop(),
      };
    },
  };
}

type ImageInfo = z.infer<typeof infoSchema>;

async function readInfo(config: ImageDiskSource, signal: AbortSignal): Promise<ImageInfo> {
  const { stdout } = await runTool(
    'qemu-img',
    ['info', '-f', config.format, '--output=json', '--', config.path],
    {
      timeoutMs: INFO_TIMEOUT_MS,
      signal,
    },
  ).catch(explainLock);
  const info = infoSchema.parse(JSON.parse(stdout));
  if (info['backing-filename'] !== undefined && info['backing-filename-format'] === undefined) {
    throw new AppError('SOURCE_FORMAT', `${config.path} has a backing file without a stated format`, {
      details: { backingFile: info['backing-filename'] },
    });
  }
  return info;
}

function records(info: ImageInfo): ChangeRecord[] {
  const bitmaps = info['format-specific']?.data.bitmaps ?? [];
  return bitmaps.map(({ name, flags }) => ({ bitmap: name, isInconsistent: flags.includes('in-use') }));
}

/** qemu's own words stay in the details. Its lock message is the one text that is looked at: no exit code tells it apart. */
function explainLock(error: unknown): never {
  if (error instanceof ToolError && error.stderrTail.includes('lock')) {
    throw new AppError('SOURCE_BUSY', 'the image is in use by another process', {
      cause: error,
      details: error.details,
    });
  }
  if (error instanceof ToolError) {
    throw new AppError('SOURCE_FORMAT', error.message, { cause: error, details: error.details });
  }
  throw error;
}
