import { stat } from 'node:fs/promises';
import { AppError } from '../../lib/errors.js';
import { runTool, ToolError } from '../../lib/process.js';
import type { DomainDisk } from '../../libvirt/domain-disk.js';
import type { DomainLink } from './domain-link.js';
import type { HypervisorHost } from './hypervisor-host.js';
import { readImageInfo } from './image-info.js';

/**
 * Takes a bitmap out of the image of a machine that is off, where there is one of that name. Only in a local
 * regular file: QEMU's own lock keeps out whoever has it open, while a block device may be in use on another
 * host. SOURCE_REFUSED for any other image, SOURCE_BUSY when it is in use.
 */
export async function removeStoredBitmap(
  { link, host }: { link: DomainLink; host: HypervisorHost },
  { disk, bitmap }: { disk: DomainDisk; bitmap: string },
  control: { signal?: AbortSignal | undefined },
): Promise<void> {
  if (disk.format !== 'qcow2' || disk.isReadOnly || disk.location.text === '') return;
  const file = disk.location.path;
  const options = {
    timeoutMs: link.timeoutMs,
    signal: control.signal ?? AbortSignal.timeout(link.timeoutMs),
  };
  const info = host.kind === 'local' && file !== null ? await readImageInfo(file, options) : null;
  if (info?.bitmaps.every(({ name }) => name !== bitmap) === true) return;
  if (info === null || file === null || !(await stat(file)).isFile()) throw outOfReach(disk, bitmap);
  try {
    await runTool('qemu-img', ['bitmap', '--remove', '-f', 'qcow2', '--', file, bitmap], options);
  } catch (error) {
    if (!(error instanceof ToolError)) throw error;
    const code = error.stderrTail.includes('lock') ? 'SOURCE_BUSY' : 'SOURCE_REFUSED';
    throw new AppError(code, `${file}: ${error.message}`, { cause: error });
  }
}

function outOfReach(disk: DomainDisk, bitmap: string): AppError {
  return new AppError(
    'SOURCE_REFUSED',
    `${bitmap} cannot be removed from disk ${disk.target} while the machine is off: its image is no file of this host that can be read; start the machine first`,
    { details: { target: disk.target, location: disk.location.text } },
  );
}
