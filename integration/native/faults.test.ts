import { once } from 'node:events';
import net from 'node:net';
import { setTimeout as delay } from 'node:timers/promises';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { connectNbd, listExports, type CopySession } from '../../native/lib/index.js';
import { pollUntil } from '../../src/lib/deadline.js';
import { makeQcow2, makeRaw } from '../lab/disk-image.js';
import { makeLabDirectory, type LabDirectory } from '../lab/directory.js';
import { startNbdkit, startQemuNbd, type LabNbdServer } from '../lab/nbd-server.js';
import { connectTo, copyRow, elapsedMs, nbd, nbdErrorOf, openSession, windowOf } from './fixtures.js';

const MIB = 1024 * 1024;
let lab: LabDirectory;
let count = 0;

beforeAll(async () => {
  lab = await makeLabDirectory();
});
afterAll(async () => {
  await lab[Symbol.asyncDispose]();
});

/** A TCP server that accepts and then does what it is told. */
async function startTcp(onClient: (socket: net.Socket) => void): Promise<{ port: number } & AsyncDisposable> {
  const clients = new Set<net.Socket>();
  const server = net.createServer((socket) => {
    clients.add(socket);
    socket.on('error', () => clients.delete(socket));
    onClient(socket);
  });
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  return {
    port: (server.address() as net.AddressInfo).port,
    [Symbol.asyncDispose]: async () => {
      for (const client of clients) client.destroy();
      server.close();
      await once(server, 'close');
    },
  };
}

describe('connecting', () => {
  test('nobody listens: refused at once', async () => {
    const error = await nbdErrorOf(connectTo('nbd://127.0.0.1:1/x'));
    expect(error).toMatchObject({ code: 'NBD_CONNECT', errno: 111 });
    expect((await nbdErrorOf(connectTo(`nbd+unix:///?socket=${lab.file('none.sock')}`))).code).toBe(
      'NBD_CONNECT',
    );
  });

  test('a server that accepts and says nothing ends with NBD_STALLED at the deadline', async () => {
    await using server = await startTcp(() => undefined);
    const uri = `nbd://localhost:${server.port}/x`;
    let code = '';
    const took = await elapsedMs(async () => {
      code = (await nbdErrorOf(connectTo(uri, { connectTimeoutMs: 700 }))).code;
    });
    expect(code).toBe('NBD_STALLED');
    expect(took).toBeGreaterThanOrEqual(690);
    expect(took).toBeLessThan(2000);
    const listing = await nbdErrorOf(listExports({ uri, connectTimeoutMs: 300, requestTimeoutMs: 300 }));
    expect(listing.code).toBe('NBD_STALLED');
  });

  test('an abort ends a connect that gets no answer', async () => {
    await using server = await startTcp(() => undefined);
    const abort = new AbortController();
    const connecting = connectTo(`nbd://127.0.0.1:${server.port}/`, { connectTimeoutMs: 60_000 });
    await using late = await startTcp(() => undefined);
    const aborted = connectNbd(
      { uri: `nbd://127.0.0.1:${late.port}/`, connectTimeoutMs: 60_000, requestTimeoutMs: 1000 },
      { signal: abort.signal },
    );
    const took = await elapsedMs(async () => {
      abort.abort();
      expect((await nbdErrorOf(aborted)).code).toBe('CANCELLED');
    });
    expect(took).toBeLessThan(1000);
    await server[Symbol.asyncDispose]();
    expect((await nbdErrorOf(connecting)).code).toBe('NBD_CONNECT');
  });

  test('something that is no NBD server', async () => {
    await using server = await startTcp((socket) =>
      socket.write('SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n'.repeat(20)),
    );
    const error = await nbdErrorOf(connectTo(`nbd://127.0.0.1:${server.port}/`));
    expect(error.code).toBe('NBD_CONNECT');
  });

  test('a name that does not resolve', async () => {
    const error = await nbdErrorOf(connectTo('nbd://does-not-exist.invalid/'));
    expect(error.code).toBe('NBD_CONNECT');
    expect(error.message).toContain('resolved');
  });

  test.each([
    ['no host', 'nbd://'],
    ['another scheme', 'http://host/'],
    ['no URI', 'not a uri'],
    ['a port that is none', 'nbd://host:99999/'],
    ['no socket', 'nbd+unix:///'],
    ['an empty socket', 'nbd+unix:///?socket='],
    ['a NUL in percents', 'nbd+unix:///?socket=/a%00b'],
    ['a NUL', 'nbd://host/\0'],
    ['a key file', 'nbds://host/?tls-psk-file=/etc/shadow'],
    ['certificates', 'nbds+unix:///?socket=/x&tls-certificates=/etc'],
    ['a million characters', `nbd://${'x'.repeat(1_000_000)}/`],
    ['a socket path that no address holds', `nbd+unix:///?socket=/${'x'.repeat(200)}`],
  ])('a URI with %s is NBD_URI_INVALID', async (_what, uri) => {
    const error = await nbdErrorOf(connectTo(uri));
    expect(error.code).toBe('NBD_URI_INVALID');
    expect(error.message.length).toBeLessThan(300);
  });
});

