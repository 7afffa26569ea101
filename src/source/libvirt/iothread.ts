import { z } from 'zod';
import { AppError } from '../../lib/errors.js';
import type { Domain } from '../../libvirt/domain.js';
import { askDomain, type DomainLink } from './domain-link.js';

const versionSchema = z.object({
  return: z.object({ qemu: z.object({ major: z.int(), minor: z.int() }) }),
});

/** QEMU 7.2 was seen to die here; mended in 9.0 ("nbd/server: only traverse NBDExport->clients from main loop thread"). */
const FIRST_SAFE_MAJOR = 9;

/**
 * QEMU before 9.0 aborts, and the guest with it, when an NBD client leaves the export of a disk that an
 * iothread serves. SOURCE_REFUSED for such disks. The running QEMU itself is asked: it may be older than what
 * is installed by now.
 */
export async function refuseDeadlyThreads(
  { link, domain }: { link: DomainLink; domain: Domain },
  targets: readonly string[],
  control: { signal: AbortSignal },
): Promise<void> {
  const served = domain.disks.filter(({ target, hasIothread }) => hasIothread && targets.includes(target));
  if (served.length === 0) return;
  const command = JSON.stringify({ execute: 'query-version' });
  const answer = await askDomain(link, ['qemu-monitor-command', '--cmd', command], control);
  const { qemu } = versionSchema.parse(JSON.parse(answer)).return;
  if (qemu.major >= FIRST_SAFE_MAJOR) return;
  const names = served.map(({ target }) => target).join(', ');
  throw new AppError(
    'SOURCE_REFUSED',
    `QEMU ${qemu.major}.${qemu.minor} would end the machine when a backup of a disk with an iothread (${names}) ends; exclude such disks, remove their iothread, or run the machine with QEMU 9.0 or newer`,
    { details: { targets: served.map(({ target }) => target) } },
  );
}
