import { once } from 'node:events';
import { mkdtemp, rm } from 'node:fs/promises';
import net from 'node:net';
import os from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { openQemuGuest } from '../../src/source/qemu/guest-agent.js';

const signal = new AbortController().signal;
const options = { agentTimeoutMs: 300 };

interface Call {
  execute: string;
  arguments?: { id?: number };
}

let directory: string;
let socketPath: string;
let servers: net.Server[];

beforeEach(async () => {
  directory = await mkdtemp(path.join(os.tmpdir(), 'hf-'));
  socketPath = path.join(directory, 'agent.sock');
  servers = [];
});

afterEach(async () => {
  for (const server of servers) server.close();
  await rm(directory, { recursive: true });
});

/** An agent that answers each command with what `answer` makes of it; null: with nothing. */
async function startAgent(answer: (call: Call, connection: number) => string | null) {
  const seen: string[] = [];
  const sockets: net.Socket[] = [];
  const server = net.createServer((socket) => {
    const connection = sockets.push(socket);
    let text = '';
    socket.on('error', () => undefined);
    socket.on('data', (chunk) => {
      text += chunk.toString('latin1');
      const lines = text.split('\n');
      text = lines.pop()!;
      for (const line of lines) {
        const call = JSON.parse(line.replace('\u00ff', '')) as Call;
        seen.push(line.startsWith('\u00ff') ? `0xff ${call.execute}` : call.execute);
        const said = answer(call, connection);
        if (said !== null) socket.write(Buffer.from(said, 'latin1'));
      }
    });
  });
  servers.push(server);
  server.listen(socketPath);
  await once(server, 'listening');
  return { seen, sockets, stop: () => sockets.forEach((socket) => socket.destroy()) };
}

const sync = (call: Call) => `\u00ff{"return": ${call.arguments?.id ?? 0}}\n`;
const isSync = (call: Call) => call.execute === 'guest-sync-delimited';
const answers = (returns: Record<string, unknown>) => (call: Call) =>
  isSync(call) ? sync(call) : `${JSON.stringify({ return: returns[call.execute] })}\n`;

describe('a guest behind the socket of its agent', () => {
  it('is frozen and thawed over one connection, which is synchronized once', async () => {
    const agent = await startAgent(
      answers({ 'guest-ping': {}, 'guest-fsfreeze-freeze': 3, 'guest-fsfreeze-thaw': 2 }),
    );
    await using guest = openQemuGuest(socketPath, options);
    await guest.ping({ signal });
    expect(await guest.freeze({ timeoutMs: 1000, signal })).toBe(3);
    expect(await guest.thaw({ timeoutMs: 1000 })).toBe(2);
    expect(agent.seen).toEqual([
      '0xff guest-sync-delimited',
      'guest-ping',
      'guest-fsfreeze-freeze',
      'guest-fsfreeze-thaw',
    ]);
    expect(agent.sockets).toHaveLength(1);
    await guest[Symbol.asyncDispose]();
    if (!agent.sockets[0]!.destroyed) await once(agent.sockets[0]!, 'close');
  });

  it('believes nothing that was said to somebody else', async () => {
    await startAgent((call) => {
      if (!isSync(call)) return '{"return": 1}\n';
      return `{"return": 7}\nrubbish \u00ff{"return": 0}\n{"return": 9}\n${sync(call)}`;
    });
    await using guest = openQemuGuest(socketPath, options);
    expect(await guest.freeze({ timeoutMs: 1000, signal })).toBe(1);
  });

  it('hands on what the agent says against it, and can be asked again', async () => {
    const agent = await startAgent((call) => {
      if (isSync(call)) return sync(call);
      if (call.execute === 'guest-fsfreeze-thaw') return '{"return": 0}\n';
      return '{"error": {"class": "CommandNotFound", "desc": "disabled by somebody"}}\n';
    });
    await using guest = openQemuGuest(socketPath, options);
    await expect(guest.freeze({ timeoutMs: 1000, signal })).rejects.toMatchObject({
      code: 'SOURCE_REFUSED',
      message: 'guest-fsfreeze-freeze: disabled by somebody',
    });
    expect(await guest.thaw({ timeoutMs: 1000 })).toBe(0);
    expect(agent.sockets).toHaveLength(1);
  });

  it.each(['{"return": "many"}', '{"return": -1}', '{"neither": 1}', 'no json', '{"return": 1.5}'])(
    'refuses %s as a number of filesystems',
    async (said) => {
      await startAgent((call) => (isSync(call) ? sync(call) : `${said}\n`));
      await using guest = openQemuGuest(socketPath, options);
      await expect(guest.freeze({ timeoutMs: 1000, signal })).rejects.toMatchObject({
        code: 'SOURCE_REFUSED',
      });
    },
  );

  it('takes no endless answer', async () => {
    await startAgent((call) => (isSync(call) ? sync(call) : 'x'.repeat(3_000_000)));
    await using guest = openQemuGuest(socketPath, options);
    await expect(guest.freeze({ timeoutMs: 5000, signal })).rejects.toMatchObject({
      code: 'SOURCE_UNREACHABLE',
      message: expect.stringContaining('too much') as string,
    });
  });

  it('waits no longer for an agent that is silent than it is told', async () => {
    await startAgent(() => null);
    await using guest = openQemuGuest(socketPath, options);
    const started = performance.now();
    await expect(guest.ping({ signal })).rejects.toMatchObject({ code: 'TIMEOUT' });
    expect(performance.now() - started).toBeLessThan(options.agentTimeoutMs + 500);
  });

  it('does not take the late answer of a command it gave up for that of the next', async () => {
    const agent = await startAgent((call, connection) => {
      if (isSync(call)) return connection === 1 ? sync(call) : `{"return": 5}\n${sync(call)}`;
      return call.execute === 'guest-fsfreeze-thaw' ? '{"return": 2}\n' : null;
    });
    await using guest = openQemuGuest(socketPath, options);
    const control = new AbortController();
    const freezing = guest.freeze({ timeoutMs: 5000, signal: control.signal });
    setTimeout(() => control.abort(), 50);
    await expect(freezing).rejects.toMatchObject({ code: 'CANCELLED' });
    expect(await guest.thaw({ timeoutMs: 1000 })).toBe(2);
    expect(agent.sockets).toHaveLength(2);
  });

  it('says that there is no agent: no socket, nobody behind it, gone in between', async () => {
    const unreachable = { code: 'SOURCE_UNREACHABLE' };
    await using guest = openQemuGuest(socketPath, options);
    await expect(guest.ping({ signal })).rejects.toMatchObject(unreachable);
    const agent = await startAgent((call) => {
      if (!isSync(call)) agent.stop();
      return isSync(call) ? sync(call) : null;
    });
    await expect(guest.ping({ signal })).rejects.toMatchObject(unreachable);
  });
});
