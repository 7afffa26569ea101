import { virsh } from '../../libvirt/virsh.js';
import { AppError } from '../../lib/errors.js';
import { commandText, readAnswer, type GuestAgent } from '../agent-protocol.js';
import type { FreezableGuest } from '../guest-freeze.js';
import { armGuestTimer } from '../guest-timer.js';
import { armGuard } from '../thaw-guard.js';
import type { DomainLink } from './domain-link.js';

export interface LibvirtGuestOptions extends Omit<DomainLink, 'timeoutMs' | 'lost'> {
  agentTimeoutMs: number;
}

/** A domain whose agent libvirt talks to. */
export function openLibvirtGuest(options: LibvirtGuestOptions): FreezableGuest {
  const { uri, uuid, run = virsh } = options;
  const domain = ['--domain', uuid];
  return {
    ping: async ({ signal }) => {
      // Any command of the agent would do. Of one that hangs libvirt waits for the answer for minutes.
      await run(['domtime', ...domain], { uri, timeoutMs: options.agentTimeoutMs, signal });
    },
    freeze: async (control) =>
      readCount(await run(['domfsfreeze', ...domain], { uri, withRemarks: true, ...control })),
    thaw: async (control) =>
      readCount(await run(['domfsthaw', ...domain], { uri, withRemarks: true, ...control })),
    guard: async (limitMs) => {
      if (!options.isLocal) {
        return armGuestTimer(libvirtAgent(options), { limitMs, callTimeoutMs: options.agentTimeoutMs });
      }
      const undo = ['virsh', '--connect', uri, 'domfsthaw', ...domain];
      const guard = await armGuard({ undo, limitMs });
      return { kind: 'process', reason: null, disarm: () => guard.disarm() };
    },
  };
}

/** `Froze 2 filesystem(s)`, `Thawed 2 filesystem(s)`. */
function readCount(output: string): number {
  const match = /\b(\d+) filesystem/.exec(output);
  if (match === null) throw new AppError('SOURCE_REFUSED', 'virsh gave no number of filesystems');
  return Number(match[1]);
}

/** libvirt marks a domain whose agent was talked to like this as tainted, in its log and in `virsh dominfo`. */
export function libvirtAgent({ uri, uuid }: Pick<DomainLink, 'uri' | 'uuid'>): GuestAgent {
  return {
    execute: async (command, parameters, { timeoutMs, signal }) => {
      const seconds = String(Math.max(1, Math.ceil(timeoutMs / 1000)));
      const call = ['--timeout', seconds, '--cmd', commandText(command, parameters)];
      const args = ['qemu-agent-command', '--domain', uuid, ...call];
      return readAnswer(command, await virsh(args, { uri, timeoutMs, signal }));
    },
  };
}
