import { CleanupStack } from '../../lib/cleanup.js';
import { AppError } from '../../lib/errors.js';
import { parseLibvirtUri } from '../../libvirt/libvirt-uri.js';
import type { LibvirtLink } from './domain-link.js';
import type { HypervisorHost } from './hypervisor-host.js';
import { openLocalHost } from './local-host.js';
import { openSshHost, type SshHostOptions } from './ssh-host.js';

/** A libvirt and the host it runs on, for the time of an operation. Disposal ends what leads there. */
export interface LibvirtConnection extends AsyncDisposable {
  readonly link: LibvirtLink;
  readonly host: HypervisorHost;
}

/** As libvirt itself looks for them: of the daemon for QEMU alone, then of the one for everything. */
const SOCKETS = ['/run/libvirt/virtqemud-sock', '/run/libvirt/libvirt-sock'];

/**
 * Opens a connection URI that came from a user. The socket of a libvirt behind ssh is forwarded: virsh's own ssh would
 * know nothing of our deadlines, and be a login for each command. Rejects with INVALID_INPUT for a URI that cannot be
 * used, else as `openSshHost`; SOURCE_UNREACHABLE when no libvirt is there.
 */
export async function openConnection(uri: string, options: SshHostOptions): Promise<LibvirtConnection> {
  const { host: address, socket } = parseLibvirtUri(uri);
  const { timeoutMs } = options;
  if (address === null) {
    const host = openLocalHost({ timeoutMs });
    const close = async (): Promise<void> => host[Symbol.asyncDispose]();
    return { link: { uri, isLocal: true, timeoutMs, lost: null }, host, [Symbol.asyncDispose]: close };
  }
  await using undo = new CleanupStack();
  const host = undo.use(await openSshHost(address, options));
  const wanted = socket === null ? SOCKETS : [socket];
  const found = await host.findSocket(wanted, options);
  if (found === null) {
    throw new AppError('SOURCE_UNREACHABLE', `no libvirt daemon is there: no socket ${wanted.join(' or ')}`);
  }
  const { path, lost } = undo.use(await host.reach(found, options));
  const local = `qemu+unix:///system?socket=${encodeURIComponent(path)}`;
  const steps = undo.move();
  const close = (): Promise<void> => steps.run();
  return { link: { uri: local, isLocal: false, timeoutMs, lost }, host, [Symbol.asyncDispose]: close };
}
