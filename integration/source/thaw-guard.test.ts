import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, readFileSync } from 'node:fs';
import { writeFile } from 'node:fs/promises';
import net from 'node:net';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import { pollUntil } from '../../src/lib/deadline.js';
import { processStartTime } from '../../src/lib/process.js';
import { armGuard, sendCommand } from '../../src/source/thaw-guard.js';
import { makeLabDirectory, type LabDirectory } from '../lab/directory.js';
import { findLeftovers } from '../lab/leftovers.js';

let lab: LabDirectory;
let mark: string;
let count = 0;

beforeAll(async () => {
  lab = await makeLabDirectory();
});
afterAll(() => lab[Symbol.asyncDispose]());

beforeEach(() => {
  mark = lab.file(`undone-${(count += 1)}`);
});
afterEach(async () => {
  expect(await findLeftovers(lab.path)).toEqual([]);
});

const undoing = (timeoutMs = 3000) =>
  pollUntil(() => (existsSync(mark) ? true : undefined), { timeoutMs, what: 'the undoing' });
const ending = (pid: number) =>
  pollUntil(async () => ((await processStartTime(pid)) === undefined ? true : undefined), {
    timeoutMs: 3000,
    what: 'the end of the guard',
  });
const sleep = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));

describe('the guard', () => {
  it('ends at once when disarmed, and undoes nothing', async () => {
    const guard = await armGuard({ undo: ['touch', mark], limitMs: 60_000 });
    const started = performance.now();
    await guard.disarm();
    expect(performance.now() - started).toBeLessThan(1000);
    await ending(guard.pid);
    expect(existsSync(mark)).toBe(false);
  });

  it('undoes at its limit, not before, and can be disarmed afterwards', async () => {
    const guard = await armGuard({ undo: ['touch', mark], limitMs: 600 });
    await sleep(300);
    expect(existsSync(mark)).toBe(false);
    await undoing();
    await guard.disarm();
    await ending(guard.pid);
  });

  it('minds no SIGINT and SIGHUP, as a terminal sends them, and undoes on SIGTERM', async () => {
    const guard = await armGuard({ undo: ['touch', mark], limitMs: 60_000 });
    process.kill(guard.pid, 'SIGINT');
    process.kill(guard.pid, 'SIGHUP');
    await sleep(200);
    expect(existsSync(mark)).toBe(false);
    process.kill(guard.pid, 'SIGTERM');
    await undoing();
    await ending(guard.pid);
  });

  it('tries until it succeeds', async () => {
    const script = `[ -e ${mark}.second ] && touch ${mark}; touch ${mark}.second; [ -e ${mark} ]`;
    const guard = await armGuard({ undo: ['sh', '-c', script], limitMs: 50 });
    await undoing();
    await ending(guard.pid);
  });

  it('leads a session of its own', async () => {
    const guard = await armGuard({ undo: ['true'], limitMs: 60_000 });
    const fields = readFileSync(`/proc/${guard.pid}/stat`, 'utf8').split(') ')[1]!.split(' ');
    // Process group and session.
    expect(fields.slice(2, 4)).toEqual([String(guard.pid), String(guard.pid)]);
    await guard.disarm();
  });

  it('undoes when whoever armed it is killed', async () => {
    const script = lab.file('armer.mts');
    const guardFile = new URL('../../src/source/thaw-guard.ts', import.meta.url).pathname;
    await writeFile(
      script,
      `import { armGuard } from ${JSON.stringify(guardFile)};
       const guard = await armGuard({ undo: ['touch', ${JSON.stringify(mark)}], limitMs: 60_000 });
       process.stdout.write(String(guard.pid) + '\\n');`,
    );
    const root = new URL('../..', import.meta.url).pathname;
    const child = spawn(process.execPath, ['--import', 'tsx', script], {
      cwd: root,
      stdio: ['ignore', 'pipe', 'inherit'],
    });
    const [text] = (await once(child.stdout, 'data')) as [Buffer];
    const ended = once(child, 'exit');
    expect(existsSync(mark)).toBe(false);
    child.kill('SIGKILL');
    await ended;
    await undoing();
    await ending(Number(text.toString()));
  });
});

describe('sending to a socket', () => {
  /** A server that says `hello` and answers each line in turn with the next of `answers`. */
  async function serve(hello: string, answers: string[]) {
    const socketPath = lab.file(`s${(count += 1)}.sock`);
    const received: string[] = [];
    const server = net.createServer((socket) => {
      socket.on('error', () => undefined);
      socket.write(hello);
      socket.on('data', (chunk) => {
        for (const line of chunk.toString('latin1').split('\n').slice(0, -1)) {
          received.push(line);
          socket.write(Buffer.from(answers.shift() ?? '', 'latin1'));
        }
      });
    });
    server.listen(socketPath);
    await once(server, 'listening');
    return { socketPath, received, close: () => server.close() };
  }

  async function run([tool, ...args]: string[]): Promise<number> {
    const child = spawn(tool!, args, { stdio: 'ignore' });
    const [code] = (await once(child, 'exit')) as [number];
    return code;
  }

  it('ends well when each line was answered, whatever else is said', async () => {
    const server = await serve('{"QMP": {}}\n', [
      '{"return": {}}\n',
      '{"event": "RESUME"}\n{"return": {}}\n',
    ]);
    const lines = ['{"execute":"qmp_capabilities"}\n', '{"execute":"cont"}\n'];
    expect(await run(sendCommand(server.socketPath, lines))).toBe(0);
    expect(server.received).toEqual(lines.map((line) => line.trimEnd()));
    server.close();
  });

  it('counts only what comes after the delimiter of an agent', async () => {
    const server = await serve('{"return": 1}\n{"return": 2}\n', [
      '\u00ff{"return": 7}\n',
      '{"return": 2}\n',
    ]);
    const lines = ['\u00ff{"execute":"guest-sync-delimited"}\n', '{"execute":"guest-fsfreeze-thaw"}\n'];
    expect(await run(sendCommand(server.socketPath, lines))).toBe(0);
    expect(server.received).toHaveLength(2);
    server.close();
  });

  it('ends badly on a refusal, and where nobody listens', async () => {
    const server = await serve('', ['{"error": {"desc": "no"}}\n']);
    expect(await run(sendCommand(server.socketPath, ['{}\n']))).toBe(1);
    server.close();
    expect(await run(sendCommand(lab.file('none.sock'), ['{}\n']))).toBe(1);
  });
});
