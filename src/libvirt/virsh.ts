import { AppError, type ErrorCode } from '../lib/errors.js';
import { runTool, ToolError } from '../lib/process.js';
import { localUri } from './libvirt-uri.js';

export interface VirshOptions {
  /** Of this host; checked by `localUri` before anything is started. */
  uri: string;
  timeoutMs: number;
  signal?: AbortSignal | undefined;
  /** Also what `--quiet` leaves out: some commands answer there (`domfsfreeze`). */
  withRemarks?: boolean;
}

/**
 * libvirt tells failures apart by code numbers that virsh does not print, so the English text (LC_ALL=C) has to
 * do: messages of libvirt 9.0 and 11, src/util/virerror.c and src/qemu. The first that matches counts.
 */
const FAILURES: readonly (readonly [RegExp, ErrorCode])[] = [
  [
    /authentication (failed|unavailable)|Host key verification failed|Permission denied|access denied|polkit/i,
    'SOURCE_REFUSED',
  ],
  [
    /failed to (re)?connect to the hypervisor|End of file while reading data|client socket is closed|Cannot recv data|Cannot write data|Disconnected from .* due to|connection (is )?(closed|not open)/i,
    'SOURCE_UNREACHABLE',
  ],
  [
    /(Domain|pool|volume|checkpoint|snapshot|backup job id|Network) not found\b|no domain with matching|no storage (pool|vol) with matching|no domain checkpoint with matching|no domain backup job present|failed to get domain/i,
    'NOT_FOUND',
  ],
  [
    /cannot acquire state change lock|already in active block job|active block job|another (backup|migration) job|job is already running|timed out waiting for (a )?job/i,
    'SOURCE_BUSY',
  ],
];

/**
 * Runs one virsh command and answers its standard output. Arguments must be in the form `--option`, `value`, so
 * that a value can never be read as an option; domains are named by UUID. XML goes by a private file: the standard
 * input of a child of Node is a socket, which virsh cannot open again as `/dev/stdin`. Rejects with SOURCE_UNREACHABLE,
 * NOT_FOUND, SOURCE_BUSY, else SOURCE_REFUSED, always with libvirt's own words; TIMEOUT, or the signal's reason.
 */
export async function virsh(args: readonly string[], options: VirshOptions): Promise<string> {
  const uri = localUri(options.uri);
  const quiet = options.withRemarks === true ? [] : ['--quiet'];
  try {
    const { stdout } = await runTool('virsh', ['--connect', uri, ...quiet, ...args], {
      timeoutMs: options.timeoutMs,
      signal: options.signal,
    });
    return stdout;
  } catch (error) {
    if (!(error instanceof ToolError)) throw error;
    throw explainFailure(args[0] ?? 'virsh', { stderr: error.stderrTail, cause: error });
  }
}

/** What a command's failure means, by what virsh wrote to standard error. */
export function explainFailure(
  command: string,
  { stderr, cause }: { stderr: string; cause?: unknown },
): AppError {
  const words = libvirtWords(stderr);
  const code = FAILURES.find(([pattern]) => pattern.test(words))?.[1] ?? 'SOURCE_REFUSED';
  return new AppError(code, `virsh ${command}: ${words === '' ? 'failed without a word' : words}`, {
    cause,
    details: { command, libvirt: words },
  });
}

/** `error: one thing\nerror: another` as one line. */
function libvirtWords(stderr: string): string {
  return stderr
    .split('\n')
    .map((line) => line.replace(/^error:\s*/, '').trim())
    .filter((line) => line !== '')
    .join('; ');
}
