import { corruptSums } from './sums-format.js';
import { SumsReader } from './sums-reader.js';
import type { ChainLayer } from './types.js';

/** The sums of a layer whose digest, layer and size are what the manifest says. The caller closes it. */
export async function openVerifiedSums(
  layer: ChainLayer,
  signal: AbortSignal | undefined,
): Promise<SumsReader> {
  const sums = await SumsReader.open(layer.sumsPath);
  try {
    if (sums.header.layerId !== layer.layerId || sums.header.diskBytes !== layer.sizeBytes) {
      throw corruptSums(layer.sumsPath, 'it belongs to another layer', { layerId: layer.layerId });
    }
    if ((await sums.digest(signal)) !== layer.sumsSha256) {
      throw corruptSums(layer.sumsPath, 'its digest is not the one in the manifest', {
        layerId: layer.layerId,
      });
    }
    return sums;
  } catch (error) {
    await sums.close();
    throw error;
  }
}
