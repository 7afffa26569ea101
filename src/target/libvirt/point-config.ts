import { z } from 'zod';
import { AppError } from '../../lib/errors.js';
import { isUlid, type DiskId } from '../../lib/id.js';
import { parseDomain, type Domain } from '../../libvirt/domain.js';
import { DOMAIN_FILE, MACHINE_FILE, type MachineFile } from '../../libvirt/machine-file.js';
import type { MachineTargetRequest } from '../machine-target.js';

/** The machine of a point as its configuration files have it. */
export interface PointMachine {
  xml: string;
  domain: Domain;
  /** Target of each disk of the point at that instant. */
  targets: ReadonlyMap<DiskId, string>;
  nvram: Buffer | null;
  tpm: { path: string; content: Buffer }[];
  notes: readonly string[];
}

const text = z.string().max(4096);
const target = z.string().regex(/^[0-9A-Za-z]{1,32}$/);

/** Fields that a later version adds are let through. */
const machineSchema: z.ZodType<MachineFile> = z.object({
  kind: z.enum(['libvirt', 'qemu']),
  name: text,
  uuid: text.nullable(),
  disks: z
    .array(
      z.object({ diskId: z.custom<DiskId>((value) => typeof value === 'string' && isUlid(value)), target }),
    )
    .max(1024),
  files: z
    .array(z.object({ name: text, role: z.enum(['domain', 'nvram', 'tpm']), path: text.nullable() }))
    .max(256),
  notes: z.array(text).max(256),
});

/**
 * Reads what a point keeps of its machine. It comes from a repository, so it is judged like input: INVALID_INPUT
 * for a point that is not of a libvirt machine, or whose files do not agree with each other or with its disks.
 */
export function readPointConfig(request: Pick<MachineTargetRequest, 'configFiles' | 'disks'>): PointMachine {
  const files = new Map(request.configFiles.map(({ name, content }) => [name, content]));
  const machine = readMachineFile(files.get(MACHINE_FILE));
  const xml = files.get(DOMAIN_FILE)?.toString('utf8');
  if (machine.kind !== 'libvirt' || xml === undefined) {
    throw unusable('it keeps no domain: restore its disks with `holdfast restore run`');
  }
  const domain = readDomain(xml);
  const targets = new Map(machine.disks.map((disk) => [disk.diskId, disk.target]));
  if (new Set(targets.values()).size !== machine.disks.length) throw unusable('two of its disks are one');
  for (const { diskId, name } of request.disks) {
    const found = targets.get(diskId);
    if (found === undefined) throw unusable(`it does not say which device disk ${name} was`);
    if (!domain.disks.some((disk) => disk.target === found))
      throw unusable(`its domain has no disk ${found}`);
  }
  const kept = (role: 'nvram' | 'tpm'): { path: string | null; content: Buffer }[] =>
    machine.files
      .filter((file) => file.role === role)
      .map((file) => {
        const content = files.get(file.name);
        if (content === undefined) throw unusable(`its file ${file.name} is missing`);
        return { path: file.path, content };
      });
  return {
    xml,
    domain,
    targets,
    nvram: kept('nvram')[0]?.content ?? null,
    tpm: kept('tpm').filter((file): file is PointMachine['tpm'][number] => file.path !== null),
    notes: machine.notes,
  };
}

function readMachineFile(content: Buffer | undefined): MachineFile {
  if (content === undefined) {
    throw unusable('it keeps no machine, only disks: restore them with `holdfast restore run`');
  }
  try {
    return machineSchema.parse(JSON.parse(content.toString('utf8')));
  } catch (error) {
    throw unusable(`its ${MACHINE_FILE} cannot be read`, error);
  }
}

function readDomain(xml: string): Domain {
  try {
    return parseDomain(xml);
  } catch (error) {
    throw unusable(`its ${DOMAIN_FILE} cannot be read`, error);
  }
}

function unusable(why: string, cause?: unknown): AppError {
  return new AppError('INVALID_INPUT', `the point cannot be restored as a machine: ${why}`, {
    cause,
    details: { field: 'pointId' },
  });
}
