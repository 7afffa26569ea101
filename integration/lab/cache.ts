import path from 'node:path';
import { fileURLToPath } from 'node:url';

/** What tests build once for a machine and may be deleted at any time; scripts/test keeps directories there. */
export const LAB_CACHE = fileURLToPath(new URL('../../.test-output/lab-cache', import.meta.url));

export function cachePath(...names: string[]): string {
  return path.join(LAB_CACHE, ...names);
}
