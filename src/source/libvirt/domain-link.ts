import { virsh } from '../../libvirt/virsh.js';

/** One domain of one libvirt, and how long a command about it may take. */
export interface DomainLink {
  /** Connection URI as `virsh` takes it. */
  uri: string;
  uuid: string;
  timeoutMs: number;
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
  return virsh([name, '--domain', link.uuid, ...args], {
    uri: link.uri,
    timeoutMs: link.timeoutMs,
    signal: control.signal,
  });
}
