import { pollUntil } from '../../lib/deadline.js';
import type { Control, HostCapacity } from './hypervisor-host.js';

/** Exit code of a script that cannot measure where it runs. */
const NO_MEANS = 19;
const FRESH_MS = 500;
/** Its whole output is kept until it ends; a question after that starts it anew. */
const LOOP_LIMIT_MS = 24 * 3600 * 1000;

const SCRIPT = `command -v stat >/dev/null || exit ${NO_MEANS}
while stat -f -c '%S %b %a' -- "$1"; do sleep 0.2; done
exit 1
`;

export interface ScriptResult {
  exitCode: number;
  stdout: string;
}

export interface ScriptControl extends Control {
  /** Exit codes that are answers, beside 0. */
  answers?: readonly number[];
  /** In place of the usual one. */
  timeoutMs?: number;
  onOutput?: (chunk: string) => void;
}

/** Runs a script of POSIX sh on the host, handed over on standard input so that no login shell reads it. */
export type RunScript = (
  script: string,
  args: readonly string[],
  control: ScriptControl,
) => Promise<ScriptResult>;

/**
 * The room in directories of a remote host, told by a loop there for each that was asked about: a command
 * for each question would take six processes. Whoever made this stops it.
 */
export class CapacityLoops {
  readonly #loops = new Map<string, CapacityLoop>();

  constructor(
    private readonly runScript: RunScript,
    private readonly timeoutMs: number,
  ) {}

  /** As it was half a second ago at most. Null where the host cannot tell. Rejects as the script does. */
  async read(directory: string, control: Control): Promise<HostCapacity | null> {
    let loop = this.#loops.get(directory);
    if (loop === undefined) {
      loop = new CapacityLoop(this.runScript, directory);
      this.#loops.set(directory, loop);
    }
    try {
      return await loop.read({ timeoutMs: this.timeoutMs, signal: control.signal });
    } catch (error) {
      if (loop.hasFailed) this.#loops.delete(directory);
      throw error;
    }
  }

  async stop(): Promise<void> {
    await Promise.all([...this.#loops.values()].map((loop) => loop.stop()));
  }
}

class CapacityLoop {
  readonly #stopping = new AbortController();
  readonly #run: Promise<void>;
  #latest: { capacity: HostCapacity; atMs: number } | undefined;
  #unfinished = '';
  #end: { capacity: null } | { error: unknown } | undefined;

  constructor(runScript: RunScript, directory: string) {
    const loop = runScript(SCRIPT, [directory], {
      signal: this.#stopping.signal,
      timeoutMs: LOOP_LIMIT_MS,
      answers: [NO_MEANS],
      onOutput: (chunk) => {
        this.#take(chunk);
      },
    });
    this.#run = loop.then(
      () => {
        this.#end = { capacity: null };
      },
      (error: unknown) => {
        this.#end = { error };
      },
    );
  }

  get hasFailed(): boolean {
    return this.#end !== undefined && 'error' in this.#end;
  }

  async read(control: { timeoutMs: number; signal: AbortSignal }): Promise<HostCapacity | null> {
    const what = "an answer of the hypervisor's host about its room";
    return (await pollUntil(() => this.#answer(), { ...control, what, intervalMs: 20 })).capacity;
  }

  async stop(): Promise<void> {
    this.#stopping.abort();
    await this.#run;
  }

  #answer(): { capacity: HostCapacity | null } | undefined {
    if (this.#end !== undefined) {
      if ('error' in this.#end) throw this.#end.error;
      return this.#end;
    }
    const latest = this.#latest;
    return latest !== undefined && performance.now() - latest.atMs < FRESH_MS ? latest : undefined;
  }

  /** What a login shell says of itself is no line of ours. */
  #take(chunk: string): void {
    const lines = (this.#unfinished + chunk).split('\n');
    this.#unfinished = (lines.pop() ?? '').slice(0, 200);
    for (const line of lines) {
      const match = /^(\d+) (\d+) (\d+)$/.exec(line);
      if (match === null) continue;
      const [block, total, free] = match.slice(1).map(Number) as [number, number, number];
      const capacity = { totalBytes: block * total, freeBytes: block * free };
      this.#latest = { capacity, atMs: performance.now() };
    }
  }
}
