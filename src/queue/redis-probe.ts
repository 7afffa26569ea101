import net from 'node:net';

const PROBE_TIMEOUT_MS = 1000;

export type ProbeAnswer =
  /** Accepts commands. */
  | 'ready'
  /** Somebody listens, but does not answer with PONG: loading its data, hanging, or no Redis. */
  | 'busy'
  /** Nobody listens. */
  | 'absent';

/** Asks whoever listens on the socket for a PONG, within a second. Never rejects. */
export function probeRedis(socketPath: string): Promise<ProbeAnswer> {
  return new Promise((resolve) => {
    const socket = net.connect(socketPath);
    let isConnected = false;
    let answer = '';
    const settle = (result: ProbeAnswer): void => {
      socket.destroy();
      resolve(result);
    };
    socket.setTimeout(PROBE_TIMEOUT_MS, () => {
      settle('busy');
    });
    socket.on('connect', () => {
      isConnected = true;
      socket.write('PING\r\n');
    });
    socket.on('data', (chunk: Buffer) => {
      answer += chunk.toString('latin1');
      if (answer.includes('\n')) settle(answer.startsWith('+PONG') ? 'ready' : 'busy');
    });
    // A socket file that nobody listens on refuses; one that is not there does not exist.
    socket.on('error', () => {
      settle(isConnected ? 'busy' : 'absent');
    });
    socket.on('close', () => {
      settle(isConnected ? 'busy' : 'absent');
    });
  });
}
