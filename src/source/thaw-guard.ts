import { withDeadline } from '../lib/deadline.js';
import { isErrorCode } from '../lib/errors.js';
import { startDetached, type SpokenChild } from '../lib/process.js';

const READY_TIMEOUT_MS = 5000;
const END_TIMEOUT_MS = 5000;

/**
 * Waits for the word `done`; at the end of its input (its starter died), on SIGTERM (the service is being
 * stopped) or after the limit it runs the command until that succeeds, for a minute at most.
 * A script of sh, because it stands within milliseconds and needs nothing that may be gone when it is needed.
 * `timeout` bounds the wait and each attempt; `wait` is what a signal interrupts, `read` is not.
 */
const SCRIPT = `
limit=$1
shift
trap '' HUP INT QUIT PIPE
exec 3<&0 </dev/null
timeout "$limit" sh -c 'read -r word && [ "$word" = done ]' <&3 &
waiting=$!
exec 3<&-
trap 'kill "$waiting"' TERM
echo ready
exec >/dev/null
wait "$waiting" && exit 0
trap '' TERM
end=$(($(date +%s) + 60))
while [ "$(date +%s)" -lt "$end" ]; do
  timeout --kill-after=2 10 "$@" && exit 0
  sleep 0.5
done
exit 1
`;

/** A process of its own that undoes something unless it is told in time that this was done. */
export interface Guard {
  readonly pid: number;
  /** Tells it that there is nothing left to undo; it has ended when this resolves. */
  disarm(): Promise<void>;
  /** Has it undo now, for the case that our own attempt failed. It goes on by itself. */
  fire(): void;
}

/**
 * Starts a process that runs `undo` when this one dies, when it is sent SIGTERM, or `limitMs` from now, and
 * resolves when it stands. It outlives us, but not its purpose: it ends when it is disarmed or has undone.
 * Whoever arms it disarms it after the undoing; not disarmed, it acts at its limit.
 */
export async function armGuard(options: { undo: readonly string[]; limitMs: number }): Promise<Guard> {
  const seconds = (options.limitMs / 1000).toFixed(3);
  const child = await startDetached('sh', ['-c', SCRIPT, 'holdfast-guard', seconds, ...options.undo], {
    readyTimeoutMs: READY_TIMEOUT_MS,
  });
  return {
    pid: child.pid,
    disarm: () => disarm(child),
    fire: () => {
      child.end('');
    },
  };
}

async function disarm(child: SpokenChild): Promise<void> {
  child.end('done\n');
  try {
    await withDeadline(child.exited, { timeoutMs: END_TIMEOUT_MS, what: 'the guard ending' });
  } catch (error) {
    if (!isErrorCode(error, 'TIMEOUT')) throw error;
    // It is in the middle of an attempt, which is not needed any more.
    child.kill();
    await child.exited;
  }
}

/**
 * Run by `node -e`: sends lines to a socket and ends well when each was answered with a `return`. What came
 * before a byte 0xFF belonged to somebody else (guest-sync-delimited). Text, not a module: the process is
 * started when this one may be dead and its files replaced.
 */
const SEND_PROGRAM = `
const [socketPath, ...lines] = process.argv.slice(1);
let missing = lines.length;
let text = '';
const socket = require('node:net').connect(socketPath);
const fail = () => process.exit(1);
socket.on('error', fail).on('close', fail).setTimeout(8000, fail).setEncoding('latin1');
socket.on('connect', () => socket.write(Buffer.from(lines.join(''), 'latin1')));
socket.on('data', (chunk) => {
  text = (text + chunk).slice(-1e6);
  text = text.slice(text.lastIndexOf('\\xff') + 1);
  const answers = text.split('\\n');
  text = answers.pop();
  for (const answer of answers.filter((line) => line.trim() !== '').map((line) => JSON.parse(line))) {
    if ('error' in answer) fail();
    if ('return' in answer && --missing === 0) process.exit(0);
  }
});
`;

/** A command that sends these lines (with their ends) to a Unix socket of QMP's kind and waits for the answers. */
export function sendCommand(socket: string, lines: readonly string[]): string[] {
  return [process.execPath, '-e', SEND_PROGRAM, socket, ...lines];
}
