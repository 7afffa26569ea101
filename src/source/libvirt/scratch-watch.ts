import { AppError } from '../../lib/errors.js';
import { pause } from '../../lib/deadline.js';
import { formatBytes } from '../../lib/units.js';
import type { HostCapacity, HypervisorHost } from './hypervisor-host.js';

export interface ScratchLimits {
  scratchKeepFreePercent: number;
  scratchKeepFreeBytes: number;
}

export interface ScratchPlace {
  host: Pick<HypervisorHost, 'capacity'>;
  directory: string;
  limits: ScratchLimits;
}

const LONGEST_PAUSE_MS = 250;
const SHORTEST_PAUSE_MS = 20;
/** What a fast guest may write, for how often to look. */
const FAST_BYTES_PER_MS = 2_000_000;
/** From the look to the end of the job, on a busy host. */
const REACTION_MS = 500;
/** A host that does not answer in this time leaves the guest without a watch. */
const LOOK_TIMEOUT_MS = 5000;

/** Bytes that stay free, of a filesystem of this size. */
export function scratchFloor(totalBytes: number, limits: ScratchLimits): number {
  return Math.min((totalBytes * limits.scratchKeepFreePercent) / 100, limits.scratchKeepFreeBytes);
}

/**
 * Rejects with SCRATCH_FULL unless a backup may begin here: a quarter more than what must stay free is
 * free. A place that cannot tell is refused, for a scratch file that cannot grow fails the guest's writes.
 */
export async function checkScratch(place: ScratchPlace, control: { signal: AbortSignal }): Promise<void> {
  const capacity = await place.host.capacity(place.directory, control);
  if (capacity === null) {
    throw new AppError('SCRATCH_FULL', 'nobody can tell how much room the scratch directory has', {
      details: { directory: place.directory },
    });
  }
  const neededBytes = scratchFloor(capacity.totalBytes, place.limits) * 1.25;
  if (capacity.freeBytes <= neededBytes) throw full(place.directory, capacity, neededBytes);
}

/**
 * Watches the filesystem of the scratch files and calls `onEnd` once, with SCRATCH_FULL when it comes near its
 * limit, or as fast as it fills at present will be full before a job can be ended; with SNAPSHOT_LOST when it
 * cannot be watched any more. Not called after `stop`, which resolves when the last look is over.
 */
export function watchScratch(
  place: ScratchPlace,
  onEnd: (reason: AppError) => void,
): { stop: () => Promise<void> } {
  const stopped = new AbortController();
  const watching = watch(place, stopped.signal).then(
    (reason) => {
      if (!stopped.signal.aborted) onEnd(reason);
    },
    (error: unknown) => {
      if (stopped.signal.aborted) return;
      onEnd(
        new AppError('SNAPSHOT_LOST', 'the scratch directory cannot be watched any more', { cause: error }),
      );
    },
  );
  return {
    stop: () => {
      stopped.abort();
      return watching;
    },
  };
}

async function watch(place: ScratchPlace, stopped: AbortSignal): Promise<AppError> {
  let [before, beforeMs] = [await look(place, stopped), performance.now()];
  for (;;) {
    const floorBytes = scratchFloor(before.totalBytes, place.limits);
    await pause(pauseMs(before.freeBytes - floorBytes), stopped);
    const [now, nowMs] = [await look(place, stopped), performance.now()];
    const bytesPerMs = (before.freeBytes - now.freeBytes) / Math.max(1, nowMs - beforeMs);
    const neededBytes = Math.max(floorBytes, bytesPerMs * REACTION_MS);
    if (now.freeBytes <= neededBytes) return full(place.directory, now, neededBytes);
    [before, beforeMs] = [now, nowMs];
  }
}

async function look({ host, directory }: ScratchPlace, stopped: AbortSignal): Promise<HostCapacity> {
  const signal = AbortSignal.any([stopped, AbortSignal.timeout(LOOK_TIMEOUT_MS)]);
  const capacity = await host.capacity(directory, { signal });
  if (capacity === null) throw new AppError('SOURCE_REFUSED', 'the host does not tell its room any more');
  return capacity;
}

/** Less room to the limit, more looks. */
function pauseMs(bytesToFloor: number): number {
  return Math.min(LONGEST_PAUSE_MS, Math.max(SHORTEST_PAUSE_MS, bytesToFloor / FAST_BYTES_PER_MS));
}

function full(directory: string, { freeBytes, totalBytes }: HostCapacity, neededBytes: number): AppError {
  const [free, needed] = [formatBytes(freeBytes), formatBytes(Math.ceil(neededBytes))];
  return new AppError('SCRATCH_FULL', `${free} free in ${directory}, ${needed} must be`, {
    details: { directory, freeBytes, totalBytes, neededBytes: Math.ceil(neededBytes) },
  });
}
