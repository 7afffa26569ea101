import { AppError } from '../lib/errors.js';
import { BASE_ALLOCATION, walkClusters } from '../nbd/extents.js';
import { connectNbd, type NbdHandle } from '../nbd/index.js';
import { parseNbdUri } from '../nbd/uri.js';
import { CLUSTER_BYTES, GIB } from '../lib/units.js';
import type { OpenTarget, Target, TargetOpenOptions, TargetSpec } from './target.js';

type NbdSpec = Extract<TargetSpec, { kind: 'nbd' }>;

export interface NbdTargetOptions {
  connections: number;
  connectTimeoutMs: number;
  requestTimeoutMs: number;
}

/**
 * A writable NBD export of somebody else's. Without `overwrite` it must say of all its content that it
 * is zero; then zeroes need not be written.
 */
export function openNbdTarget(spec: NbdSpec, options: NbdTargetOptions): Target {
  const uri = parseNbdUri(spec.uri);
  const tls = spec.tls === undefined ? {} : { tls: spec.tls };
  const look = async (request: TargetOpenOptions): Promise<boolean> => {
    await using handle = await connectNbd(
      { uri: uri.text, ...tls, metaContexts: [BASE_ALLOCATION], ...options },
      { signal: request.signal },
    );
    if (handle.info.isReadOnly) throw new AppError('TARGET_IO', 'the NBD export is read-only');
    if (handle.info.sizeBytes < request.sizeBytes) {
      throw new AppError(
        'TARGET_TOO_SMALL',
        `the NBD export has ${handle.info.sizeBytes} of ${request.sizeBytes} bytes`,
      );
    }
    const isZeroed = await readsAsZero(handle, request.sizeBytes);
    if (!isZeroed && !request.overwrite) {
      throw new AppError('TARGET_NOT_EMPTY', 'the NBD export does not say that it is empty');
    }
    return isZeroed;
  };
  return {
    identity: () => Promise.resolve(uri.identity),
    async check(request) {
      await look(request);
    },
    async open(request): Promise<OpenTarget> {
      const isZeroed = await look(request);
      return {
        sink: { kind: 'nbd', uri: uri.text, ...tls, connections: options.connections },
        isZeroed,
        complete: () => Promise.resolve(),
        [Symbol.asyncDispose]: () => Promise.resolve(),
      };
    },
  };
}

async function readsAsZero(handle: NbdHandle, sizeBytes: number): Promise<boolean> {
  if (!handle.info.metaContexts.includes(BASE_ALLOCATION)) return false;
  const stretches = walkClusters((offset, length) => handle.blockStatus(offset, length), {
    diskBytes: sizeBytes,
    clusterBytes: CLUSTER_BYTES,
    dirtyContext: null,
    grantedContexts: [BASE_ALLOCATION],
    windowBytes: 2 * GIB,
  });
  for await (const stretch of stretches) {
    if (stretch.isZero.includes(0)) return false;
  }
  return true;
}
