import { TEMPORARY_PREFIX } from './backend.js';
import type { CheckFinding } from './check-report.js';
import type { RepositoryContext } from './context.js';
import { PARTIAL_PREFIX, diskDirectory, layerName, layersDirectory, sumsName } from './layout.js';
import type { StoredManifest } from './manifest.js';
import type { VmId } from '../src/lib/id.js';

/** Files in the VM's layer folders that no readable manifest names. Warnings: garbage, not damage. */
export async function findGarbage(
  context: RepositoryContext,
  vmId: VmId,
  stored: readonly StoredManifest[],
): Promise<CheckFinding[]> {
  const referenced = new Set<string>();
  for (const { manifest } of stored) {
    for (const { diskId, layerId } of manifest.disks) {
      referenced.add(`${diskDirectory(vmId, diskId)}/${layerName(layerId)}`);
      referenced.add(`${diskDirectory(vmId, diskId)}/${sumsName(layerId)}`);
    }
  }
  const findings: CheckFinding[] = [];
  for (const disk of (await context.backend.list(layersDirectory(vmId))) ?? []) {
    if (disk.kind !== 'directory') continue;
    const directory = `${layersDirectory(vmId)}/${disk.name}`;
    for (const { name } of (await context.backend.list(directory)) ?? []) {
      const file = `${directory}/${name}`;
      if (referenced.has(file)) continue;
      const isLeftover = name.startsWith(PARTIAL_PREFIX) || name.startsWith(TEMPORARY_PREFIX);
      findings.push({
        code: isLeftover ? 'LEFTOVER' : 'UNREFERENCED',
        severity: 'warning',
        message: isLeftover
          ? 'a file of a run that is under way or did not end'
          : 'a file that no readable recovery point names',
        vmId,
        file,
      });
    }
  }
  return findings;
}
