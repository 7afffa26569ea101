import { virsh } from '../../libvirt/virsh.js';

/** One libvirt, and how long a command to it may take. */
export interface LibvirtLink {
  /** As `virsh` takes it: of this host, also where it leads to another. */
  uri: string;
  /** What libvirt says of files and devices holds on this host. */
  isLocal: boolean;
  timeoutMs: number;
  /** Aborts when what leads to another host is lost for good; null: the daemon is of this host and may come back. */
  lost: AbortSignal | null;
  /** Of a session that is open; default is a process for each command. */
  run?: typeof virsh;
}

/** One domain of it. */
export interface DomainLink extends LibvirtLink {
  uuid: string;
}

/**
 * Runs one virsh command about the domain; rejects as `virsh` does. Without a signal for what must be done
 * also after the run was given up.
 */
export function askDomain(
  link: DomainLink,
  command: readonly [string, ...string[]],
  control: { signal?: AbortSignal | undefined } = {},
): Promise<string> {
  const [name, ...args] = command;
  return (link.run ?? virsh)([name, '--domain', link.uuid, ...args], {
    uri: link.uri,
    timeoutMs: link.timeoutMs,
    signal: control.signal,
  });
}
