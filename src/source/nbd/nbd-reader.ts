import { BASE_ALLOCATION, DIRTY_BITMAP_PREFIX } from '../../nbd/extents.js';
import { connectNbd, listMetaContexts, type TlsOptions } from '../../nbd/index.js';
import { parseNbdUri } from '../../nbd/uri.js';
import type { DiskReader } from '../disk-reader.js';
import type { NbdDiskSource } from '../source.js';

export interface NbdReaderOptions {
  connections: number;
  connectTimeoutMs: number;
  requestTimeoutMs: number;
}

/**
 * A disk behind any NBD URI. Its server belongs to somebody else: nothing is started or kept there. What
 * the export shows must not change during the run (a read-only or fleecing export); Holdfast cannot
 * check that from outside.
 */
export function openNbdReader(config: NbdDiskSource, options: NbdReaderOptions): DiskReader {
  const uri = parseNbdUri(config.uri);
  const tls: TlsOptions | undefined = config.tls;
  const connect = {
    uri: uri.text,
    ...(tls === undefined ? {} : { tls }),
    connectTimeoutMs: options.connectTimeoutMs,
    requestTimeoutMs: options.requestTimeoutMs,
  };
  return {
    consistency: 'crash',
    async probe({ signal }) {
      const contexts = await listMetaContexts(
        { ...connect, metaContexts: [DIRTY_BITMAP_PREFIX] },
        { signal },
      );
      await using handle = await connectNbd({ ...connect, metaContexts: [BASE_ALLOCATION] }, { signal });
      const bitmaps = contexts.filter((name) => name.startsWith(DIRTY_BITMAP_PREFIX));
      return {
        sizeBytes: handle.info.sizeBytes,
        lineage: uri.identity,
        recordKeeper: 'given',
        noRecordReason: null,
        records: bitmaps.map((name) => ({
          bitmap: name.slice(DIRTY_BITMAP_PREFIX.length),
          isInconsistent: false,
        })),
      };
    },
    open({ bitmap }) {
      const dirtyContext = bitmap === null ? null : `${DIRTY_BITMAP_PREFIX}${bitmap}`;
      return Promise.resolve({
        endpoint: {
          kind: 'nbd',
          uri: uri.text,
          ...(tls === undefined ? {} : { tls }),
          connections: options.connections,
          metaContexts: [BASE_ALLOCATION, ...(dirtyContext === null ? [] : [dirtyContext])],
        },
        dirtyContext,
        [Symbol.asyncDispose]: () => Promise.resolve(),
      });
    },
  };
}
