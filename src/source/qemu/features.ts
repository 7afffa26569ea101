import { z } from 'zod';
import { AppError } from '../../lib/errors.js';
import { ask, type QemuMachine } from './machine-state.js';
import type { QmpClient } from '../../lib/qmp.js';

const member = z.object({ name: z.string(), type: z.string() });
const entrySchema = z.looseObject({
  name: z.string(),
  'meta-type': z.string(),
  'arg-type': z.string().optional(),
  'element-type': z.string().optional(),
  // Members of an alternate have no names.
  members: z.array(z.looseObject({ name: z.string().optional(), type: z.string().optional() })).optional(),
  variants: z.array(z.object({ case: z.string(), type: z.string() })).optional(),
});
type Entry = z.infer<typeof entrySchema>;

/** What QEMU says of itself in `query-qmp-schema`, where all types but the commands have made-up names. */
export class QmpSchema {
  readonly #entries: Map<string, Entry>;

  constructor(entries: readonly Entry[]) {
    this.#entries = new Map(entries.map((entry) => [entry.name, entry]));
  }

  hasCommand(name: string): boolean {
    return this.#entries.get(name)?.['meta-type'] === 'command';
  }

  /** The members a command's argument has in one of its variants, e.g. of `blockdev-add` with one driver. */
  variantMembers(command: string, variant: string): Map<string, Entry | undefined> | undefined {
    const argument = this.#entries.get(this.#entries.get(command)?.['arg-type'] ?? '');
    const found = argument?.variants?.find((one) => one.case === variant);
    if (found === undefined) return undefined;
    const members = z.array(member).safeParse(this.#entries.get(found.type)?.members ?? []);
    return new Map(members.data?.map(({ name, type }) => [name, this.#entries.get(type)]));
  }

  elementOf(entry: Entry | undefined): Entry | undefined {
    return this.#entries.get(entry?.['element-type'] ?? '');
  }
}

export async function readSchema(qmp: QmpClient): Promise<QmpSchema> {
  return new QmpSchema(await ask(qmp, { command: 'query-qmp-schema', schema: z.array(entrySchema) }));
}

/** Rejects with SOURCE_REFUSED, and all that is missing, when this QEMU cannot hold a snapshot that never hurts its guest. */
export function requireFeatures(schema: QmpSchema): void {
  const filter = schema.variantMembers('blockdev-add', 'copy-before-write');
  const bitmaps = schema.variantMembers('block-export-add', 'nbd')?.get('bitmaps');
  const needs: [boolean, string][] = [
    [filter?.has('on-cbw-error') === true, 'copy-before-write with on-cbw-error'],
    [filter?.has('cbw-timeout') === true, 'copy-before-write with cbw-timeout'],
    [schema.variantMembers('blockdev-add', 'snapshot-access') !== undefined, 'snapshot-access'],
    [schema.elementOf(bitmaps)?.['meta-type'] === 'alternate', 'exports with bitmaps of other nodes'],
    [schema.hasCommand('transaction'), 'transaction'],
  ];
  const missing = needs.filter(([isThere]) => !isThere).map(([, what]) => what);
  if (missing.length === 0) return;
  throw new AppError(
    'SOURCE_REFUSED',
    `this QEMU is too old for live backups: it lacks ${missing.join(', ')}`,
    {
      details: { missing },
    },
  );
}

/**
 * QEMU before 9.0 aborts, with the guest in it, when a client leaves an NBD export of a node that runs in an
 * iothread (nbd_blockdev_client_closed asserts the main thread). No schema shows that fix.
 */
export function survivesNbdInIothread({ version }: QemuMachine): boolean {
  return version.major >= 9;
}