describe('a server that dies, freezes or errs under a handle', () => {
  async function slowServer(): Promise<LabNbdServer> {
    return startNbdkit({
      socketPath: lab.file(`f${count++}.sock`),
      plugin: ['memory', 'size=64M'],
      filters: ['delay'],
      parameters: ['rdelay=30'],
    });
  }

  test('killed during a read: NBD_PROTOCOL, and later calls the same', async () => {
    await using server = await slowServer();
    await using handle = await connectTo(server.uri, { requestTimeoutMs: 20_000 });
    const reading = nbdErrorOf(handle.pread(0, 4096));
    await server.kill();
    expect((await reading).code).toBe('NBD_PROTOCOL');
    expect((await nbdErrorOf(handle.pread(0, 512))).code).toBe('NBD_PROTOCOL');
  });

  test('no answer within the deadline: NBD_STALLED', async () => {
    await using server = await slowServer();
    await using handle = await connectTo(server.uri, { requestTimeoutMs: 400 });
    const took = await elapsedMs(async () => {
      expect((await nbdErrorOf(handle.pread(0, 4096))).code).toBe('NBD_STALLED');
    });
    expect(took).toBeLessThan(1500);
    expect((await nbdErrorOf(handle.flush())).code).toBe('NBD_STALLED');
    await server.kill();
  });

  test('closing does not wait for a frozen server', async () => {
    await using server = await slowServer();
    const handle = await connectTo(server.uri, { requestTimeoutMs: 60_000 });
    server.freeze();
    const reading = nbdErrorOf(handle.pread(0, 4096));
    expect(await elapsedMs(() => handle.close())).toBeLessThan(1200);
    expect((await reading).code).toBe('NBD_CLOSED');
    server.thaw();
    await server.kill();
  });

  test('an answered error leaves the connection alive', async () => {
    await using server = await startNbdkit({
      socketPath: lab.file(`f${count++}.sock`),
      plugin: ['memory', 'size=1M'],
      filters: ['error'],
      parameters: ['error-pread=EIO', 'error-pread-rate=1'],
    });
    await using handle = await connectTo(server.uri);
    expect(await nbdErrorOf(handle.pread(4096, 512))).toMatchObject({
      code: 'NBD_REQUEST',
      errno: 5,
      details: { offset: 4096 },
    });
    await handle.pwrite(0, Buffer.from('alive'));
    await handle.flush();
  });
});

