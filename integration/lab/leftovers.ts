import { readFile, readdir, readlink } from 'node:fs/promises';
import path from 'node:path';
import { errnoOf } from '../../src/lib/errors.js';

/** Gone between listing and looking, or not ours to look into. */
const VANISHED = new Set(['ENOENT', 'ESRCH', 'EACCES', 'EINVAL']);

async function orElse<T>(read: Promise<T>, fallback: T): Promise<T> {
  try {
    return await read;
  } catch (error) {
    if (VANISHED.has(errnoOf(error) ?? '')) return fallback;
    throw error;
  }
}

/**
 * What a run left behind that concerns `directory`: processes that name it on their command line, work in
 * it or hold a file of it open, mounts and loop devices on it, sockets and unfinished layers in it. One readable
 * line each; a test expects none. `except` are pids of servers that the test still runs itself.
 */
export async function findLeftovers(
  directory: string,
  options: { except?: readonly number[] } = {},
): Promise<string[]> {
  const except = new Set([process.pid, process.ppid, ...(options.except ?? [])]);
  return [
    ...(await findProcesses(directory, except)),
    ...(await findMounts(directory)),
    ...(await findLoopDevices(directory)),
    ...(await findFiles(directory)),
  ];
}

async function findProcesses(directory: string, except: ReadonlySet<number>): Promise<string[]> {
  const found: string[] = [];
  for (const name of await readdir('/proc')) {
    const pid = Number(name);
    if (!Number.isInteger(pid) || except.has(pid)) continue;
    const commandLine = (await orElse(readFile(`/proc/${pid}/cmdline`, 'utf8'), ''))
      .replaceAll('\0', ' ')
      .trim();
    if (commandLine.includes(directory) || (await holds(pid, directory)))
      found.push(`process ${pid}: ${commandLine}`);
  }
  return found;
}

async function holds(pid: number, directory: string): Promise<boolean> {
  const inside = (target: string): boolean => target === directory || target.startsWith(`${directory}/`);
  if (inside(await orElse(readlink(`/proc/${pid}/cwd`), ''))) return true;
  for (const descriptor of await orElse(readdir(`/proc/${pid}/fd`), [])) {
    if (inside(await orElse(readlink(`/proc/${pid}/fd/${descriptor}`), ''))) return true;
  }
  return false;
}

/** Processes that this one started, directly or through others, and that live or were never waited for. */
export async function findDescendants(root: number = process.pid): Promise<number[]> {
  const children: number[] = [];
  for (const task of await orElse(readdir(`/proc/${root}/task`), [])) {
    const text = await orElse(readFile(`/proc/${root}/task/${task}/children`, 'utf8'), '');
    for (const pid of text.split(' ').filter((part) => part !== '')) children.push(Number(pid));
  }
  const deeper = await Promise.all(children.map((pid) => findDescendants(pid)));
  return [...children, ...deeper.flat()];
}

async function findMounts(directory: string): Promise<string[]> {
  const lines = (await readFile('/proc/self/mountinfo', 'utf8')).split('\n');
  return lines.filter((line) => line.includes(directory)).map((line) => `mount: ${line}`);
}

async function findLoopDevices(directory: string): Promise<string[]> {
  const found: string[] = [];
  for (const name of await orElse(readdir('/sys/block'), [])) {
    if (!name.startsWith('loop')) continue;
    const file = await orElse(readFile(`/sys/block/${name}/loop/backing_file`, 'utf8'), '');
    if (file.includes(directory)) found.push(`loop device /dev/${name}: ${file.trim()}`);
  }
  return found;
}

async function findFiles(directory: string): Promise<string[]> {
  const entries = await orElse(readdir(directory, { recursive: true, withFileTypes: true }), []);
  return entries
    .filter((entry) => entry.isSocket() || entry.name.startsWith('.partial-') || entry.name.endsWith('.tmp'))
    .map((entry) => `${entry.isSocket() ? 'socket' : 'file'}: ${path.join(entry.parentPath, entry.name)}`);
}

/**
 * What a backup left behind in a running QEMU: jobs, exports, filter nodes, and dirty bitmaps whose names `isOurs`
 * matches. One readable line each. `qmp` runs a command in that QEMU.
 */
export async function findBlockLeftovers(
  qmp: (command: string) => Promise<unknown>,
  options: { isOurs?: RegExp } = {},
): Promise<string[]> {
  const ask = async (command: string): Promise<BlockFact[]> => (await qmp(command)) as BlockFact[];
  const [jobs, exports, nodes] = [
    await ask('query-jobs'),
    await ask('query-block-exports'),
    await ask('query-named-block-nodes'),
  ];
  const isOurs = options.isOurs ?? /./;
  return [
    ...jobs.map(({ id }) => `job ${id}`),
    ...exports.map(({ id }) => `export ${id}`),
    ...nodes
      .filter(({ drv }) => drv === 'copy-before-write' || drv === 'snapshot-access')
      .map((node) => `node ${node['node-name']} (${node.drv})`),
    ...nodes.flatMap((node) =>
      (node['dirty-bitmaps'] ?? [])
        .filter(({ name }) => name !== undefined && isOurs.test(name))
        .map(({ name }) => `bitmap ${node['node-name']}/${name}`),
    ),
  ];
}

interface BlockFact {
  id?: string;
  drv?: string;
  'node-name'?: string;
  'dirty-bitmaps'?: { name?: string }[];
}
