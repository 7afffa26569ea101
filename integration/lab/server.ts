import { once } from 'node:events';
import { access } from 'node:fs/promises';
import net from 'node:net';
import { errnoOf } from '../../src/lib/errors.js';
import { startServer, type ChildServer } from '../../src/lib/process.js';

export const READY_TIMEOUT_MS = 20_000;

/** A real server of a test, with the faults a test can do to it. */
export interface LabServer extends ChildServer {
  /** SIGKILL, and waits until it is gone. */
  kill(): Promise<void>;
  /** SIGSTOP: it accepts and answers nothing more. */
  freeze(): void;
  thaw(): void;
}

export async function startLabServer(
  tool: string,
  args: readonly string[],
  options: { isReady: () => Promise<boolean>; stopTimeoutMs?: number; cwd?: string },
): Promise<LabServer> {
  const child = await startServer(tool, args, {
    owner: 'lab',
    readyTimeoutMs: READY_TIMEOUT_MS,
    ...options,
  });
  const signalChild = (signal: NodeJS.Signals): void => {
    if (!child.hasExited) process.kill(child.pid, signal);
  };
  return {
    pid: child.pid,
    exited: child.exited,
    get hasExited() {
      return child.hasExited;
    },
    stop: () => child.stop(),
    [Symbol.asyncDispose]: () => child.stop(),
    kill: async () => {
      signalChild('SIGKILL');
      await child.exited;
    },
    freeze: () => {
      signalChild('SIGSTOP');
    },
    thaw: () => {
      signalChild('SIGCONT');
    },
  };
}

export async function pathExists(file: string): Promise<boolean> {
  try {
    await access(file);
    return true;
  } catch (error) {
    if (errnoOf(error) === 'ENOENT') return false;
    throw error;
  }
}

/** Connects, sends `hello`, and answers whether the first bytes back match. False while nobody listens. */
export async function answersOnSocket(socketPath: string, hello: string, reply: RegExp): Promise<boolean> {
  const socket = net.connect(socketPath);
  try {
    socket.setTimeout(1000, () => socket.destroy(new Error('no answer within a second')));
    await once(socket, 'connect');
    if (hello !== '') socket.write(hello);
    const [chunk] = (await once(socket, 'data')) as [Buffer];
    return reply.test(chunk.toString('latin1'));
  } catch {
    // Not listening yet, or not answering yet: the caller's deadline decides.
    return false;
  } finally {
    socket.destroy();
  }
}
