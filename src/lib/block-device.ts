import { constants } from 'node:fs';
import { open, readFile, readdir, readlink, stat } from 'node:fs/promises';
import path from 'node:path';
import { z } from 'zod';
import { errnoOf } from './errors.js';
import { runTool } from './process.js';

const TIMEOUT_MS = 30_000;
/** What is not there, or went while it was looked at. */
const GONE = new Set(['ENOENT', 'ENOTDIR', 'ENODEV', 'ENXIO', 'ESRCH', 'EACCES', 'EINVAL']);

/** Exact bytes of a block device, as the kernel says. The path must be absolute. */
export async function blockDeviceBytes(device: string): Promise<number> {
  const { stdout } = await runTool('blockdev', ['--getsize64', device], { timeoutMs: TIMEOUT_MS });
  return z.coerce.number().int().nonnegative().parse(stdout.trim());
}

/** `major:minor` as sysfs and mountinfo write it, of what the kernel packs for user space (makedev(3)). */
export function formatDeviceNumber(rdev: number): string {
  const major = Math.floor(rdev / 256) & 0xfff;
  const minor = (rdev & 0xff) | ((rdev >>> 12) & 0xfff00);
  return `${major}:${minor}`;
}

/** major:minor of a block device, links followed; null for anything else and for what is not there. */
export async function findDeviceNumber(file: string): Promise<string | null> {
  const facts = await orNull(stat(file));
  return facts?.isBlockDevice() === true ? formatDeviceNumber(facts.rdev) : null;
}

/** Answers for many devices, as things were when it was read. */
export interface DeviceUsage {
  /**
   * By what the device or a partition of it is in use, as phrases for a sentence: mounted (in any namespace of
   * this host that can be seen), swap, held by LVM, md or the like, behind a loop device. A holder that
   * shows itself nowhere is found only by `isHeldExclusively`.
   */
  usersOf(deviceNumber: string): Promise<string[]>;
}

export async function readDeviceUsage(): Promise<DeviceUsage> {
  const uses = new Map<string, Set<string>>();
  const add = (number: string | null, use: string): void => {
    if (number === null) return;
    const known = uses.get(number) ?? new Set();
    uses.set(number, known.add(use));
  };
  for (const { number, mountPoint } of await listMounts())
    add(number, `mounted at ${mountPoint.replaceAll(/\p{Cc}/gu, '\ufffd')}`);
  for (const file of await listSwaps()) add(await findDeviceNumber(file), 'swap space');
  for (const { name, backing } of await listLoops()) add(await findDeviceNumber(backing), `held by ${name}`);
  return {
    async usersOf(deviceNumber) {
      const users: string[] = [];
      for (const number of await withPartitions(deviceNumber)) {
        const holders = (await orNull(readdir(`/sys/dev/block/${number}/holders`))) ?? [];
        users.push(...(uses.get(number) ?? []), ...holders.map((name) => `held by ${name}`));
      }
      return [...new Set(users)];
    },
  };
}

let exclusive: Promise<unknown> = Promise.resolve();

/**
 * True when the kernel itself uses the device: a mount in a namespace that cannot be seen, swap, LVM. O_EXCL
 * without O_CREAT fails with EBUSY then (open(2)). The question holds the device for a moment, so it is for whoever
 * is about to take it into use, and asked by one at a time. Other errors of the open are thrown as they are.
 */
export function isHeldExclusively(file: string, access: 'read' | 'write'): Promise<boolean> {
  const flags = (access === 'read' ? constants.O_RDONLY : constants.O_RDWR) | constants.O_EXCL;
  const ask = async (): Promise<boolean> => {
    try {
      const handle = await open(file, flags);
      await handle.close();
      return false;
    } catch (error) {
      if (errnoOf(error) === 'EBUSY') return true;
      throw error;
    }
  };
  const answer = exclusive.then(ask, ask);
  exclusive = answer.catch(() => undefined);
  return answer;
}

