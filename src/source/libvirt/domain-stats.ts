import type { VmState } from '../source.js';

/** One domain of `virsh domstats --raw --state --block`. */
export interface DomainStats {
  name: string;
  /** virDomainState. */
  state: number;
  /** What the number means depends on the state, e.g. virDomainShutoffReason. */
  reason: number;
  /** Exact virtual size by target, as far as libvirt knows it. */
  capacities: Map<string, number>;
  /** Bytes the top image of an active domain takes on its storage, by target. */
  physical: Map<string, number>;
}

export const SHUTOFF_STATE = 5;
/** virDomainShutoffReason: a start was tried and failed. */
export const START_FAILED = 6;
/** virDomainShutoffReason: its memory was saved, so its filesystems are as of a running machine. */
export const SAVED = 5;

/** Reads the answer; lines that are not understood are left out (newer versions tell more). */
export function parseDomainStats(text: string): DomainStats[] {
  const found: DomainStats[] = [];
  const targets = new Map<string, string>();
  for (const line of text.split('\n')) {
    const heading = /^Domain: '(.*)'$/.exec(line);
    if (heading?.[1] !== undefined) {
      found.push({ name: heading[1], state: 0, reason: 0, capacities: new Map(), physical: new Map() });
      targets.clear();
      continue;
    }
    const at = found.at(-1);
    const pair = /^\s+([\w.]+)=(.*)$/.exec(line);
    if (at !== undefined && pair !== null) readPair(at, targets, [pair[1] ?? '', pair[2] ?? '']);
  }
  return found;
}

function readPair(stats: DomainStats, targets: Map<string, string>, [key, value]: [string, string]): void {
  if (key === 'state.state') stats.state = Number(value);
  if (key === 'state.reason') stats.reason = Number(value);
  const [, index, fact] = /^block\.(\d+)\.(name|capacity|physical)$/.exec(key) ?? [];
  if (index === undefined) return;
  if (fact === 'name') targets.set(index, value);
  const target = targets.get(index);
  const number = Number(value);
  if (target === undefined || fact === 'name' || !Number.isSafeInteger(number)) return;
  (fact === 'capacity' ? stats.capacities : stats.physical).set(target, number);
}

/** virDomainState in our words. A crashed machine may still have its QEMU, which is then kept for looking at. */
export function vmState(state: number, isActive: boolean): VmState {
  if (!isActive) return 'off';
  if (state === 1 || state === 2) return 'running';
  return state === 3 ? 'paused' : 'other';
}
