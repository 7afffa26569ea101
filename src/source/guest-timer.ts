import { z } from 'zod';
import { pollUntil } from '../lib/deadline.js';
import { AppError, toAppError } from '../lib/errors.js';
import { checkAnswer, type GuestAgent } from './agent-protocol.js';
import type { ThawGuard } from './guest-freeze.js';

const MAX_FILESYSTEMS = 500;

const filesystemsSchema = z.array(z.object({ mountpoint: z.string() })).max(MAX_FILESYSTEMS);
const startedSchema = z.object({ pid: z.number().int().positive() });
const statusSchema = z.object({ exited: z.boolean(), exitcode: z.number().int().optional() });

/** The long option is the one that busybox knows too. */
const TIMER =
  'trap \'kill "$sleeper"; exit 0\' TERM; sleep "$0" & sleeper=$!; wait "$sleeper"; for it; do fsfreeze --unfreeze "$it"; done';

/**
 * A timer inside the guest that thaws its filesystems `limitMs` from now, by guest-exec: it needs nothing of
 * this host or the way to it. The agent's own state stays `frozen` when it strikes, until it is told to thaw.
 * Kind `none` where the guest does not let us: guest-exec forbidden, no sh or fsfreeze (Windows).
 */
export async function armGuestTimer(
  agent: GuestAgent,
  options: { limitMs: number; callTimeoutMs: number },
): Promise<ThawGuard> {
  const shell = new GuestShell(agent, options.callTimeoutMs);
  try {
    await shell.run('command -v sleep && command -v fsfreeze', []);
    const mountpoints = await shell.mountpoints();
    const seconds = String(Math.ceil(options.limitMs / 1000));
    const pid = await shell.start(TIMER, [seconds, ...mountpoints]);
    return { kind: 'guest', reason: null, disarm: () => shell.run('kill "$0"', [String(pid)]) };
  } catch (error) {
    const why = toAppError(error).message;
    const reason =
      'no timer could be set in the guest: if this host or the way to the hypervisor fails while the guest is ' +
      `frozen, it stays frozen until somebody thaws it (Windows thaws itself after 10 s): ${why}`;
    return { kind: 'none', reason, disarm: () => Promise.resolve() };
  }
}

class GuestShell {
  constructor(
    private readonly agent: GuestAgent,
    private readonly timeoutMs: number,
  ) {}

  async mountpoints(): Promise<string[]> {
    const answer = await this.#execute('guest-get-fsinfo', {});
    return checkAnswer(filesystemsSchema, answer).map(({ mountpoint }) => mountpoint);
  }

  /** Answers its pid in the guest. */
  async start(script: string, args: readonly string[]): Promise<number> {
    const answer = await this.#execute('guest-exec', { path: '/bin/sh', arg: ['-c', script, ...args] });
    return checkAnswer(startedSchema, answer).pid;
  }

  /** Waits for its end; any exit code but 0 is an error. */
  async run(script: string, args: readonly string[]): Promise<void> {
    const pid = await this.start(script, args);
    const code = await pollUntil(
      async () => {
        const status = checkAnswer(statusSchema, await this.#execute('guest-exec-status', { pid }));
        return status.exited ? (status.exitcode ?? -1) : undefined;
      },
      { timeoutMs: this.timeoutMs, what: 'the end of a command in the guest', intervalMs: 20 },
    );
    if (code !== 0) throw new AppError('SOURCE_REFUSED', `the guest ended "${script}" with code ${code}`);
  }

  #execute(command: string, parameters: Record<string, unknown>): Promise<unknown> {
    return this.agent.execute(command, parameters, { timeoutMs: this.timeoutMs });
  }
}
