import { mkdir, mkdtemp, readdir, rename, rm } from 'node:fs/promises';
import path from 'node:path';
import { runTool } from '../../src/lib/process.js';
import { cachePath } from './cache.js';
import { pathExists } from './server.js';

const TOOL_TIMEOUT_MS = 60_000;

/**
 * Programs of Debian's packages, unpacked and not installed: installing them would start a service. Answers the
 * directory `name` in the cache that they are in; the packages are downloaded once.
 */
export async function unpackDebian(name: string, packages: readonly string[]): Promise<string> {
  const target = cachePath(name);
  if (await pathExists(target)) return target;
  await mkdir(cachePath(), { recursive: true });
  const work = await mkdtemp(cachePath(`${name}-`));
  const options = { timeoutMs: TOOL_TIMEOUT_MS, cwd: work };
  try {
    await runTool('apt-get', ['download', '-qq', ...packages], options);
    for (const file of (await readdir(work)).filter((it) => it.endsWith('.deb'))) {
      await runTool('dpkg', ['-x', file, 'tree'], options);
    }
    await rename(path.join(work, 'tree'), target);
  } finally {
    await rm(work, { recursive: true, force: true });
  }
  return target;
}
