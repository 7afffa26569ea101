import { spawn, type ChildProcess } from 'node:child_process';
import { chmod, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import os from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { pollUntil } from '../../src/lib/deadline.js';
import { AppError, errnoOf } from '../../src/lib/errors.js';
import type { GuestAgent } from '../../src/source/agent-protocol.js';
import { armGuestTimer } from '../../src/source/guest-timer.js';

const MOUNTPOINTS = ['/', '/srv/two words', "/mnt/it's; touch planted"];

let directory: string;
let children: ChildProcess[];

beforeEach(async () => {
  directory = await mkdtemp(path.join(os.tmpdir(), 'hf-'));
  children = [];
  const program = path.join(directory, 'fsfreeze');
  await writeFile(program, `#!/bin/sh\necho "$@" >> ${directory}/log\n`);
  await chmod(program, 0o755);
});

afterEach(async () => {
  for (const child of children) child.kill('SIGKILL');
  await rm(directory, { recursive: true });
});

/** The agent of a guest whose shell is this machine's, with an fsfreeze that only writes down what it is told. */
function makeAgent(different: Partial<Record<string, unknown>> = {}): GuestAgent {
  return {
    execute: async (command, parameters) => {
      const answer = different[command];
      if (answer instanceof Error) throw answer;
      if (answer !== undefined) return answer;
      if (command === 'guest-get-fsinfo')
        return MOUNTPOINTS.map((mountpoint) => ({ mountpoint, type: 'ext4' }));
      if (command === 'guest-exec-status') {
        const child = children.find(({ pid }) => pid === parameters['pid'])!;
        return child.exitCode === null ? { exited: false } : { exited: true, exitcode: child.exitCode };
      }
      const { path: program, arg } = parameters as { path: string; arg: string[] };
      const child = spawn(program, arg, {
        cwd: directory,
        env: { PATH: `${directory}:${process.env['PATH']}` },
      });
      children.push(child);
      return { pid: child.pid };
    },
  };
}

async function readLog(): Promise<string[]> {
  try {
    return (await readFile(path.join(directory, 'log'), 'utf8')).trimEnd().split('\n');
  } catch (error) {
    if (errnoOf(error) === 'ENOENT') return [];
    throw error;
  }
}

const options = { limitMs: 900, callTimeoutMs: 2000 };
const hasEnded = (child: ChildProcess) => child.exitCode !== null || child.signalCode !== null;

describe('the timer in a guest', () => {
  it('thaws every filesystem when its time is up', async () => {
    const guard = await armGuestTimer(makeAgent(), options);
    expect(guard).toMatchObject({ kind: 'guest', reason: null });
    expect(await readLog()).toEqual([]);
    await pollUntil(() => (children.every(hasEnded) ? true : undefined), {
      timeoutMs: 4000,
      what: 'the timer',
    });
    expect(await readLog()).toEqual(MOUNTPOINTS.map((mountpoint) => `--unfreeze ${mountpoint}`));
  });

  it('does nothing when it is disarmed, and leaves no process', async () => {
    const guard = await armGuestTimer(makeAgent(), { ...options, limitMs: 60_000 });
    await guard.disarm();
    await pollUntil(() => (children.every(hasEnded) ? true : undefined), {
      timeoutMs: 4000,
      what: 'its end',
    });
    expect(await readLog()).toEqual([]);
    const left = await readFile(`/proc/self/task/${process.pid}/children`, 'utf8');
    expect(left.split(' ').filter((pid) => children.some((child) => String(child.pid) === pid))).toEqual([]);
  });

  it.each<[string, Record<string, unknown>]>([
    ['guest-exec is forbidden', { 'guest-exec': new AppError('SOURCE_REFUSED', 'has been disabled') }],
    ['it has no fsfreeze', { 'guest-exec-status': { exited: true, exitcode: 127 } }],
    ['it lists no filesystems', { 'guest-get-fsinfo': { none: true } }],
    ['it answers nonsense', { 'guest-exec': { pid: 'x' } }],
  ])('says what cannot be promised when %s', async (_name, different) => {
    const guard = await armGuestTimer(makeAgent(different), options);
    expect(guard.kind).toBe('none');
    expect(guard.reason).toContain('stays frozen until somebody thaws it');
    await guard.disarm();
  });
});