/**
 * qemu's words when a qemu has the device open for writing, null when none has. A guest's qemu opens its disk
 * without O_EXCL but holds qemu's own locks on it. For a raw disk `qemu-img` looks at them only when it is told not to
 * share: that is what `blkdebug` is here for (seen with 7.2).
 */
export async function findQemuLock(filename: string): Promise<string | null> {
  const image = { driver: 'host_device', filename };
  const file = { driver: 'blkdebug', image, 'unshare-child-perms': ['write', 'resize'] };
  const node = `json:${JSON.stringify({ driver: 'raw', file })}`;
  const info = await runTool('qemu-img', ['info', '--output=json', '--', node], {
    timeoutMs: TIMEOUT_MS,
    acceptExitCodes: [0, 1],
  });
  return info.exitCode === 0 ? null : info.stderr.trim().slice(-500);
}

/** The device and its partitions, which are folders with a `dev` file below it in sysfs. */
async function withPartitions(deviceNumber: string): Promise<string[]> {
  const folder = `/sys/dev/block/${deviceNumber}`;
  const numbers = [deviceNumber];
  for (const name of (await orNull(readdir(folder))) ?? []) {
    if ((await readText(path.join(folder, name, 'partition'))) === null) continue;
    const number = await readText(path.join(folder, name, 'dev'));
    if (number !== null) numbers.push(number);
  }
  return numbers;
}

/** Of every mount namespace that a process is in. See proc(5) for the fields. */
async function listMounts(): Promise<{ number: string | null; mountPoint: string }[]> {
  const mounts = [];
  for (const file of await listMountinfos()) {
    for (const line of ((await readText(file)) ?? '').split('\n')) {
      const [fields = '', source = ''] = line.split(' - ');
      const [, , number = '', , mountPoint = ''] = fields.split(' ');
      // btrfs shows a number that is no device's.
      const device = source.split(' ')[1] ?? '';
      const isAnonymous = number.startsWith('0:') && device.startsWith('/dev/');
      if (number !== '')
        mounts.push({ number: isAnonymous ? await findDeviceNumber(device) : number, mountPoint });
    }
  }
  return mounts;
}

async function listMountinfos(): Promise<string[]> {
  const files = new Map<string, string>([['own', '/proc/self/mountinfo']]);
  const own = await orNull(readlink('/proc/self/ns/mnt'));
  for (const name of await readdir('/proc')) {
    if (!/^\d+$/.test(name)) continue;
    const namespace = await orNull(readlink(`/proc/${name}/ns/mnt`));
    if (namespace !== null && namespace !== own && !files.has(namespace)) {
      files.set(namespace, `/proc/${name}/mountinfo`);
    }
  }
  return [...files.values()];
}

async function listSwaps(): Promise<string[]> {
  const lines = ((await readText('/proc/swaps')) ?? '').split('\n').slice(1);
  return lines.map((line) => line.split(/\s/)[0] ?? '').filter((file) => file.startsWith('/dev/'));
}

/** A loop device over a device neither claims it nor shows as its holder. */
async function listLoops(): Promise<{ name: string; backing: string }[]> {
  const loops = [];
  for (const name of (await orNull(readdir('/sys/block'))) ?? []) {
    if (!name.startsWith('loop')) continue;
    const backing = await readText(`/sys/block/${name}/loop/backing_file`);
    if (backing !== null) loops.push({ name, backing });
  }
  return loops;
}

/** A file of sysfs or procfs, without the line end; null when it is not there (any more). */
export async function readText(file: string): Promise<string | null> {
  return (await orNull(readFile(file, 'utf8')))?.trimEnd() ?? null;
}

async function orNull<T>(work: Promise<T>): Promise<T | null> {
  try {
    return await work;
  } catch (error) {
    if (GONE.has(errnoOf(error) ?? '')) return null;
    throw error;
  }
}
