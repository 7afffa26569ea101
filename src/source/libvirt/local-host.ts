import { constants } from 'node:fs';
import { chown, lstat, mkdir, open, readdir, realpath, rmdir, statfs, unlink } from 'node:fs/promises';
import path from 'node:path';
import { withDeadline } from '../../lib/deadline.js';
import { errnoOf } from '../../lib/errors.js';
import { runTool } from '../../lib/process.js';
import {
  checkBase,
  checkPath,
  checkScratch,
  directoryExists,
  refused,
  tooLarge,
  type HostUser,
  type HypervisorHost,
  type PathFacts,
  type RunDirectoryRequest,
} from './hypervisor-host.js';

/** This host. */
export function openLocalHost(options: { timeoutMs: number }): HypervisorHost {
  const timed = <T>(what: string, signal: AbortSignal, work: Promise<T>): Promise<T> =>
    withDeadline(
      work.catch((error: unknown) => {
        throw refused(what, error);
      }),
      { timeoutMs: options.timeoutMs, what, signal },
    );
  return {
    kind: 'local',
    makeRunDirectory: (request, { signal }) =>
      timed(
        `making a run directory in ${request.base}`,
        signal,
        makeRunDirectory(request, { signal, timeoutMs: options.timeoutMs }),
      ),
    removeRunDirectory: ({ base, runId }, { signal }) =>
      timed(`removing ${runId} in ${base}`, signal, removeFlat(path.join(checkPath(base), runId))),
    capacity: (directory, { signal }) =>
      timed(`asking for the room in ${directory}`, signal, readCapacity(directory)),
    reach: (socket) =>
      Promise.resolve({ path: socket, lost: null, [Symbol.asyncDispose]: () => Promise.resolve() }),
    readFile: (file, maxBytes, { signal }) => timed(`reading ${file}`, signal, readSmall(file, maxBytes)),
    [Symbol.asyncDispose]: () => Promise.resolve(),
  };
}

async function makeRunDirectory(
  request: RunDirectoryRequest,
  control: { signal: AbortSignal; timeoutMs: number },
): Promise<string> {
  const base = checkPath(request.base);
  checkScratch(request.scratch);
  await makeBase(base, request.owner);
  const directory = path.join(base, request.runId);
  try {
    await mkdir(directory, { mode: 0o700 });
  } catch (error) {
    throw errnoOf(error) === 'EEXIST' ? directoryExists(directory, error) : error;
  }
  try {
    for (const { name, sizeBytes } of request.scratch) {
      const file = path.join(directory, name);
      await runTool('qemu-img', ['create', '-q', '-f', 'qcow2', '--', file, String(sizeBytes)], control);
      await giveTo(request.owner, file);
    }
    // Last: until now nobody else could put a link in the way of what was written here.
    await giveTo(request.owner, directory);
  } catch (error) {
    await removeFlat(directory);
    throw error;
  }
  return directory;
}

async function giveTo(owner: HostUser | null, file: string): Promise<void> {
  if (owner !== null) await chown(file, owner.uid, owner.gid);
}

async function makeBase(base: string, owner: HostUser | null): Promise<void> {
  try {
    await mkdir(base, { mode: 0o700 });
    await openToOthers(base);
  } catch (error) {
    if (errnoOf(error) !== 'EEXIST') throw error;
  }
  const ancestors: PathFacts[] = [];
  for (let up = await realpath(path.dirname(base)); ; up = path.dirname(up)) {
    ancestors.push(await factsOf(up));
    if (up === '/') break;
  }
  checkBase({ ownUid: process.geteuid?.() ?? 0, base: await factsOf(base), ancestors }, owner);
}

/** Whatever our umask is. By handle: where the check below finds fault, a link may have taken its place. */
async function openToOthers(base: string): Promise<void> {
  const handle = await open(base, constants.O_RDONLY | constants.O_DIRECTORY | constants.O_NOFOLLOW);
  try {
    await handle.chmod(0o711);
  } finally {
    await handle.close();
  }
}

async function factsOf(file: string): Promise<PathFacts> {
  const { uid, mode } = await lstat(file);
  return { path: file, uid, mode };
}

/** Never follows a link and never descends: what is in there may be the work of a QEMU that was taken over. */
async function removeFlat(directory: string): Promise<void> {
  try {
    for (const name of await readdir(directory)) await unlink(path.join(directory, name));
    await rmdir(directory);
  } catch (error) {
    if (errnoOf(error) !== 'ENOENT') throw error;
  }
}

async function readCapacity(directory: string): Promise<{ totalBytes: number; freeBytes: number }> {
  const { bsize, blocks, bavail } = await statfs(directory);
  return { totalBytes: blocks * bsize, freeBytes: bavail * bsize };
}

async function readSmall(file: string, maxBytes: number): Promise<Buffer | null> {
  let handle;
  try {
    // Not blocking: a FIFO in its place would hold a thread for ever.
    handle = await open(checkPath(file), constants.O_RDONLY | constants.O_NONBLOCK);
  } catch (error) {
    if (errnoOf(error) === 'ENOENT' || errnoOf(error) === 'ENOTDIR') return null;
    throw error;
  }
  try {
    const facts = await handle.stat();
    if (!facts.isFile()) throw refused(`reading ${file}`, 'not a regular file');
    const buffer = Buffer.alloc(maxBytes + 1);
    let length = 0;
    for (;;) {
      const { bytesRead } = await handle.read(buffer, length, buffer.length - length);
      length += bytesRead;
      if (length > maxBytes) throw tooLarge(file, maxBytes);
      if (bytesRead === 0) return Buffer.from(buffer.subarray(0, length));
    }
  } finally {
    await handle.close();
  }
}
