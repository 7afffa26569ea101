import { open } from 'node:fs/promises';
import { AppError } from '../lib/errors.js';
import { runTool } from '../lib/process.js';

const FLOCK_TIMEOUT_MS = 10_000;
const EXIT_LOCKED = 1;

/**
 * Takes a directory for this process (flock(2)); CONFLICT while another has it. The lock belongs to the open
 * directory, which the tool shares with us: it is free again when we end, however that happens, or on disposal.
 */
export async function lockDirectory(directory: string, what: string): Promise<AsyncDisposable> {
  const handle = await open(directory, 'r');
  try {
    const { exitCode } = await runTool('flock', ['--exclusive', '--nonblock', '0'], {
      timeoutMs: FLOCK_TIMEOUT_MS,
      stdinFd: handle.fd,
      acceptExitCodes: [0, EXIT_LOCKED],
    });
    if (exitCode === EXIT_LOCKED) {
      throw new AppError('CONFLICT', `another holdfast-exportd has the ${what} ${directory}`, {
        details: { directory },
      });
    }
  } catch (error) {
    await handle.close();
    throw error;
  }
  return { [Symbol.asyncDispose]: () => handle.close() };
}
