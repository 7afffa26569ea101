import type { QemuDisk } from './disk-facts.js';
import type { QemuMachine } from './machine-state.js';

/**
 * Bytes a run would read: what the bitmap marks now, or what the image and those under it have allocated.
 * Null where that is not known: block devices, images behind a network.
 */
export function estimateDisk(
  machine: QemuMachine,
  { image }: QemuDisk,
  bitmap: string | null,
): number | null {
  if (bitmap !== null) return image.bitmaps.find(({ name }) => name === bitmap)?.dirtyBytes ?? null;
  let total = 0;
  for (
    let name: string | undefined = image.name;
    name !== undefined;
    name = machine.childOf(name, 'backing')
  ) {
    const node = machine.nodes.get(name);
    const below = machine.nodes.get(machine.childOf(name, 'file') ?? '');
    if (node === undefined || node.allocatedBytes === null || below?.driver !== 'file') return null;
    total += node.allocatedBytes;
  }
  return Math.min(total, image.virtualBytes);
}
