import { z } from 'zod';
import { AppError } from '../lib/errors.js';

/** One device of lsblk's answer. */
export interface ListedDevice {
  kernelName: string;
  path: string;
  deviceNumber: string;
  type: string;
  sizeBytes: number;
  isReadOnly: boolean;
  model: string | null;
  vendor: string | null;
  serial: string | null;
  wwn: string | null;
  /** Numbers of the devices that it stands on: a partition's disk, the paths of a multipath device. */
  parents: string[];
}

/** What lsblk is asked for; all of it is in lsblk 2.36 and later (Debian 11). */
export const LSBLK_COLUMNS = 'KNAME,PATH,MAJ:MIN,TYPE,SIZE,RO,MODEL,VENDOR,SERIAL,WWN';

const MAX_DEPTH = 32;
const text = z.string().max(4096);
const optional = text.nullish();

const nodeSchema = z.object({
  kname: text.min(1),
  path: text.startsWith('/dev/'),
  'maj:min': z.string().regex(/^\d{1,10}:\d{1,10}$/),
  type: text,
  size: z.number().int().nonnegative(),
  ro: z.boolean(),
  model: optional,
  vendor: optional,
  serial: optional,
  wwn: optional,
  children: z.array(z.unknown()).optional(),
});
const answerSchema = z.object({ blockdevices: z.array(z.unknown()) });

/**
 * The devices in an answer of `lsblk --json --bytes` with LSBLK_COLUMNS, each once however many others it
 * stands on. TOOL_FAILED for anything that is no such answer.
 */
export function parseLsblk(answer: string): ListedDevice[] {
  const devices = new Map<string, ListedDevice>();
  const visit = (nodes: readonly unknown[], parent: string | null, depth: number): void => {
    if (depth > MAX_DEPTH) throw new AppError('TOOL_FAILED', 'lsblk answered devices nested without end');
    for (const node of nodes) {
      const { children, ...device } = nodeSchema.parse(node);
      const known = devices.get(device['maj:min']) ?? toListed(device);
      if (parent !== null && !known.parents.includes(parent)) known.parents.push(parent);
      devices.set(known.deviceNumber, known);
      visit(children ?? [], known.deviceNumber, depth + 1);
    }
  };
  try {
    visit(answerSchema.parse(JSON.parse(answer)).blockdevices, null, 0);
  } catch (error) {
    if (error instanceof AppError) throw error;
    throw new AppError('TOOL_FAILED', 'lsblk gave an answer that cannot be read', {
      cause: error,
      details: { tool: 'lsblk' },
    });
  }
  return [...devices.values()];
}

function toListed(node: Omit<z.infer<typeof nodeSchema>, 'children'>): ListedDevice {
  return {
    kernelName: node.kname,
    path: node.path,
    deviceNumber: node['maj:min'],
    type: node.type,
    sizeBytes: node.size,
    isReadOnly: node.ro,
    model: node.model ?? null,
    vendor: node.vendor ?? null,
    serial: node.serial ?? null,
    wwn: node.wwn ?? null,
    parents: [],
  };
}
