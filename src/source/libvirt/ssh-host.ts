import { access, readFile, rm } from 'node:fs/promises';
import path from 'node:path';
import { AppError, errnoOf } from '../../lib/errors.js';
import { newUlid, type RunId } from '../../lib/id.js';
import { runTool, startServer, ToolError, type ChildServer } from '../../lib/process.js';
import type { RemoteHost } from '../../libvirt/libvirt-uri.js';
import type { ServerPlace } from '../../nbd/qemu-nbd.js';
import {
  checkBase,
  checkPath,
  checkScratch,
  directoryExists,
  tooLarge,
  type Control,
  type HypervisorHost,
  type PathFacts,
  type ReachedSocket,
  type RunDirectoryRequest,
} from './hypervisor-host.js';
import { CapacityLoops, type RunScript, type ScriptControl, type ScriptResult } from './ssh-capacity.js';

export interface SshHostOptions {
  place: ServerPlace;
  timeoutMs: number;
  signal: AbortSignal;
}

export interface SshHost extends HypervisorHost {
  readonly kind: 'ssh';
  /** The first of these paths that is a socket there, or null. SOURCE_REFUSED when the login may not use it. */
  findSocket(paths: readonly string[], control: Control): Promise<string | null>;
}

/** ssh's own exit code; every other one is the remote command's. */
const SSH_FAILED = 255;
const EXISTS = 17;
const ABSENT = 18;
const TOO_LARGE = 20;

/**
 * A host behind the system's `ssh`. One connection carries the commands; each reached socket has one of
 * its own, so that bulk data does not hold up the watch over the scratch space. Whom to trust is for ssh's own
 * configuration and known_hosts to say. Rejects with SOURCE_REFUSED when the login is refused, either way.
 */
export async function openSshHost(address: RemoteHost, options: SshHostOptions): Promise<SshHost> {
  const login = loginArguments(address, options.timeoutMs);
  const socket = path.join(options.place.runtimeDirectory, `h-${newUlid().slice(-12)}.ssh`);
  const master = await startSsh(['-M', '-S', escapeTokens(socket), '-N', ...login], {
    ...options,
    socket,
    // It gets its name when it listens.
    isReady: () => isThere(socket),
  });
  const runScript: RunScript = (script, args, control) =>
    remote(['-S', escapeTokens(socket), '-T', ...login, 'sh', '-s', '--', ...args.map(quote)], {
      input: script,
      timeoutMs: options.timeoutMs,
      ...control,
    });
  const capacity = new CapacityLoops(runScript, options.timeoutMs);
  return {
    kind: 'ssh',
    makeRunDirectory: (request, control) => makeRunDirectory(runScript, request, control),
    removeRunDirectory: (where, control) => removeRunDirectory(runScript, where, control),
    capacity: (directory, control) => capacity.read(checkPath(directory), control),
    reach: (target, { signal }) => reach(login, checkPath(target), { ...options, signal }),
    readFile: (file, maxBytes, control) => readSmall(runScript, { file, maxBytes }, control),
    findSocket: (paths, control) => findSocket(runScript, paths.map(checkPath), control),
    [Symbol.asyncDispose]: async () => {
      await capacity.stop();
      await master.stop();
      await rm(socket, { force: true });
    },
  };
}

function loginArguments(address: RemoteHost, timeoutMs: number): string[] {
  const seconds = Math.max(1, Math.ceil(timeoutMs / 1000));
  return [
    '-oBatchMode=yes',
    `-oConnectTimeout=${seconds}`,
    // A network that is gone ends the connection within a quarter of a minute.
    '-oServerAliveInterval=5',
    '-oServerAliveCountMax=3',
    '-oControlPersist=no',
    '-oForwardAgent=no',
    '-oForwardX11=no',
    '-oPermitLocalCommand=no',
    '-oRemoteCommand=none',
    ...(address.port === null ? [] : [`-p${address.port}`]),
    ...(address.user === null ? [] : [`-l${address.user}`]),
    ...(address.keyFile === null ? [] : [`-i${sshFile(address.keyFile)}`]),
    ...(address.knownHostsFile === null ? [] : [`-oUserKnownHostsFile=${sshFile(address.knownHostsFile)}`]),
    '--',
    address.name,
  ];
}

