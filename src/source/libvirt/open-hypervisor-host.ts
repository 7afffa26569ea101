import { parseLibvirtUri } from '../../libvirt/libvirt-uri.js';
import type { HypervisorHost } from './hypervisor-host.js';
import { openLocalHost } from './local-host.js';
import { openSshHost, type SshHostOptions } from './ssh-host.js';

/** The host of the daemon behind a connection URI. INVALID_INPUT for a URI that none can be reached by. */
export async function openHypervisorHost(uri: string, options: SshHostOptions): Promise<HypervisorHost> {
  const { host } = parseLibvirtUri(uri);
  if (host === null) return openLocalHost(options);
  // libvirt's own ssh transport has no such parameter: for this one it is ours.
  const knownHostsFile = new URL(uri).searchParams.get('known_hosts');
  return openSshHost({ ...host, knownHostsFile }, options);
}
