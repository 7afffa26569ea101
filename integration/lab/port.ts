import { once } from 'node:events';
import net from 'node:net';

/** A port of loopback that nobody has at this moment. */
export async function freePort(): Promise<number> {
  const server = net.createServer().listen(0, '127.0.0.1');
  await once(server, 'listening');
  const { port } = server.address() as net.AddressInfo;
  server.close();
  await once(server, 'close');
  return port;
}

/** Whether a server on a port of loopback greets with this. False while nobody listens. */
export async function greetsWith(port: number, greeting: string): Promise<boolean> {
  const socket = net.connect(port, '127.0.0.1');
  try {
    const [chunk] = (await once(socket, 'data')) as [Buffer];
    return chunk.toString('latin1').startsWith(greeting);
  } catch {
    // Not listening yet: the caller's deadline decides.
    return false;
  } finally {
    socket.destroy();
  }
}
