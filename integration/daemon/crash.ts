import { spawn, type ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import { readFile } from 'node:fs/promises';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { expect } from 'vitest';
import type { RunStage, RunView } from '../../src/engine/types.js';
import { pollUntil, withDeadline } from '../../src/lib/deadline.js';
import { errnoOf } from '../../src/lib/errors.js';
import { isSameProcess, processStartTime } from '../../src/lib/process.js';
import { findDescendants } from '../lab/leftovers.js';
import { startDaemon, type Settings, type Setup } from './daemon.js';
import { expectNothingLeft, expectReadsBack, listPoints, type Rig } from './rig.js';

const ROOT = path.resolve(path.dirname(fileURLToPath(import.meta.url)), '../..');
const GONE_TIMEOUT_MS = 5000;

/** SIGKILL of the daemon; its children must die with it. */
export async function killDaemon(rig: Rig): Promise<void> {
  const children = await describe(await findDescendants(rig.daemon.pid));
  await rig.daemon.kill();
  await pollUntil(async () => ((await anyAlive(children)) ? undefined : true), {
    timeoutMs: GONE_TIMEOUT_MS,
    what: `the end of the daemon's children ${children.map(({ pid }) => pid).join(' ')}`,
  });
}

export async function restart(rig: Rig, settings: Settings = {}): Promise<void> {
  rig.daemon = await startDaemon({ directory: rig.lab.file('daemon'), settings });
}

interface Recorded {
  pid: number;
  startTime: string;
}

async function describe(pids: number[]): Promise<Recorded[]> {
  const all = await Promise.all(pids.map(async (pid) => ({ pid, startTime: await processStartTime(pid) })));
  return all.flatMap(({ pid, startTime }) => (startTime === undefined ? [] : [{ pid, startTime }]));
}

async function anyAlive(processes: Recorded[]): Promise<boolean> {
  return (await Promise.all(processes.map(isSameProcess))).some(Boolean);
}

/**
 * What the crash of a backup left is clear: interrupted without a trace, or completed with a point that
 * reads back. Answers which.
 */
export async function expectSettled(
  rig: Rig,
  setup: Setup,
  { run, truths }: { run: RunView; truths: Record<string, string> },
): Promise<RunView> {
  const ended = await rig.daemon.waitForRun(run.id);
  expect(['interrupted', 'completed']).toContain(ended.state);
  await expectNothingLeft(rig, setup.repository.root);
  const points = await listPoints(rig.daemon, setup);
  if (ended.state === 'completed') {
    expect(points).toContain(run.pointId);
    await expectReadsBack(rig, run.pointId, truths);
  } else {
    expect(ended.error?.code).toBe('INTERRUPTED');
    expect(points).not.toContain(run.pointId);
  }
  return ended;
}

export async function waitForStage(rig: Rig, runId: string, stage: RunStage): Promise<void> {
  await pollUntil(
    async () => {
      const run = await rig.daemon.expect<RunView>(200, 'GET', `/runs/${runId}`);
      if (run.endedAt !== null) throw new Error(`the run ended before ${stage}: ${JSON.stringify(run)}`);
      return run.stage === stage ? true : undefined;
    },
    { timeoutMs: 15_000, intervalMs: 20, what: `run ${runId} reaching ${stage}` },
  );
}

/** Children of the daemon by command and a word of their command line; a test freezes or kills only those. */
export async function findChildren(rig: Rig, command: string, word = ''): Promise<number[]> {
  const found: number[] = [];
  for (const pid of await findDescendants(rig.daemon.pid)) {
    // Redis writes its state behind its name, with a blank.
    const argv = (await commandLine(pid)).split(/[\0 ]/);
    if (path.basename(argv[0] ?? '') === command && argv.join(' ').includes(word)) found.push(pid);
  }
  return found;
}

/** Like `findChildren`, waiting until there is one. */
export async function waitForChild(rig: Rig, command: string, word = ''): Promise<number> {
  return pollUntil(async () => (await findChildren(rig, command, word))[0], {
    timeoutMs: 10_000,
    what: `a ${command} with ${word}`,
  });
}

async function commandLine(pid: number): Promise<string> {
  try {
    return await readFile(`/proc/${pid}/cmdline`, 'utf8');
  } catch (error) {
    if (errnoOf(error) === 'ENOENT' || errnoOf(error) === 'ESRCH') return '';
    throw error;
  }
}

export interface Attempt extends AsyncDisposable {
  child: ChildProcess;
  output: () => string;
  /** Waits for its end; answers the exit code, null after a signal. */
  ended: () => Promise<number | null>;
}

/** Starts holdfastd on a configuration (default: the one `startDaemon` wrote), without waiting for anything. */
export function attemptStart(rig: Rig, config = rig.lab.file('daemon', 'holdfast.yaml')): Attempt {
  const child = spawn(process.execPath, [path.join(ROOT, 'bin/holdfastd'), '--config', config], {
    stdio: ['ignore', 'pipe', 'pipe'],
    env: { PATH: process.env['PATH'] ?? '' },
  });
  let output = '';
  for (const stream of [child.stdout, child.stderr]) {
    stream.on('data', (chunk: Buffer) => {
      output += chunk.toString();
    });
  }
  const exited = once(child, 'close');
  const ended = async (): Promise<number | null> => {
    await withDeadline(exited, { timeoutMs: 20_000, what: 'the end of a holdfastd' });
    return child.exitCode;
  };
  return {
    child,
    output: () => output,
    ended,
    [Symbol.asyncDispose]: async () => {
      child.kill('SIGTERM');
      await ended();
    },
  };
}

/** Waits until it says that it is ready. */
export async function waitUntilReady(attempt: Attempt): Promise<void> {
  await pollUntil(() => (attempt.output().includes('holdfastd is ready') ? true : undefined), {
    timeoutMs: 30_000,
    what: 'a holdfastd becoming ready',
  });
}

export interface LogEntry {
  level: string;
  code: string;
  message: string;
}

export async function logOf(rig: Rig, run: RunView): Promise<LogEntry[]> {
  return (await rig.daemon.expect<{ items: LogEntry[] }>(200, 'GET', `/runs/${run.id}/log`)).items;
}
