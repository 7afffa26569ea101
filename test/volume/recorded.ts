import { NO_CONTENT, parseBlkid, parseProperties, type DeviceFacts } from '../../src/volume/device-facts.js';
import { describeDevices } from '../../src/volume/host-provider.js';
import { parseLsblk } from '../../src/volume/lsblk.js';
import type { BlockDevice } from '../../src/volume/provider.js';

/** What the tools said of one device besides lsblk. */
export interface Said extends Partial<
  Pick<DeviceFacts, 'wwid' | 'serial' | 'dmUuid' | 'instance' | 'problem'>
> {
  udev?: string;
  blkid?: string;
}

/** The devices of a recorded host, by path. */
export function devicesOf(
  blockdevices: unknown[],
  said: Record<string, Said> = {},
): Record<string, BlockDevice> {
  const known = parseLsblk(JSON.stringify({ blockdevices })).map((listed) => {
    const { udev = '', blkid, ...rest } = said[listed.kernelName] ?? {};
    const facts: DeviceFacts = {
      wwid: null,
      serial: null,
      dmUuid: null,
      instance: `boot/${listed.deviceNumber}`,
      problem: null,
      ...rest,
      udev: parseProperties(udev),
      content: blkid === undefined ? NO_CONTENT : parseBlkid(blkid),
    };
    return { listed, facts };
  });
  return Object.fromEntries(describeDevices(known).map((device) => [device.devicePath, device]));
}

interface Node {
  kname: string;
  number: string;
  [column: string]: unknown;
}

/** A node as lsblk 2.38 writes it with our columns. */
export function node({ kname, number, ...rest }: Node): unknown {
  return {
    kname,
    path: `/dev/${kname}`,
    'maj:min': number,
    type: 'disk',
    size: 1_000_204_886_016,
    ro: false,
    model: null,
    vendor: null,
    serial: null,
    wwn: null,
    ...rest,
  };
}
