import type { ExportIdentity } from '../exports/index.js';
import type { VolumeId } from '../lib/id.js';
import type { EngineContext } from './context.js';
import type { ExportSpec } from './export-publisher.js';
import { listDevices, requireAttached, verifyVolume } from './volume-device.js';
import { volumeLinkPath } from './volume-link.js';
import { requireUnusedByKernel } from './volume-use.js';
import { requireVolumeFree } from './volume-users.js';

/** There is one of a volume at a time: the name is unique. */
export function volumeExportName(id: VolumeId): string {
  return `migration-vol-${id.toLowerCase()}`;
}

/**
 * The export of an attached volume. Its device is checked now and, by `confirm`, once more when the row of the export
 * is there. Rejects with CONFLICT (not attached), VOLUME_GONE, VOLUME_MISMATCH, VOLUME_IN_USE.
 */
export async function volumeExportSpec(
  context: EngineContext,
  options: {
    volumeId: VolumeId;
    isReadOnly: boolean;
    identity: ExportIdentity | null;
    expiresAt: string | null;
  },
): Promise<ExportSpec> {
  const { volumeId, ...rest } = options;
  const check = async (): Promise<{ name: string; sizeBytes: number }> => {
    const volume = await requireAttached(context, volumeId);
    await requireVolumeFree(context, volumeId, { use: 'export', self: null });
    const device = await verifyVolume(context, volume, await listDevices(context));
    await requireUnusedByKernel(device);
    return { name: volume.name, sizeBytes: device.sizeBytes };
  };
  const { name, sizeBytes } = await check();
  return {
    kind: 'volume',
    pointId: null,
    diskId: null,
    runId: null,
    volumeId,
    layerId: null,
    name: volumeExportName(volumeId),
    imagePath: volumeLinkPath(context, volumeId),
    format: 'raw',
    sizeBytes,
    description: `volume ${name}`,
    overlay: null,
    confirm: async () => {
      await check();
    },
    ...rest,
  };
}
