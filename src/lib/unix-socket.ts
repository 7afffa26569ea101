import { once } from 'node:events';
import net from 'node:net';
import { withDeadline } from './deadline.js';
import { errnoOf } from './errors.js';

const CONNECT_TIMEOUT_MS = 2000;

/** True when somebody listens on the Unix socket: a file that is left over, or none, has nobody. */
export async function isListening(socketPath: string): Promise<boolean> {
  const socket = net.connect(socketPath);
  try {
    await withDeadline(once(socket, 'connect'), {
      timeoutMs: CONNECT_TIMEOUT_MS,
      what: `connecting to ${socketPath}`,
    });
    return true;
  } catch (error) {
    if (errnoOf(error) === 'ENOENT' || errnoOf(error) === 'ECONNREFUSED') return false;
    throw error;
  } finally {
    socket.destroy();
  }
}
