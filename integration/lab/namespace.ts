import { readdir, readFile, readlink } from 'node:fs/promises';
import { errnoOf } from '../../src/lib/errors.js';
import { pollUntil } from '../../src/lib/deadline.js';
import { startServer } from '../../src/lib/process.js';
import { READY_TIMEOUT_MS } from './server.js';

/** In this order: an empty filesystem over a directory, or a path of ours over a path there. */
export type LabMount = { tmpfs: string } | { bind: string; over: string };

export interface LabProcess {
  /** As seen from here, not from inside. */
  pid: number;
  commandLine: readonly string[];
}

/** Mounts and processes of a server's own. Disposal kills every process in it, whoever started it. */
export interface LabNamespace extends AsyncDisposable {
  /** Arguments of `nsenter` that run a tool in it. Signals reach that tool only by its own pid: `childOf()`. */
  entering(tool: string, args: readonly string[]): string[];
  processes(): Promise<LabProcess[]>;
  [Symbol.asyncDispose](): Promise<void>;
}

/** Process 1 of the namespace waits for nobody, so it lets the kernel reap what is orphaned there. */
const SCRIPT = `set -eu
while [ $# -gt 0 ]; do
  if [ "$1" = tmpfs ]; then mount -t tmpfs -o mode=0755 holdfast-lab "$2"
  else [ -e "$2" ] || mkdir -p "$2"; mount --bind "$1" "$2"; fi
  shift 2
done
exec env --ignore-signal=CHLD sleep infinity`;

/**
 * A mount and process namespace beside the machine's. It ends, with everything in it, when this process ends,
 * however that happens. A directory to bind over must exist or stand on one of the tmpfs.
 */
export async function startNamespace(mounts: readonly LabMount[]): Promise<LabNamespace> {
  const mountArgs = mounts.flatMap((mount) =>
    'tmpfs' in mount ? ['tmpfs', mount.tmpfs] : [mount.bind, mount.over],
  );
  const holder = await startServer(
    'unshare',
    [
      ...['--mount', '--propagation', 'private', '--pid', '--fork', '--kill-child=KILL', '--mount-proc'],
      ...['--', 'sh', '-c', SCRIPT, 'lab', ...mountArgs],
    ],
    { owner: 'lab', readyTimeoutMs: READY_TIMEOUT_MS, isReady: () => Promise.resolve(true) },
  );
  // unshare ignores SIGTERM while it waits, and reaps its child when that was killed first.
  const kill = async (): Promise<void> => {
    const pid = holder.hasExited ? undefined : ((await childOf(holder.pid)) ?? holder.pid);
    if (pid !== undefined) process.kill(pid, 'SIGKILL');
    await holder.exited;
  };
  try {
    const initPid = await pollUntil(
      async () => {
        if (holder.hasExited) throw new Error(`no namespace: ${(await holder.exited).stderrTail}`);
        const pid = await childOf(holder.pid);
        return pid !== undefined && (await commandLineOf(pid))[0] === 'sleep' ? pid : undefined;
      },
      { timeoutMs: READY_TIMEOUT_MS, what: 'the namespace becoming ready' },
    );
    const identity = await readlink(`/proc/${initPid}/ns/pid`);
    return {
      entering: (tool, args) => ['--target', String(initPid), '--mount', '--pid', '--', tool, ...args],
      processes: () => listProcesses(identity),
      [Symbol.asyncDispose]: async () => {
        await kill();
        await pollUntil(async () => ((await listProcesses(identity)).length === 0 ? true : undefined), {
          timeoutMs: READY_TIMEOUT_MS,
          what: 'the end of the processes in the namespace',
        });
      },
    };
  } catch (error) {
    await kill();
    throw error;
  }
}

/** The only child of a process; undefined while it has none. */
export async function childOf(pid: number): Promise<number | undefined> {
  const text = await readIfThere(readFile(`/proc/${pid}/task/${pid}/children`, 'utf8'));
  const first = text.split(' ')[0] ?? '';
  return first === '' ? undefined : Number(first);
}

async function listProcesses(identity: string): Promise<LabProcess[]> {
  const found: LabProcess[] = [];
  for (const name of await readdir('/proc')) {
    const pid = Number(name);
    if (!Number.isInteger(pid)) continue;
    if ((await readIfThere(readlink(`/proc/${pid}/ns/pid`))) !== identity) continue;
    found.push({ pid, commandLine: await commandLineOf(pid) });
  }
  return found;
}

async function commandLineOf(pid: number): Promise<string[]> {
  return (await readIfThere(readFile(`/proc/${pid}/cmdline`, 'utf8'))).split('\0');
}

/** Empty for a process that has just ended, or is not ours to look into. */
async function readIfThere(read: Promise<string>): Promise<string> {
  try {
    return await read;
  } catch (error) {
    if (['ENOENT', 'ESRCH', 'EACCES'].includes(errnoOf(error) ?? '')) return '';
    throw error;
  }
}
