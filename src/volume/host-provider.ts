import { runTool } from '../lib/process.js';
import { findNode, readDeviceFacts, type DeviceFacts } from './device-facts.js';
import { displayText, identitiesOf, type KnownDevice } from './identities.js';
import { LSBLK_COLUMNS, parseLsblk, type ListedDevice } from './lsblk.js';
import type { BlockDevice, VolumeProvider } from './provider.js';

const LIST_TIMEOUT_MS = 30_000;
/** Each is a process that reads the start and the end of a device. */
const PROBES_AT_ONCE = 4;
/** No place for a volume. */
const OTHER_TYPES = new Set(['rom']);

/** The block devices of this host. Needs root to look into them. */
export const hostProvider: VolumeProvider = {
  name: 'host',
  async list({ signal }) {
    const { stdout } = await runTool('lsblk', ['--json', '--bytes', '--output', LSBLK_COLUMNS], {
      timeoutMs: LIST_TIMEOUT_MS,
      signal,
    });
    const listed = await withNodes(parseLsblk(stdout));
    return describeDevices(await readAll(listed, signal));
  },
};

/** Those with a node that is theirs, under its canonical path. */
async function withNodes(listed: readonly ListedDevice[]): Promise<ListedDevice[]> {
  const devices: ListedDevice[] = [];
  for (const device of listed) {
    const node = await findNode(device);
    if (node !== null) devices.push({ ...device, path: node });
  }
  return devices;
}

async function readAll(devices: readonly ListedDevice[], signal: AbortSignal): Promise<KnownDevice[]> {
  const facts = new Map<ListedDevice, DeviceFacts>();
  const rest = devices.filter(isPossible);
  const work = async (): Promise<void> => {
    for (let device = rest.shift(); device !== undefined; device = rest.shift()) {
      facts.set(device, await readDeviceFacts(device, { signal }));
    }
  };
  await Promise.all(Array.from({ length: PROBES_AT_ONCE }, work));
  return devices.flatMap((listed) => {
    const found = facts.get(listed);
    return found === undefined ? [] : [{ listed, facts: found }];
  });
}

/** A drive without a medium, and a loop device without a file, have no size. */
function isPossible({ type, sizeBytes }: ListedDevice): boolean {
  return sizeBytes > 0 && !OTHER_TYPES.has(type);
}

/**
 * What was read, as devices. The paths of a multipath device, and what the kernel took for partitions of a path,
 * have no identities: all of them are the multipath device's.
 */
export function describeDevices(known: readonly KnownDevice[]): BlockDevice[] {
  const byNumber = new Map(known.map((device) => [device.listed.deviceNumber, device]));
  const paths = new Map<string, string>();
  for (const { listed } of known) {
    if (listed.type !== 'mpath') continue;
    for (const number of listed.parents) paths.set(number, listed.path);
  }
  const pathOf = ({ deviceNumber, type, parents }: ListedDevice): string | null =>
    paths.get(deviceNumber) ?? (type === 'part' ? (paths.get(parents[0] ?? '') ?? null) : null);
  const devices = known.map(({ listed, facts }): BlockDevice => {
    const parents = listed.parents.flatMap((number) => byNumber.get(number) ?? []);
    const multipath = pathOf(listed);
    return {
      devicePath: listed.path,
      deviceNumber: listed.deviceNumber,
      type: listed.type,
      sizeBytes: listed.sizeBytes,
      isReadOnly: listed.isReadOnly,
      model: displayText(listed.model),
      identities: multipath === null ? identitiesOf({ listed, facts }, parents) : [],
      instance: facts.instance,
      pathOf: multipath,
      problem: facts.problem,
    };
  });
  return devices.sort((a, b) => a.devicePath.localeCompare(b.devicePath, 'en', { numeric: true }));
}
