import { AppError } from '../lib/errors.js';
import { BASE_ALLOCATION, DIRTY_BITMAP_PREFIX } from '../nbd/extents.js';
import { connectNbd } from '../nbd/index.js';
import { rawImageBytes, serveLocked } from '../nbd/locked-image.js';
import { parseNbdUri } from '../nbd/uri.js';
import { LIMITS } from './limits.js';

/** Where a disk is read. */
export type SourceSpec =
  | { kind: 'nbd'; uri: string }
  | {
      kind: 'image';
      /** Absolute: a file or a block device. */
      path: string;
      format: 'raw' | 'qcow2';
      /** Persistent bitmap of a QCOW2 image to read; null for none. */
      bitmap: string | null;
    };

export interface SourceControl {
  /** Of private sockets; only its owner may enter it. */
  runtimeDirectory: string;
  /** Connections that will come. */
  connections: number;
  signal: AbortSignal;
}

/** A disk that can be read, and stays as it is until disposal as far as this host can see to that. */
export interface CaptureSource extends AsyncDisposable {
  readonly uri: string;
  /** Exact. */
  readonly sizeBytes: number;
  /** The dirty bitmaps it offers, by name. */
  readonly bitmaps: readonly string[];
  /** SNAPSHOT_LOST when somebody may have written to the disk since it was opened. */
  requireUnchanged(): void;
}

/**
 * Looks at the disk, and keeps writers away from an image for as long as it is open. The server behind an NBD URI
 * belongs to somebody else: what it shows must not change.
 */
export async function openCaptureSource(spec: SourceSpec, control: SourceControl): Promise<CaptureSource> {
  return spec.kind === 'nbd' ? openNbd(spec.uri, control) : openImage(spec, control);
}

async function openNbd(given: string, { signal }: SourceControl): Promise<CaptureSource> {
  const uri = parseNbdUri(given).text;
  return {
    uri,
    ...(await look(uri, signal)),
    requireUnchanged: () => undefined,
    [Symbol.asyncDispose]: () => Promise.resolve(),
  };
}

async function openImage(
  spec: Extract<SourceSpec, { kind: 'image' }>,
  control: SourceControl,
): Promise<CaptureSource> {
  const server = await serveLocked({ ...spec, ...control, owner: 'capture' });
  try {
    const seen = await look(server.uri, control.signal);
    const sizeBytes = spec.format === 'raw' ? await rawImageBytes(spec.path) : seen.sizeBytes;
    return {
      uri: server.uri,
      sizeBytes,
      bitmaps: seen.bitmaps,
      requireUnchanged: () => {
        if (server.server.hasExited) {
          throw new AppError(
            'SNAPSHOT_LOST',
            `the private qemu-nbd that kept writers from ${spec.path} ended`,
          );
        }
      },
      [Symbol.asyncDispose]: () => server.stop(),
    };
  } catch (error) {
    await server.stop();
    throw error;
  }
}

async function look(uri: string, signal: AbortSignal): Promise<{ sizeBytes: number; bitmaps: string[] }> {
  const metaContexts = [BASE_ALLOCATION, DIRTY_BITMAP_PREFIX];
  await using handle = await connectNbd({ uri, metaContexts, ...LIMITS }, { signal });
  const bitmaps = handle.info.metaContexts.filter((name) => name.startsWith(DIRTY_BITMAP_PREFIX));
  return {
    sizeBytes: handle.info.sizeBytes,
    bitmaps: bitmaps.map((name) => name.slice(DIRTY_BITMAP_PREFIX.length)),
  };
}
