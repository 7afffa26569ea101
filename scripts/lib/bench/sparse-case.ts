import { open, rm } from 'node:fs/promises';
import path from 'node:path';
import { seededBytes } from '../../../integration/lab/disk-image.js';
import { startQemuNbd } from '../../../integration/lab/nbd-server.js';
import { GIB, KIB, TIB } from '../../../src/lib/units.js';
import type { BenchDaemon } from './holdfast.js';
import { rssOfTree, type Usage } from './usage.js';

const DISK_BYTES = 4 * TIB;
const BLOCK_BYTES = 4 * KIB;
/** Data and hole by turns: a million extents in 4 GiB, in packed regions spread over the disk. */
const EXTENTS = 1_048_576;
const REGIONS = 64;
const REGION_BYTES = (EXTENTS * BLOCK_BYTES) / REGIONS;

export interface SparseResult extends Usage {
  extents: number;
  diskBytes: number;
  idleRssBytes: number;
  overIdleBytes: number;
}

/** A full backup of a 4 TiB disk of a million extents. */
export async function runSparseCase(daemon: BenchDaemon, directory: string): Promise<SparseResult> {
  const image = path.join(directory, 'sparse.raw');
  const root = path.join(directory, 'repository-sparse');
  try {
    await makeSparseDisk(image);
    await using server = await startQemuNbd({
      image,
      format: 'raw',
      socketPath: path.join(directory, 'sparse.sock'),
      isReadOnly: true,
      shared: 32,
    });
    const { vmId } = await daemon.addVm('sparse', server.uri);
    const repositoryId = await daemon.createRepository(root);
    const idleRssBytes = rssOfTree(daemon.subject.pids());
    const { usage } = await daemon.backup({ vmId, repositoryId, type: 'full' });
    const overIdleBytes = usage.peakRssBytes - idleRssBytes;
    return { ...usage, extents: EXTENTS, diskBytes: DISK_BYTES, idleRssBytes, overIdleBytes };
  } finally {
    await rm(image, { force: true });
    await rm(root, { recursive: true, force: true });
  }
}

async function makeSparseDisk(image: string): Promise<void> {
  const content = seededBytes(7, BLOCK_BYTES);
  const file = await open(image, 'w');
  try {
    await file.truncate(DISK_BYTES);
    for (let region = 0; region < REGIONS; region += 1) {
      const start = region * Math.floor((DISK_BYTES - GIB) / REGIONS);
      for (let at = 0; at < REGION_BYTES; at += 2 * BLOCK_BYTES) {
        await file.write(content, 0, BLOCK_BYTES, start + at);
      }
    }
  } finally {
    await file.close();
  }
}
