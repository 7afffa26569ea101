import { spawn, type ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import path from 'node:path';
import { pollUntil, withDeadline } from '../../src/lib/deadline.js';
import type { ExportRig } from '../daemon/export-rig.js';
import type { Setup } from '../daemon/daemon.js';

const ROOT = path.resolve(import.meta.dirname, '../..');
const END_MS = 60_000;

/** `holdfast capture` in a process of its own. */
export interface Agent {
  readonly process: ChildProcess;
  readonly output: () => string;
  /** Its exit code, null when a signal ended it; rejects when it does not end. */
  ended(): Promise<number | null>;
  /** Waits until its output shows this. */
  says(pattern: RegExp): Promise<void>;
}

/** Starts the agent on the machine and repository of a setup. */
export function startAgent(rig: ExportRig, setup: Setup, args: readonly string[]): Agent {
  const { url, stateDirectory } = rig.daemon;
  // A test run that dies takes its agents along.
  const child = spawn(
    'setpriv',
    [
      ...['--pdeathsig', 'KILL', '--', process.execPath, path.join(ROOT, 'bin/holdfast')],
      ...['--url', url, '--token-file', path.join(stateDirectory, 'admin-token'), 'capture'],
      ...['--vm', setup.vm.id, '--repository', setup.repository.id, ...args],
    ],
    {
      stdio: ['ignore', 'pipe', 'pipe'],
      env: { PATH: process.env['PATH'] ?? '', TMPDIR: rig.lab.path },
    },
  );
  let output = '';
  for (const stream of [child.stdout, child.stderr]) {
    stream.on('data', (chunk: Buffer) => (output += chunk.toString()));
  }
  const closed = once(child, 'close').then(([code]) => code as number | null);
  return {
    process: child,
    output: () => output,
    ended: () => withDeadline(closed, { timeoutMs: END_MS, what: 'the end of the agent' }),
    says: async (pattern) => {
      await pollUntil(
        () => {
          if (child.exitCode !== null) throw new Error(`the agent ended: ${output}`);
          return pattern.test(output) ? true : undefined;
        },
        { timeoutMs: END_MS, intervalMs: 20, what: `the agent saying ${pattern.source}` },
      );
    },
  };
}
