import { CLUSTER_BYTES } from '../lib/units.js';
import { planWindow } from '../nbd/capture-plan.js';
import { walkClusters } from '../nbd/extents.js';
import { connectNbd } from '../nbd/index.js';
import type { OpenDisk } from './disk-reader.js';

const WINDOW_BYTES = 1024 * 1024 * 1024;
/** Only sizes the plan's rows; nothing is hashed. */
const HASH_BYTES = 16;

/**
 * Bytes a run would read from an open disk, by its block status: what is dirty, or without a bitmap what
 * the server does not know to be zero.
 */
export async function measureDisk(
  disk: Pick<OpenDisk, 'endpoint' | 'dirtyContext'>,
  options: { sizeBytes: number; connectTimeoutMs: number; requestTimeoutMs: number; signal: AbortSignal },
): Promise<number> {
  const { endpoint, dirtyContext } = disk;
  const { signal } = options;
  await using handle = await connectNbd(
    {
      uri: endpoint.uri,
      metaContexts: endpoint.metaContexts ?? [],
      ...(endpoint.tls === undefined ? {} : { tls: endpoint.tls }),
      connectTimeoutMs: options.connectTimeoutMs,
      requestTimeoutMs: options.requestTimeoutMs,
    },
    { signal },
  );
  let bytes = 0;
  const maps = walkClusters((offset, length) => handle.blockStatus(offset, length), {
    diskBytes: options.sizeBytes,
    clusterBytes: CLUSTER_BYTES,
    dirtyContext,
    grantedContexts: handle.info.metaContexts,
    windowBytes: WINDOW_BYTES,
  });
  for await (const map of maps) {
    const method = dirtyContext === null ? 'full' : 'bitmap';
    bytes += planWindow(method, map, { clusterBytes: CLUSTER_BYTES, hashBytes: HASH_BYTES }).plannedBytes;
  }
  return bytes;
}
