import { spawn } from 'node:child_process';
import { once } from 'node:events';
import path from 'node:path';
import { text } from 'node:stream/consumers';
import { AppError } from '../../../src/lib/errors.js';
import type { RunningDaemon } from '../daemon.js';

const PROGRAM = path.resolve(import.meta.dirname, '../../../bin/holdfast');

/** The `holdfast` command as a user would type it; its progress bars go to this terminal. */
export class HoldfastCommand {
  constructor(private readonly daemon: Pick<RunningDaemon, 'url' | 'tokenFile'>) {}

  /** The document the command printed. Rejects when it fails; what it said is on the terminal by then. */
  async json<T>(...args: string[]): Promise<T> {
    const child = spawn(process.execPath, [PROGRAM, '--json', ...args], {
      stdio: ['ignore', 'pipe', 'inherit'],
      env: {
        PATH: process.env['PATH'],
        TERM: process.env['TERM'],
        HOLDFAST_URL: this.daemon.url,
        HOLDFAST_TOKEN_FILE: this.daemon.tokenFile,
      },
    });
    const [output, [exitCode]] = (await Promise.all([text(child.stdout), once(child, 'close')])) as [
      string,
      [number],
    ];
    if (exitCode !== 0) {
      const command = `holdfast ${args.slice(0, 2).join(' ')}`;
      throw new AppError('TOOL_FAILED', `${command} ended with exit code ${exitCode}${reasonIn(output)}`);
    }
    return JSON.parse(output) as T;
  }
}

/** A run that failed, and a command that failed, both carry the reason as `error`. */
function reasonIn(output: string): string {
  if (output.trim() === '') return '';
  const { error } = JSON.parse(output) as { error?: { code: string; message: string; remedy: string } };
  return error === undefined ? '' : `: ${error.code}: ${error.message}. ${error.remedy}`;
}
