import { AppError, isErrorCode } from '../src/lib/errors.js';
import { formatBytes } from '../src/lib/units.js';
import type { RepositoryContext } from './context.js';
import { listPointIds, readManifest } from './manifest.js';
import type { Capacity } from './types.js';
import { listVmIds } from './vm-record.js';

const RESERVE_SHARE = 0.05;
/** Points of each VM looked at for the largest recent increment. */
const RECENT_POINTS = 4;
const CACHE_MS = 10 * 60_000;

/** Answers how much captures may use. Remembers the largest increment for ten minutes. */
export class CapacityGauge {
  #largest: { bytes: number; readMs: number } | undefined;

  constructor(private readonly context: RepositoryContext) {}

  async capacity(): Promise<Capacity> {
    const { totalBytes, freeBytes } = await this.context.backend.capacity();
    const reserveBytes = Math.ceil(Math.max(totalBytes * RESERVE_SHARE, await this.#largestIncrement()));
    return { totalBytes, freeBytes, reserveBytes, availableBytes: Math.max(0, freeBytes - reserveBytes) };
  }

  async requireSpace(neededBytes: number): Promise<void> {
    const { availableBytes, freeBytes, reserveBytes } = await this.capacity();
    if (availableBytes > 0 && availableBytes >= neededBytes) return;
    throw new AppError(
      'REPOSITORY_FULL',
      `${formatBytes(neededBytes)} do not fit: ${formatBytes(availableBytes)} may be used`,
      { details: { neededBytes, availableBytes, freeBytes, reserveBytes } },
    );
  }

  /** After a commit: a larger increment counts at once. */
  noteIncrement(bytes: number): void {
    if (this.#largest !== undefined && bytes > this.#largest.bytes)
      this.#largest = { ...this.#largest, bytes };
  }

  async #largestIncrement(): Promise<number> {
    const nowMs = this.context.clock.monotonicMs();
    if (this.#largest === undefined || nowMs - this.#largest.readMs > CACHE_MS) {
      this.#largest = { bytes: await this.#readLargest(), readMs: nowMs };
    }
    return this.#largest.bytes;
  }

  async #readLargest(): Promise<number> {
    let largest = 0;
    for (const vmId of await listVmIds(this.context)) {
      const recent = (await listPointIds(this.context, vmId)).slice(-RECENT_POINTS);
      for (const pointId of recent) {
        try {
          const { manifest } = await readManifest(this.context, vmId, pointId);
          for (const disk of manifest.disks) {
            if (disk.method !== 'full') largest = Math.max(largest, disk.layerFileBytes);
          }
        } catch (error) {
          // Only the size of the reserve is at stake; a damaged manifest is reported where points are read.
          if (!isErrorCode(error, 'MANIFEST_UNREADABLE', 'REPOSITORY_FORMAT', 'POINT_NOT_FOUND')) throw error;
        }
      }
    }
    return largest;
  }
}
