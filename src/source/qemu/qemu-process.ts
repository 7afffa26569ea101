import { readdir, readFile, readlink, stat } from 'node:fs/promises';
import { errnoOf } from '../../lib/errors.js';

/** Ended meanwhile, or nothing we may look into. */
const NOT_TO_BE_SEEN = new Set(['ENOENT', 'ESRCH', 'EACCES', 'EPERM']);

/**
 * The user a QEMU runs as, which must be able to open scratch files: of the process that has the QMP
 * socket, or, where that one is not to be found (another network namespace), of the socket's file.
 */
export async function ownerOfSocket(socketPath: string): Promise<{ uid: number; gid: number }> {
  const inodes = listeningInodes(await readFile('/proc/net/unix', 'utf8'), socketPath);
  for (const pid of inodes.size === 0 ? [] : await readdir('/proc')) {
    if (/^\d+$/.test(pid) && (await hasSocket(pid, inodes))) {
      const { uid, gid } = await stat(`/proc/${pid}`);
      return { uid, gid };
    }
  }
  const { uid, gid } = await stat(socketPath);
  return { uid, gid };
}

/** Lines of /proc/net/unix: Num RefCount Protocol Flags Type St Inode Path; the path is as it was bound. */
export function listeningInodes(table: string, socketPath: string): Set<string> {
  const inodes = new Set<string>();
  for (const line of table.split('\n')) {
    const [, inode, bound] = /^(?:\S+ +){6}(\d+) (.+)$/.exec(line) ?? [];
    if (inode !== undefined && bound === socketPath) inodes.add(inode);
  }
  return inodes;
}

async function hasSocket(pid: string, inodes: ReadonlySet<string>): Promise<boolean> {
  try {
    for (const descriptor of await readdir(`/proc/${pid}/fd`)) {
      const target = await readlink(`/proc/${pid}/fd/${descriptor}`);
      const inode = /^socket:\[(\d+)\]$/.exec(target)?.[1];
      if (inode !== undefined && inodes.has(inode)) return true;
    }
    return false;
  } catch (error) {
    if (NOT_TO_BE_SEEN.has(errnoOf(error) ?? '')) return false;
    throw error;
  }
}
