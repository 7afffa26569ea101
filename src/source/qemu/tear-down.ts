import { pollUntil } from '../../lib/deadline.js';
import { setDrive } from './fleecing.js';
import { readMachine, type QemuBitmap, type QemuMachine } from './machine-state.js';
import type { QmpClient } from '../../lib/qmp.js';
import { isListening } from '../../lib/unix-socket.js';

const EXPORT_GONE_TIMEOUT_MS = 30_000;

/**
 * Takes everything out of QEMU that was added under this tag, in any state that a run or an earlier removal
 * left it in, and nothing else. The guest writes on all the time: exports go first, then the filters
 * are taken out of its way, then they go with their scratch space. Readers still connected are cut off.
 * Answers whether the NBD server at `serverSocket` is gone too: it stays while it has somebody else's exports.
 */
export async function removeTagged(
  qmp: QmpClient,
  options: { tag: string; serverSocket: string },
): Promise<{ isServerGone: boolean }> {
  const isOurs = (name: string): boolean => name.startsWith(`${options.tag}-`);
  const before = await readMachine(qmp);
  await removeExports(
    qmp,
    before.exports.filter(({ id }) => isOurs(id)).map(({ id }) => id),
  );
  const nodes = [...before.nodes.values()].filter(({ name }) => isOurs(name));
  await deleteNodes(qmp, nodes, 'snapshot-access');
  await takeOutFilters(qmp, before, isOurs);
  await deleteNodes(qmp, nodes, 'copy-before-write');
  await deleteNodes(qmp, nodes, 'qcow2');
  await removeBitmaps(qmp, before, isOurs);
  // The path is the run's own, so whoever listens there is the server that the run started.
  if (!(await isListening(options.serverSocket))) return { isServerGone: true };
  const { exports } = await readMachine(qmp);
  if (exports.some(({ isNbd }) => isNbd)) return { isServerGone: false };
  await qmp.execute('nbd-server-stop');
  return { isServerGone: true };
}

/** Removes the bitmaps that are asked for from the images of the machine's disks. */
export async function removeBitmaps(
  qmp: QmpClient,
  machine: QemuMachine,
  isWanted: (name: string, bitmap: QemuBitmap) => boolean,
): Promise<void> {
  const images = new Map(
    machine.devices.flatMap(({ image }) => (image === null ? [] : [[image.name, image]])),
  );
  for (const image of images.values()) {
    for (const bitmap of image.bitmaps) {
      const { name } = bitmap;
      if (!isWanted(name, bitmap)) continue;
      await qmp.execute('block-dirty-bitmap-remove', { node: image.name, name });
    }
  }
}

async function removeExports(qmp: QmpClient, ids: readonly string[]): Promise<void> {
  for (const id of ids) await qmp.execute('block-export-del', { id, mode: 'hard' });
  await pollUntil(
    async () => {
      const { exports } = await readMachine(qmp);
      return exports.some(({ id }) => ids.includes(id)) ? undefined : true;
    },
    { timeoutMs: EXPORT_GONE_TIMEOUT_MS, what: 'the removal of the exports' },
  );
}

/** A device that was unplugged meanwhile has taken its hold on the filter with it. */
async function takeOutFilters(
  qmp: QmpClient,
  machine: QemuMachine,
  isOurs: (name: string) => boolean,
): Promise<void> {
  for (const { qomPath, root } of machine.devices) {
    if (root === null || !isOurs(root.name)) continue;
    const below = machine.childOf(root.name, 'file');
    if (below !== undefined) await setDrive(qmp, qomPath, below);
  }
}

async function deleteNodes(
  qmp: QmpClient,
  nodes: readonly { name: string; driver: string }[],
  driver: string,
): Promise<void> {
  for (const { name } of nodes.filter((node) => node.driver === driver)) {
    await qmp.execute('blockdev-del', { 'node-name': name });
  }
}
