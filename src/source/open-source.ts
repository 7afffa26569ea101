import type { DiskId } from '../lib/id.js';
import type { ServerPlace } from '../nbd/qemu-nbd.js';
import { openImageSource } from './image/image-source.js';
import { openNbdSource } from './nbd/nbd-source.js';
import type { DiskSource, Source } from './source.js';

export interface SourceLimits {
  connections: number;
  connectTimeoutMs: number;
  requestTimeoutMs: number;
}

/** The source of one disk by its kind. Rejects what is malformed; touches nothing yet. */
export function openSource(
  config: DiskSource,
  options: { diskId: DiskId; place: ServerPlace; limits: SourceLimits },
): Source {
  switch (config.kind) {
    case 'nbd':
      return openNbdSource(config, { diskId: options.diskId, ...options.limits });
    case 'image':
      return openImageSource(config, {
        diskId: options.diskId,
        connections: options.limits.connections,
        ...options.place,
      });
  }
}
