import { mkdir, open, readFile, readdir, rename, rm, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { AppError, errnoOf } from './lib/errors.js';
import { newId, newUlid, type ApplianceId } from './lib/id.js';
import { ChildRegistry, isSameProcess, processStartTime } from './lib/process.js';

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
  readonly adminTokenFile: string;
  /** The runs of the dead workers were cleaned up. */
  forgetDeadWorkers(): Promise<void>;
}

/**
 * Takes the state directory for this process. CONFLICT while another daemon lives on it. Ends the
 * children an earlier daemon left behind.
 */
export async function openStateDirectory(directory: string): Promise<StateDirectory> {
  const workersDirectory = path.join(directory, 'workers');
  await mkdir(workersDirectory, { recursive: true, mode: 0o700 });
  const self = await describeSelf();
  const lockFile = path.join(directory, 'holdfastd.lock');
  await lock(lockFile, self);
  const registry = new ChildRegistry(path.join(directory, 'children'));
  await registry.reap();
  const deadWorkerIds = await readdir(workersDirectory);
  const workerId = newUlid();
  await writeFile(path.join(workersDirectory, workerId), JSON.stringify(self), { mode: 0o600 });
  return {
    path: directory,
    registry,
    workerId,
    deadWorkerIds,
    adminTokenFile: path.join(directory, 'admin-token'),
    async forgetDeadWorkers() {
      for (const id of deadWorkerIds) await rm(path.join(workersDirectory, id), { force: true });
    },
    async [Symbol.asyncDispose]() {
      await rm(path.join(workersDirectory, workerId), { force: true });
      await rm(lockFile, { force: true });
    },
  };
}

/** The id under which this installation owns its repositories; made at the first start. */
export async function readApplianceId(directory: string): Promise<ApplianceId> {
  const file = path.join(directory, 'appliance-id');
  try {
    return (await readFile(file, 'utf8')).trim() as ApplianceId;
  } catch (error) {
    if (errnoOf(error) !== 'ENOENT') throw error;
  }
  const id = newId<ApplianceId>();
  await writePrivate(file, `${id}\n`);
  return id;
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

/** A lock left by a dead process is taken over; the record names pid and start time, so a recycled pid does not count. */
async function lock(file: string, self: ProcessRecord): Promise<void> {
  for (let attempt = 0; attempt < 2; attempt += 1) {
    try {
      await writeFile(file, JSON.stringify(self), { flag: 'wx', mode: 0o600 });
      return;
    } catch (error) {
      if (errnoOf(error) !== 'EEXIST') throw error;
    }
    const holder = await readHolder(file);
    if (holder !== null && (await isSameProcess(holder))) {
      throw new AppError('CONFLICT', `another holdfastd (pid ${holder.pid}) uses ${path.dirname(file)}`);
    }
    await rm(file, { force: true });
  }
  throw new AppError('CONFLICT', `two daemons start on ${path.dirname(file)} at the same time`);
}

/** A record cut short by a crash names nobody. */
async function readHolder(file: string): Promise<ProcessRecord | null> {
  try {
    return JSON.parse(await readFile(file, 'utf8')) as ProcessRecord;
  } catch (error) {
    if (errnoOf(error) === 'ENOENT' || error instanceof SyntaxError) return null;
    throw error;
  }
}
