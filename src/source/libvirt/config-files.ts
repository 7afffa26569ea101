import { isErrorCode } from '../../lib/errors.js';
import { MIB } from '../../lib/units.js';
import type { Domain } from '../../libvirt/domain.js';
import { DOMAIN_FILE, MACHINE_FILE, type MachineFile } from '../../libvirt/machine-file.js';
import type { ConfigFile, SnapshotRequest } from '../source.js';
import { askDomain, type DomainLink } from './domain-link.js';
import type { HypervisorHost } from './hypervisor-host.js';

/** UEFI variables of aarch64 are 64 MiB; x86 has half a MiB. */
const MAX_NVRAM_BYTES = 64 * MIB;
const MAX_TPM_BYTES = 4 * MIB;

interface Keeper {
  link: DomainLink;
  host: HypervisorHost;
  domain: Domain;
}

interface WantedFile {
  name: string;
  role: 'nvram' | 'tpm';
  path: string;
  maxBytes: number;
}

/**
 * What belongs to the machine beside its disks: its definition without passwords (as `virsh dumpxml --inactive`
 * gives it), UEFI variables and TPM state where they can be read, and `machine.json`, which also says what could
 * not be kept; that is noted in the run too.
 */
export async function readConfigFiles(keeper: Keeper, request: SnapshotRequest): Promise<ConfigFile[]> {
  const { link, domain } = keeper;
  const { signal } = request;
  const xml = await askDomain(link, ['dumpxml', '--inactive'], { signal });
  const machine: MachineFile = {
    kind: 'libvirt',
    name: domain.name,
    uuid: domain.uuid,
    disks: request.disks.flatMap(({ disk }) =>
      disk.source.kind === 'libvirt' ? [{ diskId: disk.diskId, target: disk.source.target }] : [],
    ),
    files: [{ name: DOMAIN_FILE, role: 'domain', path: null }],
    notes: [],
  };
  const kept: ConfigFile[] = [{ name: DOMAIN_FILE, content: Buffer.from(xml) }];
  for (const wanted of wantedFiles(domain, machine.notes)) {
    const content = await readWanted(keeper, wanted, { machine, signal });
    if (content === null) continue;
    machine.files.push({ name: wanted.name, role: wanted.role, path: wanted.path });
    kept.push({ name: wanted.name, content });
  }
  for (const message of machine.notes) {
    request.note({ level: 'warning', code: 'CONFIG_INCOMPLETE', message });
  }
  return [{ name: MACHINE_FILE, content: Buffer.from(JSON.stringify(machine, null, 2)) }, ...kept];
}

function wantedFiles({ nvram, tpm, uuid }: Domain, notes: string[]): WantedFile[] {
  const wanted: WantedFile[] = [];
  if (nvram !== null) {
    wanted.push({ name: 'nvram.bin', role: 'nvram', path: nvram.path, maxBytes: MAX_NVRAM_BYTES });
  }
  if (tpm !== null && tpm.backend !== 'emulator') {
    notes.push(`The TPM is a device of the host (${tpm.backend}): its state is not in this point.`);
  }
  if (tpm?.backend === 'emulator') {
    const path = tpm.statePath ?? `/var/lib/libvirt/swtpm/${uuid}`;
    // swtpm's own names of its permanent state.
    const file = tpm.version === '1.2' ? 'tpm1.2/tpm-00.permall' : 'tpm2/tpm2-00.permall';
    wanted.push({ name: 'tpm.bin', role: 'tpm', path: `${path}/${file}`, maxBytes: MAX_TPM_BYTES });
  }
  return wanted;
}

const WHAT = { nvram: 'The UEFI variables', tpm: 'The contents of the TPM' };

async function readWanted(
  { host }: Keeper,
  { path, role, maxBytes }: WantedFile,
  { machine, signal }: { machine: MachineFile; signal: AbortSignal },
): Promise<Buffer | null> {
  try {
    const content = await host.readFile(path, maxBytes, { signal });
    if (content === null) machine.notes.push(`${WHAT[role]} are not in this point: there is no ${path}.`);
    return content;
  } catch (error) {
    if (!isErrorCode(error, 'SOURCE_REFUSED', 'SOURCE_UNREACHABLE', 'TIMEOUT', 'INVALID_INPUT')) throw error;
    machine.notes.push(`${WHAT[role]} are not in this point: ${(error as Error).message}.`);
    return null;
  }
}
