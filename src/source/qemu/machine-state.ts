import { z } from 'zod';
import { AppError } from '../../lib/errors.js';
import type { QmpClient } from '../../lib/qmp.js';

/** A persistent or temporary record of changes at a node. */
export interface QemuBitmap {
  name: string;
  granularity: number;
  dirtyBytes: number;
  isPersistent: boolean;
  /** It holds every change since it began: QEMU ended properly since, and nobody switched it off. */
  isUsable: boolean;
}

/** A node of the block graph. */
export interface QemuNode {
  name: string;
  driver: string;
  filename: string;
  isReadOnly: boolean;
  virtualBytes: number;
  /** Of the file itself; null where nobody says. */
  allocatedBytes: number | null;
  /** qcow2 of version 3 and later holds bitmaps. */
  canKeepBitmaps: boolean;
  bitmaps: QemuBitmap[];
}

/** A guest device with a block backend. */
export interface QemuDevice {
  /** Its id where it has one, else its QOM path. */
  target: string;
  qomPath: string;
  isRemovable: boolean;
  /** The node the device writes to, which may be a filter; null for an empty drive. */
  root: QemuNode | null;
  /** The first node below all filters: the disk's image. */
  image: QemuNode | null;
}

export interface QemuMachine {
  name: string | null;
  /** Null when the machine has none, which QEMU shows as zeroes. */
  uuid: string | null;
  runState: string;
  version: { major: number; minor: number };
  devices: QemuDevice[];
  nodes: ReadonlyMap<string, QemuNode>;
  /** The node below, by what QEMU calls the edge. */
  childOf: (nodeName: string, edge: string) => string | undefined;
  exports: { id: string; isNbd: boolean }[];
  /** Jobs under way, e.g. `mirror`. */
  jobs: { id: string; type: string }[];
  isMigrating: boolean;
  hasIothreads: boolean;
}

const bitmapSchema = z.object({
  name: z.string().optional(),
  granularity: z.int().positive(),
  count: z.int().nonnegative(),
  persistent: z.boolean(),
  recording: z.boolean(),
  inconsistent: z.boolean().optional(),
});

const nodeSchema = z.object({
  'node-name': z.string(),
  drv: z.string(),
  file: z.string(),
  ro: z.boolean(),
  image: z.object({
    'virtual-size': z.int().nonnegative(),
    'actual-size': z.int().nonnegative().optional(),
    'format-specific': z.object({ type: z.string(), data: z.looseObject({}) }).optional(),
  }),
  'dirty-bitmaps': z.array(bitmapSchema).optional(),
});

const answers = {
  name: z.object({ name: z.string().optional() }),
  uuid: z.object({ UUID: z.string() }),
  status: z.object({ status: z.string() }),
  version: z.object({ qemu: z.object({ major: z.int(), minor: z.int() }) }),
  devices: z.array(
    z.object({
      device: z.string(),
      qdev: z.string().optional(),
      removable: z.boolean(),
      inserted: z.object({ 'node-name': z.string() }).optional(),
    }),
  ),
  nodes: z.array(nodeSchema),
  graph: z.object({
    nodes: z.array(z.object({ id: z.number(), name: z.string(), type: z.string() })),
    edges: z.array(z.object({ name: z.string(), parent: z.number(), child: z.number() })),
  }),
  exports: z.array(z.object({ id: z.string(), type: z.string() })),
  jobs: z.array(z.object({ id: z.string(), type: z.string(), status: z.string() })),
  migration: z.object({ status: z.string().optional() }),
  iothreads: z.array(z.unknown()),
};

/** Asks and checks the answer's form. What is not of it is not a QEMU we know: SOURCE_REFUSED. */
export async function ask<T>(
  qmp: QmpClient,
  query: { command: string; args?: Record<string, unknown>; schema: z.ZodType<T> },
): Promise<T> {
  const answer = query.schema.safeParse(await qmp.execute(query.command, query.args));
  if (answer.success) return answer.data;
  throw new AppError('SOURCE_REFUSED', `QEMU's answer to ${query.command} has an unknown form`, {
    cause: answer.error,
  });
}