/** ssh expands `%` and `~` and splits at blanks in file names of its options. */
function sshFile(file: string): string {
  if (/[\s"'\\$]/.test(checkPath(file))) {
    throw new AppError('INVALID_INPUT', `ssh cannot take ${JSON.stringify(file)} as a file of an option`);
  }
  return escapeTokens(file);
}

function escapeTokens(text: string): string {
  return text.replaceAll('%', '%%');
}

/** One word of a POSIX shell, whatever is in it. */
function quote(text: string): string {
  return `'${text.replaceAll("'", String.raw`'\''`)}'`;
}

/** An `ssh` that stays and makes `socket`. */
async function startSsh(
  args: readonly string[],
  options: SshHostOptions & { socket: string; isReady: () => Promise<boolean> },
): Promise<ChildServer> {
  try {
    return await startServer('ssh', args, {
      owner: options.place.owner,
      registry: options.place.registry,
      isReady: options.isReady,
      readyTimeoutMs: options.timeoutMs,
      signal: options.signal,
    });
  } catch (error) {
    await rm(options.socket, { force: true });
    throw explain(error);
  }
}

async function isThere(file: string): Promise<boolean> {
  try {
    await access(file);
    return true;
  } catch (error) {
    if (errnoOf(error) === 'ENOENT') return false;
    throw error;
  }
}

/** From the kernel's table: a connection made to find out would reach the other end. */
async function isListening(socket: string): Promise<boolean> {
  const table = await readFile('/proc/net/unix', 'utf8');
  // Columns: address, references, protocol, flags (SO_ACCEPTCON when it listens), type, state, inode, path.
  return table.split('\n').some((line) => line.endsWith(` ${socket}`) && line.includes(' 00010000 '));
}

async function reach(
  login: readonly string[],
  target: string,
  options: SshHostOptions,
): Promise<ReachedSocket> {
  const local = path.join(options.place.runtimeDirectory, `f-${newUlid().slice(-12)}.sock`);
  const ends = [local, target].map((file) => sshFile(file).replaceAll(':', String.raw`\:`));
  const child = await startSsh(
    ['-S', 'none', '-oExitOnForwardFailure=yes', '-N', '-L', ends.join(':'), ...login],
    { ...options, socket: local, isReady: () => isListening(local) },
  );
  const losing = new AbortController();
  let isOver = false;
  void child.exited.then(({ stderrTail }) => {
    if (!isOver) losing.abort(connectionLost(stderrTail));
  });
  return {
    path: local,
    lost: losing.signal,
    [Symbol.asyncDispose]: async () => {
      isOver = true;
      await child.stop();
      await rm(local, { force: true });
    },
  };
}

async function remote(
  args: readonly string[],
  { answers = [], ...options }: ScriptControl & { input: string; timeoutMs: number },
): Promise<ScriptResult> {
  try {
    return await runTool('ssh', args, { ...options, acceptExitCodes: [0, ...answers] });
  } catch (error) {
    throw explain(error);
  }
}

/** ssh has one exit code for all of its failures; only its words (LC_ALL=C) tell a refusal from a host that is away. */
function explain(error: unknown): unknown {
  if (!(error instanceof ToolError)) return error;
  const isSsh = error.details['exitCode'] === SSH_FAILED;
  const isRefused = !isSsh || /verification failed|denied|Too many authentication/.test(error.stderrTail);
  const words = lastLine(error.stderrTail);
  return new AppError(
    isRefused ? 'SOURCE_REFUSED' : 'SOURCE_UNREACHABLE',
    `the hypervisor's host ${isSsh ? 'cannot be reached by ssh' : 'refused a command'}: ${words}`,
    { cause: error, details: error.details },
  );
}

function connectionLost(stderrTail: string): AppError {
  return new AppError(
    'SOURCE_UNREACHABLE',
    `the ssh connection to the hypervisor's host was lost: ${lastLine(stderrTail)}`,
  );
}

function lastLine(text: string): string {
  return text.trim().split('\n').at(-1) ?? '';
}

const BASE_SCRIPT = `set -eu
base=$1
[ -e "$base" ] || [ -L "$base" ] || mkdir -m 0711 -- "$base"
id -u
stat -c '%u %f %n' -- "$base"
up=$(cd -P -- "$(dirname -- "$base")" && pwd -P)
while :; do
  stat -c '%u %f %n' -- "$up"
  [ "$up" != / ] || break
  up=$(dirname -- "$up")
done
`;

/** The owner gets the directory last: until then nobody else can put a link in the way of what is written. */
const MAKE_SCRIPT = `set -eu
directory=$1 owner=$2
shift 2
[ ! -e "$directory" ] || exit ${EXISTS}
mkdir -m 0700 -- "$directory"
trap '[ $? = 0 ] || rm -rf -- "$directory"' EXIT
while [ $# -gt 0 ]; do
  qemu-img create -q -f qcow2 -- "$directory/$1" "$2" </dev/null
  [ -z "$owner" ] || chown -- "$owner" "$directory/$1"
  shift 2
done
[ -z "$owner" ] || chown -- "$owner" "$directory"
`;

async function makeRunDirectory(
  runScript: RunScript,
  request: RunDirectoryRequest,
  control: Control,
): Promise<string> {
  const base = checkPath(request.base);
  checkScratch(request.scratch);
  const { stdout } = await runScript(BASE_SCRIPT, [base], control);
  const [ownUid = '', ...lines] = stdout.trimEnd().split('\n');
  const [baseFacts, ...ancestors] = lines.map(parseFacts);
  if (baseFacts === undefined || ancestors.at(-1)?.path !== '/' || !/^\d+$/.test(ownUid))
    throw garbled(stdout);
  checkBase({ ownUid: Number(ownUid), base: baseFacts, ancestors }, request.owner);
  const directory = path.posix.join(base, request.runId);
  const owner = request.owner === null ? '' : `${request.owner.uid}:${request.owner.gid}`;
  const files = request.scratch.flatMap(({ name, sizeBytes }) => [name, String(sizeBytes)]);
  const made = await runScript(MAKE_SCRIPT, [directory, owner, ...files], { ...control, answers: [EXISTS] });
  if (made.exitCode === EXISTS) throw directoryExists(directory);
  return directory;
}

function parseFacts(line: string): PathFacts {
  const match = /^(\d+) ([0-9a-f]+) (\/.*)$/.exec(line);
  if (match === null) throw garbled(line);
  const [, uid, mode, name = ''] = match;
  return { path: name, uid: Number(uid), mode: Number.parseInt(mode ?? '', 16) };
}

function garbled(answer: string): AppError {
  return new AppError('SOURCE_REFUSED', "the hypervisor's host gave an answer that is none", {
    details: { answer: answer.slice(0, 400) },
  });
}

/** Never follows a link and never descends: what is in there may be the work of a QEMU that was taken over. */
const REMOVE_SCRIPT = `set -eu
directory=$1
[ -d "$directory" ] || exit 0
find "$directory" -mindepth 1 -maxdepth 1 ! -type d -exec rm -f -- {} +
rmdir -- "$directory"
`;

async function removeRunDirectory(
  runScript: RunScript,
  where: { base: string; runId: RunId },
  control: Control,
): Promise<void> {
  await runScript(REMOVE_SCRIPT, [path.posix.join(checkPath(where.base), where.runId)], control);
}

/** base64, because standard output is read as text. */
const READ_SCRIPT = `set -eu
file=$1 limit=$2
[ -e "$file" ] || exit ${ABSENT}
[ -f "$file" ] || { echo 'not a regular file' >&2; exit 1; }
[ "$(stat -L -c %s -- "$file")" -le "$limit" ] || exit ${TOO_LARGE}
head -c "$limit" -- "$file" | base64
`;

async function readSmall(
  runScript: RunScript,
  wanted: { file: string; maxBytes: number },
  control: Control,
): Promise<Buffer | null> {
  const { exitCode, stdout } = await runScript(
    READ_SCRIPT,
    [checkPath(wanted.file), String(wanted.maxBytes)],
    { ...control, answers: [ABSENT, TOO_LARGE] },
  );
  if (exitCode === ABSENT) return null;
  if (exitCode === TOO_LARGE) throw tooLarge(wanted.file, wanted.maxBytes);
  return Buffer.from(stdout, 'base64');
}

const FIND_SCRIPT = `for socket; do
  [ -S "$socket" ] || continue
  [ -w "$socket" ] || { echo "user $(id -un) may not use $socket" >&2; exit 1; }
  printf '%s\\n' "$socket"
  exit 0
done
exit ${ABSENT}
`;

async function findSocket(
  runScript: RunScript,
  paths: readonly string[],
  control: Control,
): Promise<string | null> {
  const { exitCode, stdout } = await runScript(FIND_SCRIPT, paths, { ...control, answers: [ABSENT] });
  if (exitCode === ABSENT) return null;
  const found = paths.find((path) => stdout === path);
  if (found === undefined) throw garbled(stdout);
  return found;
}