describe('a copy whose server fails', () => {
  const sizeBytes = 256 * MIB;

  interface Running {
    session: CopySession;
    source: LabNbdServer;
    sink: LabNbdServer;
  }

  /** Runs `body` in the middle of a copy that lasts some seconds. */
  async function duringCopy(
    options: { stallTimeoutMs: number; signal?: AbortSignal },
    body: (running: Running, copy: Promise<unknown>) => Promise<void>,
  ): Promise<void> {
    const base = lab.file(`c${count++}`);
    await makeRaw({ path: `${base}.raw`, sizeBytes, regions: [{ offset: 0, length: 128 * MIB }] });
    await makeQcow2({ path: `${base}.qcow2`, sizeBytes });
    await using source = await startQemuNbd({
      image: `${base}.raw`,
      format: 'raw',
      socketPath: `${base}s.sock`,
      isReadOnly: true,
    });
    await using sink = await startQemuNbd({
      image: `${base}.qcow2`,
      format: 'qcow2',
      socketPath: `${base}d.sock`,
    });
    const { signal, stallTimeoutMs } = options;
    await using session = await openSession(
      {
        source: { ...nbd(source.uri), metaContexts: ['base:allocation'] },
        sink: nbd(sink.uri),
        diskBytes: sizeBytes,
        stallTimeoutMs,
        rateLimitBytesPerSecond: 32 * MIB,
      },
      signal === undefined ? {} : { signal },
    );
    const copy = session.submit(windowOf([copyRow(0, sizeBytes)]));
    copy.catch(() => undefined); // looked at by the body
    await pollUntil(() => (session.progress().bytesWritten > 4 * MIB ? true : undefined), {
      timeoutMs: 10_000,
      what: 'the copy getting under way',
    });
    await body({ session, source, sink }, copy);
    source.thaw();
    sink.thaw();
  }

  test.each(['source', 'sink'] as const)('%s killed: NBD_PROTOCOL', async (who) => {
    await duringCopy({ stallTimeoutMs: 10_000 }, async (running, copy) => {
      await running[who].kill();
      expect((await nbdErrorOf(copy)).code).toBe('NBD_PROTOCOL');
      expect((await nbdErrorOf(running.session.flush())).code).toBe('NBD_PROTOCOL');
    });
  });

  test.each(['source', 'sink'] as const)('%s frozen: NBD_STALLED within the time', async (who) => {
    await duringCopy({ stallTimeoutMs: 1500 }, async (running, copy) => {
      running[who].freeze();
      const took = await elapsedMs(async () => {
        const error = await nbdErrorOf(copy);
        expect(error.code).toBe('NBD_STALLED');
        expect(error.message).toContain(who);
      });
      expect(took).toBeLessThan(4000);
      expect(await elapsedMs(() => running.session.close())).toBeLessThan(1500);
    });
  });

  test('cancel ends a stalled copy, its status and its flush within two seconds', async () => {
    await duringCopy({ stallTimeoutMs: 60_000 }, async ({ session, source, sink }, copy) => {
      source.freeze();
      sink.freeze();
      await delay(200);
      const status = nbdErrorOf(session.blockStatus(0, MIB));
      const took = await elapsedMs(async () => {
        session.cancel();
        expect((await nbdErrorOf(copy)).code).toBe('CANCELLED');
        expect((await status).code).toBe('CANCELLED');
        expect((await nbdErrorOf(session.flush())).code).toBe('CANCELLED');
        await session.close();
      });
      expect(took).toBeLessThan(2000);
    });
  });

  test('an abort of the signal is a cancel', async () => {
    const abort = new AbortController();
    await duringCopy({ stallTimeoutMs: 60_000, signal: abort.signal }, async ({ source }, copy) => {
      source.freeze();
      const took = await elapsedMs(async () => {
        abort.abort();
        expect((await nbdErrorOf(copy)).code).toBe('CANCELLED');
      });
      expect(took).toBeLessThan(2000);
    });
  });

  test('closing with work under way rejects it and does not wait for the servers', async () => {
    await duringCopy({ stallTimeoutMs: 60_000 }, async ({ session, source, sink }, copy) => {
      source.freeze();
      sink.freeze();
      expect(await elapsedMs(() => session.close())).toBeLessThan(1500);
      expect((await nbdErrorOf(copy)).code).toBe('NBD_CLOSED');
      expect((await nbdErrorOf(session.submit(windowOf([])))).code).toBe('NBD_CLOSED');
      await session.close();
    });
  });

  test('a server with one place for clients is copied from over one connection', async () => {
    const base = lab.file(`c${count++}`);
    await makeRaw({ path: `${base}.raw`, sizeBytes: 8 * MIB, regions: [{ offset: 0, length: MIB }] });
    await using source = await startQemuNbd({
      image: `${base}.raw`,
      format: 'raw',
      socketPath: `${base}s.sock`,
      shared: 1,
    });
    await using session = await openSession({
      source: { ...nbd(source.uri, 4), metaContexts: ['base:allocation'] },
      sink: { kind: 'null' },
      diskBytes: 8 * MIB,
    });
    const [result, status] = await Promise.all([
      session.submit(windowOf([copyRow(0, 8 * MIB)])),
      session.blockStatus(0, 8 * MIB),
    ]);
    expect(result.bytesRead).toBe(8 * MIB);
    expect(Object.keys(status)).toEqual(['base:allocation']);
    expect(session.progress().sourceConnections).toBe(1);
  });

  test('more connections than the server has places for: the copy goes on with those it gets', async () => {
    const base = lab.file(`c${count++}`);
    await makeRaw({ path: `${base}.raw`, sizeBytes: 64 * MIB, regions: [{ offset: 0, length: MIB }] });
    await using source = await startQemuNbd({
      image: `${base}.raw`,
      format: 'raw',
      socketPath: `${base}s.sock`,
      isReadOnly: true,
      shared: 2,
    });
    await using session = await openSession({
      source: nbd(source.uri, 6),
      sink: { kind: 'null' },
      diskBytes: 64 * MIB,
      connectTimeoutMs: 1000,
    });
    expect((await session.submit(windowOf([copyRow(0, 64 * MIB)]))).bytesRead).toBe(64 * MIB);
    expect(session.progress().sourceConnections).toBeLessThanOrEqual(2);
    expect(await elapsedMs(() => session.close())).toBeLessThan(2000);
  });

  test('errors at one percent fail the copy with the offset, never pass as success', async () => {
    await using source = await startNbdkit({
      socketPath: lab.file(`c${count++}.sock`),
      plugin: ['pattern', `size=${sizeBytes}`],
      filters: ['error'],
      parameters: ['error-pread=EIO', 'error-pread-rate=1%'],
    });
    await using session = await openSession({
      source: nbd(source.uri, 1),
      sink: { kind: 'null' },
      diskBytes: sizeBytes,
      requestBytes: 65_536,
    });
    const error = await nbdErrorOf(session.submit(windowOf([copyRow(0, sizeBytes)])));
    expect(error).toMatchObject({ code: 'NBD_REQUEST', op: 'pread', errno: 5 });
    expect(error.details.offset).toBeGreaterThanOrEqual(0);
  });
});
