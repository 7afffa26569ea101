import { pause } from '../../lib/deadline.js';
import { AppError } from '../../lib/errors.js';
import { askDomain, type DomainLink } from './domain-link.js';
import { parseDomainStats, SHUTOFF_STATE, START_FAILED, type DomainStats } from './domain-stats.js';

const INTERVAL_MS = 2000;

/** Looks at a domain that must stay off. Disposal ends it. */
export interface PowerWatch extends AsyncDisposable {
  /** Aborts with SNAPSHOT_LOST when the machine was started, or somebody tried and was refused by our lock. */
  readonly lost: AbortSignal;
  /** Looks now; rejects with what `lost` aborts with, or when the hypervisor cannot be asked. */
  look(): Promise<void>;
}

/**
 * Watches from what was known at the beginning. libvirt sends no event for a start that failed, but remembers it as
 * the reason of being off. A second failure in a row looks like the first and is not seen: so the first one is not
 * retryable, or the next attempt of the run would stand in the way of the next start unseen.
 */
export function watchPower(link: DomainLink, known: DomainStats): PowerWatch {
  const losing = new AbortController();
  const ending = new AbortController();
  let reason = known.reason;
  const look = async (): Promise<void> => {
    if (losing.signal.aborted) throw losing.signal.reason;
    const { state, reason: current } = await readState(link, ending.signal);
    const isRefused = current === START_FAILED && reason !== START_FAILED;
    reason = current;
    if (state === SHUTOFF_STATE && !isRefused) return;
    const error = isRefused ? startRefused() : new AppError('SNAPSHOT_LOST', 'the machine was started');
    losing.abort(error);
    throw error;
  };
  const watching = (async (): Promise<void> => {
    while (!losing.signal.aborted && (await isTime(ending.signal))) {
      // A hypervisor that cannot be asked now starts nothing; the last look before the end must succeed.
      await look().catch(() => undefined);
    }
  })();
  return {
    lost: losing.signal,
    look,
    [Symbol.asyncDispose]: async () => {
      ending.abort();
      await watching;
    },
  };
}

/** False when the watch ended first. */
async function isTime(ending: AbortSignal): Promise<boolean> {
  try {
    await pause(INTERVAL_MS, ending);
    return true;
  } catch {
    return false;
  }
}

function startRefused(): AppError {
  const message = 'somebody tried to start the machine while its disks were read: start it again';
  return new AppError('SNAPSHOT_LOST', message, { retryable: false });
}

async function readState(link: DomainLink, signal: AbortSignal): Promise<DomainStats> {
  const answer = await askDomain(link, ['domstats', '--raw', '--state'], { signal });
  const [stats] = parseDomainStats(answer);
  if (stats === undefined) throw new AppError('SOURCE_REFUSED', 'libvirt tells no state of the machine');
  return stats;
}
