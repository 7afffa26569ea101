import { mkdir, open, readFile, readdir, rename, rm } from 'node:fs/promises';
import path from 'node:path';
import { pollUntil } from './lib/deadline.js';
import { AppError, errnoOf, isErrorCode } from './lib/errors.js';
import { isUlid, newUlid } from './lib/id.js';
import { ChildRegistry, isSameProcess, processStartTime } from './lib/process.js';

/** Of two daemons that start at once one gives way within this time. */
const RIVAL_TIMEOUT_MS = 2000;
/** Unique, and short: the path of a Unix socket ends at 107 bytes. */
const SOCKET_DIRECTORY_CHARACTERS = 12;

interface ProcessRecord {
  pid: number;
  startTime: string;
}

/** What the daemon keeps between its starts, beside the database. */
export interface StateDirectory extends AsyncDisposable {
  readonly path: string;
  /** Children of this process, found again after a crash. */
  readonly registry: ChildRegistry;
  /** This process among all that ever executed runs. */
  readonly workerId: string;
  /** Earlier workers of this directory that are dead for certain. */
  readonly deadWorkerIds: string[];
  /** In the runtime directory, of this process alone: private servers of runs put their sockets there. */
  readonly socketDirectory: string;
  readonly adminTokenFile: string;
  /** The runs of the dead workers were cleaned up. */
  forgetDeadWorkers(): Promise<void>;
}

/**
 * Takes the state directory for this process. CONFLICT while another daemon lives on it. Ends the
 * children an earlier daemon left behind, and removes their sockets. `holdfastd.lock` tells people and
 * scripts which process has the directory; what decides are the records in `workers`.
 */
export async function openStateDirectory(
  directory: string,
  runtimeDirectory: string,
): Promise<StateDirectory> {
  const workersDirectory = path.join(directory, 'workers');
  await mkdir(workersDirectory, { recursive: true, mode: 0o700 });
  const self = await describeSelf();
  const workerId = newUlid();
  const deadWorkerIds = await enter(workersDirectory, workerId, self);
  const lockFile = path.join(directory, 'holdfastd.lock');
  await writePrivate(lockFile, JSON.stringify(self));
  const registry = new ChildRegistry(path.join(directory, 'children'));
  await registry.reap();
  const socketDirectoryOf = (id: string): string =>
    path.join(runtimeDirectory, `w-${id.slice(-SOCKET_DIRECTORY_CHARACTERS)}`);
  for (const id of deadWorkerIds) await rm(socketDirectoryOf(id), { recursive: true, force: true });
  const socketDirectory = socketDirectoryOf(workerId);
  await mkdir(socketDirectory, { recursive: true, mode: 0o700 });
  return {
    path: directory,
    registry,
    workerId,
    deadWorkerIds,
    socketDirectory,
    adminTokenFile: path.join(directory, 'admin-token'),
    async forgetDeadWorkers() {
      for (const id of deadWorkerIds) await rm(path.join(workersDirectory, id), { force: true });
    },
    async [Symbol.asyncDispose]() {
      await rm(socketDirectory, { recursive: true, force: true });
      await rm(lockFile, { force: true });
      await rm(path.join(workersDirectory, workerId), { force: true });
    },
  };
}

/**
 * Records this process and answers the workers that are dead. Everybody writes first and looks after,
 * so of two that start at once at least one sees the other; the one with the greater id gives way at
 * once, the other waits for that, or gives way too.
 */
async function enter(directory: string, workerId: string, self: ProcessRecord): Promise<string[]> {
  refuse((await look(directory, workerId)).alive, directory);
  const file = path.join(directory, workerId);
  await writePrivate(file, JSON.stringify(self));
  try {
    return await pollUntil(
      async () => {
        const workers = await look(directory, workerId);
        refuse(
          workers.alive.filter(({ id }) => id < workerId),
          directory,
        );
        return workers.alive.length === 0 ? workers.dead : undefined;
      },
      { timeoutMs: RIVAL_TIMEOUT_MS, what: 'another daemon giving way' },
    );
  } catch (error) {
    await rm(file, { force: true });
    if (!isErrorCode(error, 'TIMEOUT')) throw error;
    throw new AppError('CONFLICT', `another holdfastd starts on ${path.dirname(directory)}`, {
      cause: error,
    });
  }
}

interface LivingWorker {
  id: string;
  pid: number;
}

function refuse([other]: LivingWorker[], directory: string): void {
  if (other === undefined) return;
  throw new AppError('CONFLICT', `another holdfastd (pid ${other.pid}) uses ${path.dirname(directory)}`);
}

/** The other workers by their records, which name pid and start time: a recycled pid does not count. */
async function look(directory: string, self: string): Promise<{ alive: LivingWorker[]; dead: string[] }> {
  const alive: LivingWorker[] = [];
  const dead: string[] = [];
  for (const id of await readdir(directory)) {
    if (id === self || !isUlid(id)) continue;
    const record = await readRecord(path.join(directory, id));
    if (record !== null && (await isSameProcess(record))) alive.push({ id, pid: record.pid });
    else dead.push(id);
  }
  return { alive, dead };
}

/** Null for a record that is gone, or that a crash cut short: it names nobody. */
async function readRecord(file: string): Promise<ProcessRecord | null> {
  try {
    return JSON.parse(await readFile(file, 'utf8')) as ProcessRecord;
  } catch (error) {
    if (errnoOf(error) === 'ENOENT' || error instanceof SyntaxError) return null;
    throw error;
  }
}

/** Writes a file only its owner may read, whole or not at all. */
export async function writePrivate(file: string, text: string): Promise<void> {
  const temporary = `${file}.new`;
  await rm(temporary, { force: true });
  const handle = await open(temporary, 'wx', 0o600);
  try {
    await handle.writeFile(text);
    await handle.sync();
  } finally {
    await handle.close();
  }
  await rename(temporary, file);
}

async function describeSelf(): Promise<ProcessRecord> {
  const startTime = await processStartTime(process.pid);
  if (startTime === undefined) throw new AppError('INTERNAL', 'this process has no entry in /proc');
  return { pid: process.pid, startTime };
}
