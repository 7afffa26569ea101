import type { Repository } from './repository.js';
import type { PointManifest, VmRecord } from './types.js';

export interface ScannedVm {
  vm: VmRecord;
  /** By sequence. */
  points: PointManifest[];
}

/**
 * Walks the repository VM by VM, for rebuilding an index. Every record and manifest is verified; the
 * first that cannot be read ends the walk with its error, since an index of a part would look whole.
 */
export async function* scanRepository(repository: Repository): AsyncGenerator<ScannedVm> {
  for (const vmId of await repository.listVmIds()) {
    yield { vm: await repository.readVm(vmId), points: await repository.listPoints(vmId) };
  }
}
