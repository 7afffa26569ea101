import { once } from 'node:events';
import { chmod, lstat } from 'node:fs/promises';
import net from 'node:net';
import { withDeadline } from '../lib/deadline.js';
import { AppError, errnoOf } from '../lib/errors.js';

const CONNECT_TIMEOUT_MS = 2000;
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
  if (!(await isAnswered(socketPath))) return;
  throw new AppError('CONFLICT', `another server listens on ${socketPath}`, {
    details: { path: socketPath },
  });
}

export async function shareSocket(socketPath: string): Promise<void> {
  await chmod(socketPath, SOCKET_MODE);
}

async function isAnswered(socketPath: string): Promise<boolean> {
  const socket = net.connect(socketPath);
  try {
    await withDeadline(once(socket, 'connect'), {
      timeoutMs: CONNECT_TIMEOUT_MS,
      what: `connecting to ${socketPath}`,
    });
    return true;
  } catch (error) {
    if (errnoOf(error) === 'ECONNREFUSED' || errnoOf(error) === 'ENOENT') return false;
    throw error;
  } finally {
    socket.destroy();
  }
}
