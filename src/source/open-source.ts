import { openDisksSource } from './disks-source.js';
import { discoverDomains } from './libvirt/discover.js';
import { openLibvirtSource } from './libvirt/libvirt-source.js';
import { openQemuSource } from './qemu/qemu-source.js';
import type { SourceOptions } from './source-settings.js';
import type { DiscoveredVm, MachineSource, UnseenMachine, Source, VmSource } from './source.js';

/** The source of a VM: its hypervisor where it has one, else its disks for themselves. Touches nothing yet. */
export function openSource(source: VmSource | null, options: SourceOptions): Source {
  return source === null ? openDisksSource(options) : openMachineSource(source, options);
}

/** The source of a machine at its hypervisor. */
export function openMachineSource(source: VmSource, options: SourceOptions): MachineSource {
  switch (source.kind) {
    case 'libvirt':
      return openLibvirtSource(source, options);
    case 'qemu':
      return openQemuSource(source, options);
  }
}

/** Where machines are looked for. `names` empty: all of a libvirt connection. */
export type DiscoveryPlace =
  | { kind: 'libvirt'; uri: string; names: string[] }
  | { kind: 'qemu'; socket: string; agentSocket: string | null };

/**
 * The machines of a hypervisor as they are now. Named ones that are not there are left out; of a whole
 * connection those that cannot be looked at now are answered apart.
 */
export async function discoverMachines(
  place: DiscoveryPlace,
  options: SourceOptions,
  signal: AbortSignal,
): Promise<{ found: DiscoveredVm[]; unseen: UnseenMachine[] }> {
  if (place.kind === 'qemu') {
    return { found: [await openMachineSource(place, options).discover({ signal })], unseen: [] };
  }
  const { uri, names } = place;
  const unseen: UnseenMachine[] = [];
  const onUnseen = (machine: UnseenMachine): void => {
    unseen.push(machine);
  };
  const found = await discoverDomains(uri, {
    names,
    options,
    signal,
    ...(names.length === 0 ? { onUnseen } : {}),
  });
  return { found, unseen };
}