/** Everything about the machine's disks that a backup wants to know, as it is now. */
export async function readMachine(qmp: QmpClient): Promise<QemuMachine> {
  const get = <T>(command: string, schema: z.ZodType<T>, args = {}): Promise<T> =>
    ask(qmp, { command, schema, args });
  const [name, uuid, status, version, devices, nodeList, graph, exports, jobs, migration, iothreads] =
    await Promise.all([
      get('query-name', answers.name),
      get('query-uuid', answers.uuid),
      get('query-status', answers.status),
      get('query-version', answers.version),
      get('query-block', answers.devices),
      get('query-named-block-nodes', answers.nodes, { flat: true }),
      get('x-debug-query-block-graph', answers.graph),
      get('query-block-exports', answers.exports),
      get('query-jobs', answers.jobs),
      get('query-migrate', answers.migration),
      get('query-iothreads', answers.iothreads),
    ]);
  const nodes = new Map(nodeList.map((node) => [node['node-name'], toNode(node)]));
  const childOf = childFinder(graph);
  return {
    name: name.name ?? null,
    uuid: /^[0-]+$/.test(uuid.UUID) ? null : uuid.UUID,
    runState: status.status,
    version: version.qemu,
    devices: devices.flatMap(({ device, qdev, removable, inserted }) => {
      if (qdev === undefined) return [];
      const root = nodes.get(inserted?.['node-name'] ?? '') ?? null;
      const image = root === null ? null : belowFilters(root, nodes, childOf);
      return [{ target: targetOf(qdev, device), qomPath: qdev, isRemovable: removable, root, image }];
    }),
    nodes,
    childOf,
    exports: exports.map(({ id, type }) => ({ id, isNbd: type === 'nbd' })),
    jobs: jobs.filter(({ status: state }) => state !== 'concluded' && state !== 'null'),
    isMigrating: !MIGRATION_IS_OVER.has(migration.status ?? 'none'),
    hasIothreads: iothreads.length > 0,
  };
}

const MIGRATION_IS_OVER = new Set(['none', 'cancelled', 'completed', 'failed']);

function toNode(node: z.infer<typeof nodeSchema>): QemuNode {
  const { image } = node;
  const specific = image['format-specific'];
  return {
    name: node['node-name'],
    driver: node.drv,
    filename: node.file,
    isReadOnly: node.ro,
    virtualBytes: image['virtual-size'],
    allocatedBytes: image['actual-size'] ?? null,
    canKeepBitmaps: specific?.type === 'qcow2' && specific.data['compat'] !== '0.10',
    bitmaps: (node['dirty-bitmaps'] ?? []).flatMap((bitmap) =>
      bitmap.name === undefined
        ? []
        : [
            {
              name: bitmap.name,
              granularity: bitmap.granularity,
              dirtyBytes: bitmap.count,
              isPersistent: bitmap.persistent,
              isUsable: bitmap.recording && bitmap.inconsistent !== true,
            },
          ],
    ),
  };
}

/** `/machine/peripheral/<id>` and what is below it belongs to the device with that id; drives of `-drive` have names. */
function targetOf(qomPath: string, driveName: string): string {
  const id = /^\/machine\/peripheral\/([^/]+)/.exec(qomPath)?.[1];
  if (id !== undefined) return id;
  return driveName === '' ? qomPath : driveName;
}

/** Drivers that pass on what is written to them; an image format or a protocol is none. */
const FILTERS = new Set([
  'throttle',
  'copy-on-read',
  'compress',
  'preallocate',
  'copy-before-write',
  'mirror_top',
  'commit_top',
]);

function belowFilters(
  root: QemuNode,
  nodes: ReadonlyMap<string, QemuNode>,
  childOf: QemuMachine['childOf'],
): QemuNode {
  let node = root;
  while (FILTERS.has(node.driver)) {
    const below = nodes.get(childOf(node.name, 'file') ?? childOf(node.name, 'backing') ?? '');
    if (below === undefined) break;
    node = below;
  }
  return node;
}

function childFinder(graph: z.infer<typeof answers.graph>): QemuMachine['childOf'] {
  const nameOf = new Map(graph.nodes.map(({ id, name }) => [id, name]));
  const children = new Map<string, string>();
  const drivers = new Set(graph.nodes.filter(({ type }) => type === 'block-driver').map(({ id }) => id));
  for (const { parent, child, name } of graph.edges) {
    const childName = nameOf.get(child);
    if (drivers.has(parent) && childName !== undefined)
      children.set(`${nameOf.get(parent)} ${name}`, childName);
  }
  return (nodeName, edge) => children.get(`${nodeName} ${edge}`);
}
