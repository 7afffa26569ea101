import { chmod, lstat } from 'node:fs/promises';
import { AppError, errnoOf } from '../lib/errors.js';
import { isListening } from '../lib/unix-socket.js';

/** The owner and the group, where the directory lets them in. */
const SOCKET_MODE = 0o660;

/**
 * QEMU removes whatever is in the way of a socket it makes: also a file that is none, or the socket of a
 * server that lives. CONFLICT for both.
 */
export async function prepareSocket(socketPath: string): Promise<void> {
  try {
    const facts = await lstat(socketPath);
    if (!facts.isSocket()) {
      throw new AppError('CONFLICT', `${socketPath} is there and is no socket`, {
        details: { path: socketPath },
      });
    }
  } catch (error) {
    if (errnoOf(error) === 'ENOENT') return;
    throw error;
  }
  if (!(await isListening(socketPath))) return;
  throw new AppError('CONFLICT', `another server listens on ${socketPath}`, {
    details: { path: socketPath },
  });
}

export async function shareSocket(socketPath: string): Promise<void> {
  await chmod(socketPath, SOCKET_MODE);
}
