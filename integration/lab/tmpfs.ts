import { mkdir } from 'node:fs/promises';
import { isErrorCode } from '../../src/lib/errors.js';
import { pollUntil } from '../../src/lib/deadline.js';
import { runTool } from '../../src/lib/process.js';

const TIMEOUT_MS = 10_000;

export interface LabTmpfs extends AsyncDisposable {
  readonly path: string;
  remount(mode: 'ro' | 'rw', sizeBytes?: number): Promise<void>;
  /** Takes the filesystem away, as a lost mount would be; its content is gone. */
  unmount(): Promise<void>;
}

/** A small filesystem of its own at `path` (created), for full, read-only and vanished repositories. */
export async function mountTmpfs(options: { path: string; sizeBytes: number }): Promise<LabTmpfs> {
  const { path, sizeBytes } = options;
  await mkdir(path, { recursive: true });
  await runTool('mount', ['-t', 'tmpfs', '-o', `size=${sizeBytes},mode=0700`, 'holdfast-lab', path], {
    timeoutMs: TIMEOUT_MS,
  });
  let isMounted = true;
  const unmount = async (): Promise<void> => {
    if (!isMounted) return;
    isMounted = false;
    await unmountWhenFree(path);
  };
  return {
    path,
    remount: async (mode, newSizeBytes = sizeBytes) => {
      await runTool('mount', ['-o', `remount,${mode},size=${newSizeBytes}`, path], { timeoutMs: TIMEOUT_MS });
    },
    unmount,
    [Symbol.asyncDispose]: unmount,
  };
}

/** A process that is just ending may hold it a moment longer. What stays busy is detached, and is a failure. */
async function unmountWhenFree(path: string): Promise<void> {
  try {
    await pollUntil(
      async () => {
        try {
          await runTool('umount', [path], { timeoutMs: TIMEOUT_MS });
          return true;
        } catch (error) {
          if (isErrorCode(error, 'TOOL_FAILED')) return undefined;
          throw error;
        }
      },
      { timeoutMs: 5000, intervalMs: 50, what: `unmounting ${path}` },
    );
  } catch (error) {
    await runTool('umount', ['--lazy', path], { timeoutMs: TIMEOUT_MS });
    throw error;
  }
}
