import { lstat, mkdtemp, readdir, rm } from 'node:fs/promises';
import os from 'node:os';
import path from 'node:path';
import { errnoOf } from '../lib/errors.js';
import { isSameProcess, processStartTime } from '../lib/process.js';

const NAME = /^holdfast-capture-(\d{1,10})-(\d{1,20})-/;

export interface PrivateDirectory extends AsyncDisposable {
  readonly path: string;
}

/**
 * A directory for sockets that only this user may enter, in the system's place for temporary files. Its name tells whose
 * it is, so that those of agents that were killed are removed by the next one.
 */
export async function makePrivateDirectory(): Promise<PrivateDirectory> {
  const parent = os.tmpdir();
  await removeAbandoned(parent);
  const startTime = (await processStartTime(process.pid)) ?? '0';
  const directory = await mkdtemp(path.join(parent, `holdfast-capture-${process.pid}-${startTime}-`));
  return {
    path: directory,
    [Symbol.asyncDispose]: () => rm(directory, { recursive: true, force: true }),
  };
}

async function removeAbandoned(parent: string): Promise<void> {
  for (const name of await readdir(parent)) {
    const [, pid, startTime] = NAME.exec(name) ?? [];
    if (pid === undefined || startTime === undefined) continue;
    const directory = path.join(parent, name);
    if (!(await isOurs(directory)) || (await isSameProcess({ pid: Number(pid), startTime }))) continue;
    await rm(directory, { recursive: true, force: true });
  }
}

/** Others may give their files any name there. */
async function isOurs(directory: string): Promise<boolean> {
  try {
    const facts = await lstat(directory);
    return facts.isDirectory() && facts.uid === process.getuid?.();
  } catch (error) {
    if (errnoOf(error) === 'ENOENT') return false;
    throw error;
  }
}
