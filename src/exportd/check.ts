import { toAppError } from '../lib/errors.js';
import type { ExportdConfig } from './config.js';
import { isSound } from './entry.js';
import { readImage } from './image.js';
import { planReload } from './plan.js';
import { scanDirectory } from './scan.js';

/**
 * What is wrong with the export files, one line each; none means that a daemon started now would try to serve
 * all of them. Reads the images' headers and opens none.
 */
export async function checkExports(config: ExportdConfig): Promise<{ files: number; problems: string[] }> {
  const { entries } = planReload(new Map(), await scanDirectory(config.exportsDirectory));
  const problems: string[] = [];
  for (const entry of entries.values()) {
    try {
      if (entry.error !== null) throw entry.error;
      if (isSound(entry)) await readImage(entry.definition, config.imageDirectories);
    } catch (error) {
      const { code, message } = toAppError(error);
      problems.push(`${entry.file}: ${code}: ${message}`);
    }
  }
  return { files: entries.size, problems };
}
