import { mkdtemp, rm } from 'node:fs/promises';
import { once } from 'node:events';
import net from 'node:net';
import os from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { connectQmp, isQemuGone, type QmpClient } from '../../src/lib/qmp.js';

const GREETING = '{"QMP": {"version": {}, "capabilities": []}}\n';

let directory: string;
let server: net.Server;
let socket: string;
const clients = new Set<net.Socket>();
const received: { execute: string; id: number }[] = [];

/** A monitor that greets and then does with each command what the test says. */
async function serve(
  onCommand: (command: { execute: string; id: number }, client: net.Socket) => void,
  greeting: string | Buffer = GREETING,
): Promise<void> {
  server = net.createServer((client) => {
    clients.add(client);
    client.on('error', () => undefined);
    client.write(greeting);
    client.on('data', (data) => {
      for (const line of data.toString().trim().split('\n')) {
        const command = JSON.parse(line) as { execute: string; id: number };
        received.push(command);
        if (command.execute === 'qmp_capabilities') answer(client, command.id, {});
        else onCommand(command, client);
      }
    });
  });
  server.listen(socket);
  await once(server, 'listening');
}

function answer(client: net.Socket, id: number, value: unknown): void {
  client.write(`${JSON.stringify({ return: value, id })}\n`);
}

const connect = (signal?: AbortSignal): Promise<QmpClient> => connectQmp(socket, { timeoutMs: 300, signal });

beforeEach(async () => {
  directory = await mkdtemp(path.join(os.tmpdir(), 'hf-qmp-'));
  socket = path.join(directory, 's');
  received.length = 0;
});
afterEach(async () => {
  for (const client of clients) client.destroy();
  clients.clear();
  server.close();
  await rm(directory, { recursive: true, force: true });
});

test('answers go to their commands whatever order they come in, events go nowhere', async () => {
  const waiting: number[] = [];
  await serve(({ id }, client) => {
    waiting.push(id);
    if (waiting.length < 3) return;
    client.write('{"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 2}}\r\n');
    for (const one of [...waiting].reverse()) answer(client, one, `answer ${one}`);
  });
  await using qmp = await connect();
  const answers = await Promise.all(['a', 'b', 'c'].map((command) => qmp.execute(command)));
  expect(answers).toEqual(waiting.map((id) => `answer ${id}`));
  expect(received.map(({ execute }) => execute)).toEqual(['qmp_capabilities', 'a', 'b', 'c']);
});

test("QEMU's refusal has its class and words", async () => {
  await serve(({ id }, client) => {
    client.write(`{"error": {"class": "DeviceNotFound", "desc": "no such thing"}, "id": ${id}}\n`);
  });
  await using qmp = await connect();
  await expect(qmp.execute('blockdev-del')).rejects.toMatchObject({
    code: 'SOURCE_REFUSED',
    errorClass: 'DeviceNotFound',
    description: 'no such thing',
    details: { command: 'blockdev-del' },
  });
});

test('a command without an answer ends at its deadline, and its late answer harms nobody', async () => {
  await serve(({ execute, id }, client) => {
    if (execute === 'slow') setTimeout(() => answer(client, id, 'late'), 400);
    else setTimeout(() => answer(client, id, 'fast'), 200);
  });
  await using qmp = await connect();
  await expect(qmp.execute('slow')).rejects.toMatchObject({ code: 'SOURCE_UNREACHABLE' });
  expect(await qmp.execute('other')).toBe('fast');
});

test('the end of the connection ends every command', async () => {
  await serve((_, client) => client.destroy());
  await using qmp = await connect();
  const results = await Promise.allSettled([qmp.execute('a'), qmp.execute('b')]);
  expect(results.map((result) => (result as PromiseRejectedResult).reason as unknown)).toMatchObject([
    { code: 'SOURCE_UNREACHABLE' },
    { code: 'SOURCE_UNREACHABLE' },
  ]);
  await expect(qmp.execute('c')).rejects.toMatchObject({ code: 'SOURCE_UNREACHABLE' });
});

test('a monitor that does not greet is busy', async () => {
  await serve(() => undefined, '');
  await expect(connect()).rejects.toMatchObject({ code: 'SOURCE_BUSY' });
});

test('what is no monitor is refused', async () => {
  await serve(() => undefined, "QEMU 7.2.22 monitor - type 'help' for more information\n");
  await expect(connect()).rejects.toMatchObject({ code: 'SOURCE_REFUSED' });
});

test('a line without an end is refused before it fills the memory', async () => {
  await serve(() => undefined, Buffer.alloc(17 * 1024 * 1024, 0x20));
  await expect(connectQmp(socket, { timeoutMs: 5000 })).rejects.toMatchObject({ code: 'SOURCE_REFUSED' });
});

test('a socket that nobody listens on: QEMU is gone', async () => {
  server = net.createServer();
  const error: unknown = await connect().catch((reason: unknown) => reason);
  expect(error).toMatchObject({ code: 'SOURCE_UNREACHABLE', retryable: true });
  expect(isQemuGone(error)).toBe(true);
});

test('an abort ends what is waited for, but not what must not be interrupted', async () => {
  await serve(({ id }, client) => {
    setTimeout(() => answer(client, id, 'done'), 100);
  });
  const abort = new AbortController();
  await using qmp = await connect(abort.signal);
  const uninterrupted = qmp.uninterrupted(() => Promise.all([qmp.execute('stop'), qmp.execute('cont')]));
  abort.abort();
  expect(await uninterrupted).toEqual(['done', 'done']);
  await expect(qmp.execute('next')).rejects.toMatchObject({ code: 'CANCELLED' });
  await expect(qmp.uninterrupted(() => Promise.resolve())).rejects.toMatchObject({ code: 'CANCELLED' });
});
