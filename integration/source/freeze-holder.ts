/**
 * A process that freezes a guest and keeps it frozen: `freeze-holder.ts libvirt URI UUID`, `freeze-holder.ts qemu SOCKET`.
 * Prints `frozen` when it is.
 */
import { takeFrozen } from '../../src/source/guest-freeze.js';
import { openLibvirtGuest } from '../../src/source/libvirt/libvirt-guest.js';
import { openQemuGuest } from '../../src/source/qemu/guest-agent.js';

const [kind = '', address = '', uuid = ''] = process.argv.slice(2);
const agentTimeoutMs = 5000;
const guest =
  kind === 'qemu'
    ? openQemuGuest(address, { agentTimeoutMs })
    : openLibvirtGuest({ uri: address, uuid, isLocal: true, agentTimeoutMs });
await takeFrozen(
  guest,
  { wish: 'require', limitMs: 60_000, note: () => undefined, signal: new AbortController().signal },
  () => {
    process.stdout.write('frozen\n');
    return new Promise((resolve) => setTimeout(resolve, 50_000));
  },
);
