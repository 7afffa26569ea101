import { z } from 'zod';
import { isErrorCode, toAppError } from '../../lib/errors.js';
import type { DiskId } from '../../lib/id.js';
import { MIB } from '../../lib/units.js';
import { MACHINE_FILE, type MachineFile } from '../../libvirt/machine-file.js';
import type { HypervisorHost } from '../libvirt/hypervisor-host.js';
import type { ConfigFile, QemuVmSource } from '../source.js';
import { FIRMWARE_TYPE, readDeviceFacts } from './devices.js';
import { machineName } from './discover.js';
import { locationOf } from './disk-facts.js';
import type { QemuMachine, QemuNode } from './machine-state.js';
import { QmpError, type QmpClient } from '../../lib/qmp.js';

const MAX_NVRAM_BYTES = 64 * MIB;

export interface ConfigOptions {
  machine: QemuMachine;
  source: QemuVmSource;
  host: HypervisorHost;
  disks: { diskId: DiskId; target: string }[];
  signal: AbortSignal;
}

/** The files that go with a point: `machine.json`, and the firmware's variables where they can be read. */
export async function readConfigFiles(qmp: QmpClient, options: ConfigOptions): Promise<ConfigFile[]> {
  const { machine, source } = options;
  const notes = ["QEMU's command line is not known to its monitor: it is not part of this point"];
  if (await hasTpm(qmp))
    notes.push('the state of the TPM is kept by another process: it is not part of this point');
  const kept: ConfigFile[] = [];
  const files: MachineFile['files'] = [];
  for (const image of await findVariableStores(qmp, machine)) {
    const content = await readVariables(image, options);
    if (typeof content === 'string') {
      notes.push(content);
      continue;
    }
    const name = `nvram-${kept.length}.fd`;
    kept.push({ name, content });
    files.push({ name, role: 'nvram', path: locationOf(image) });
  }
  const facts: MachineFile = {
    kind: 'qemu',
    name: machineName(machine, source),
    uuid: machine.uuid,
    disks: options.disks,
    files,
    notes,
  };
  return [{ name: MACHINE_FILE, content: Buffer.from(`${JSON.stringify(facts, null, 2)}\n`) }, ...kept];
}

async function hasTpm(qmp: QmpClient): Promise<boolean> {
  try {
    return z.array(z.unknown()).parse(await qmp.execute('query-tpm')).length > 0;
  } catch (error) {
    // Built without TPMs.
    if (error instanceof QmpError && error.errorClass === 'CommandNotFound') return false;
    throw error;
  }
}

async function findVariableStores(qmp: QmpClient, machine: QemuMachine): Promise<QemuNode[]> {
  const stores: QemuNode[] = [];
  for (const device of machine.devices) {
    if (device.image === null || device.image.isReadOnly) continue;
    if ((await readDeviceFacts(qmp, device)).type === FIRMWARE_TYPE) stores.push(device.image);
  }
  return stores;
}

/** The content, or a sentence that says why it cannot be had. */
async function readVariables(image: QemuNode, { host, signal }: ConfigOptions): Promise<Buffer | string> {
  const path = locationOf(image);
  const missing = `the firmware's variables in ${path} are not part of this point`;
  if (image.driver !== 'raw' || !path.startsWith('/')) return `${missing}: not a raw file with a full path`;
  try {
    return (await host.readFile(path, MAX_NVRAM_BYTES, { signal })) ?? `${missing}: the file is not there`;
  } catch (error) {
    if (!isErrorCode(error, 'SOURCE_REFUSED')) throw error;
    return `${missing}: ${toAppError(error).message}`;
  }
}
