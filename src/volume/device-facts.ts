import { realpath } from 'node:fs/promises';
import path from 'node:path';
import { findDeviceNumber, readText } from '../lib/block-device.js';
import { withDeadline } from '../lib/deadline.js';
import { isErrorCode, toAppError } from '../lib/errors.js';
import { runTool } from '../lib/process.js';
import type { ListedDevice } from './lsblk.js';

/** What identifies a device, from whoever knows it: the kernel, the udev database, what is written on it. */
export interface DeviceFacts {
  /** As the kernel shows it in sysfs. */
  wwid: string | null;
  serial: string | null;
  /** Of a device-mapper device: LVM, multipath, crypt. */
  dmUuid: string | null;
  instance: string | null;
  /** Of the udev database; empty where there is none. */
  udev: ReadonlyMap<string, string>;
  content: DeviceContent;
  /** Why the content could not be looked at. */
  problem: string | null;
}

export interface DeviceContent {
  usage: string | null;
  fsType: string | null;
  fsUuid: string | null;
  /** Of the table on it. */
  tableUuid: string | null;
  /** Of its entry in the table of the disk that it is a partition of. */
  partUuid: string | null;
}

export const NO_CONTENT: DeviceContent = {
  usage: null,
  fsType: null,
  fsUuid: null,
  tableUuid: null,
  partUuid: null,
};

const PROBE_TIMEOUT_MS = 10_000;
/** A process in an uninterruptible wait for dead storage does not end when it is killed. */
const GIVE_UP_AFTER_MS = PROBE_TIMEOUT_MS + 5000;
/** blkid(8): nothing found; several things found that contradict each other. */
const BLKID_NOTHING = 2;
const BLKID_AMBIVALENT = 8;

/** Never rejects for a device that does not answer: that is in `problem`. */
export async function readDeviceFacts(
  device: ListedDevice,
  { signal }: { signal: AbortSignal },
): Promise<DeviceFacts> {
  const folder = `/sys/dev/block/${device.deviceNumber}`;
  let problem: string | null = null;
  const ask = async <T>(question: Promise<T>, otherwise: T): Promise<T> => {
    try {
      return await question;
    } catch (error) {
      signal.throwIfAborted();
      problem ??= toAppError(error).message;
      return otherwise;
    }
  };
  const facts = {
    wwid: (await readText(`${folder}/wwid`)) ?? (await readText(`${folder}/device/wwid`)),
    serial: (await readText(`${folder}/serial`)) ?? (await readText(`${folder}/device/serial`)),
    dmUuid: await readText(`${folder}/dm/uuid`),
    instance: await readInstance(device.deviceNumber),
    udev: await ask(readUdev(device.deviceNumber, signal), new Map<string, string>()),
  };
  const isView = await isViewOfDevice(folder);
  const content = isView ? NO_CONTENT : await ask(readContent(device.path, signal), NO_CONTENT);
  return { ...facts, content, problem };
}

/** A loop device over another device shows what that holds: it is not its own. */
async function isViewOfDevice(folder: string): Promise<boolean> {
  const backing = await readText(`${folder}/loop/backing_file`);
  return backing !== null && (await findDeviceNumber(backing)) !== null;
}

/**
 * The kernel numbers every disk as it appears and never uses a number again before the next boot; a partition is
 * told apart by where it starts.
 */
export async function readInstance(deviceNumber: string): Promise<string | null> {
  const folder = `/sys/dev/block/${deviceNumber}`;
  const start = await readText(`${folder}/start`);
  const sequence = await readText(path.join(await realpathOr(folder), start === null ? '' : '..', 'diskseq'));
  const boot = await readText('/proc/sys/kernel/random/boot_id');
  if (sequence === null || boot === null) return null;
  return [boot, sequence, ...(start === null ? [] : [start])].join('/');
}

/** The node of the device with this number, links resolved: null when there is none. */
export async function findNode(device: ListedDevice): Promise<string | null> {
  const kernelNumber = await readText(`/sys/class/block/${device.kernelName.replaceAll('/', '!')}/dev`);
  if (kernelNumber !== device.deviceNumber) return null;
  for (const candidate of [device.path, `/dev/${device.kernelName.replaceAll('!', '/')}`]) {
    const node = await realpathOr(candidate);
    if ((await findDeviceNumber(node)) === device.deviceNumber) return node;
  }
  return null;
}

/** What is not there stays as it is. */
async function realpathOr(file: string): Promise<string> {
  return realpath(file).catch(() => file);
}

/** `udevadm info`, where udev keeps an entry of the device. Without the tool lsblk says most of it. */
async function readUdev(deviceNumber: string, signal: AbortSignal): Promise<ReadonlyMap<string, string>> {
  if ((await readText(`/run/udev/data/b${deviceNumber}`)) === null) return new Map();
  const args = ['info', '--query=property', `--path=/sys/dev/block/${deviceNumber}`];
  try {
    const { stdout } = await runTool('udevadm', args, { timeoutMs: PROBE_TIMEOUT_MS, signal });
    return parseProperties(stdout);
  } catch (error) {
    if (isErrorCode(error, 'TOOL_MISSING')) return new Map();
    throw error;
  }
}

/** Asked of the device itself: what udev remembers may be older than the last mkfs. */
async function readContent(file: string, signal: AbortSignal): Promise<DeviceContent> {
  const probe = runTool('blkid', ['-p', '-o', 'udev', '--', file], {
    timeoutMs: PROBE_TIMEOUT_MS,
    signal,
    acceptExitCodes: [0, BLKID_NOTHING, BLKID_AMBIVALENT],
  });
  const { stdout } = await withDeadline(probe, {
    timeoutMs: GIVE_UP_AFTER_MS,
    what: `probing ${file}`,
    signal,
  });
  return parseBlkid(stdout);
}

/** Answer of `blkid -p -o udev`, which writes values as udev does: nothing in them can end a line. */
export function parseBlkid(answer: string): DeviceContent {
  const values = parseProperties(answer);
  const isAmbivalent = values.has('ID_FS_AMBIVALENT');
  const ofFilesystem = (key: string): string | null => (isAmbivalent ? null : (values.get(key) ?? null));
  return {
    usage: ofFilesystem('ID_FS_USAGE'),
    fsType: ofFilesystem('ID_FS_TYPE'),
    fsUuid: ofFilesystem('ID_FS_UUID'),
    tableUuid: values.get('ID_PART_TABLE_UUID') ?? null,
    partUuid: values.get('ID_PART_ENTRY_UUID') ?? null,
  };
}

/** Lines `KEY=value`; others, and empty values, say nothing. */
export function parseProperties(answer: string): ReadonlyMap<string, string> {
  const values = new Map<string, string>();
  for (const line of answer.split('\n')) {
    const [, key, value] = /^([A-Za-z0-9_.:]+)=(.+)$/.exec(line) ?? [];
    if (key !== undefined && value !== undefined) values.set(key, value);
  }
  return values;
}
