import { mkdtemp, rm, statfs } from 'node:fs/promises';
import os from 'node:os';
import path from 'node:path';
import { GIB } from '../../src/lib/units.js';

export interface LabDirectory extends AsyncDisposable {
  readonly path: string;
  /** A path in it. */
  file(...names: string[]): string;
}

const SHARED_MEMORY = '/dev/shm';

async function chooseParent(wantBytes: number): Promise<string> {
  const { bavail, bsize } = await statfs(SHARED_MEMORY);
  return bavail * bsize >= wantBytes ? SHARED_MEMORY : os.tmpdir();
}

/**
 * A fresh directory in shared memory where `wantBytes` (default 2 GiB) are free there, else in the
 * temporary directory. Disposal removes it with everything in it; call it last.
 */
export async function makeLabDirectory(options: { wantBytes?: number } = {}): Promise<LabDirectory> {
  const parent = await chooseParent(options.wantBytes ?? 2 * GIB);
  // Short: a Unix socket path has 107 bytes.
  const root = await mkdtemp(path.join(parent, 'hf-'));
  return {
    path: root,
    file: (...names) => path.join(root, ...names),
    [Symbol.asyncDispose]: () => rm(root, { recursive: true, force: true, maxRetries: 3 }),
  };
}
