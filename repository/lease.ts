import type { RunId } from '../src/lib/id.js';

export interface LeaseHolder {
  runId: RunId;
  /** For people: what the holder does (`backup`, `delete`, …). */
  purpose: string;
}

/** A held lease. Renewed in the background until released. */
export interface Lease extends AsyncDisposable {
  readonly vmId: string;
  /** Grows with each acquisition; a writer whose token is not the newest is refused. */
  readonly token: number;
  /** Aborts with LEASE_LOST when renewal finds another holder. */
  readonly lost: AbortSignal;
  /** Rejects with LEASE_LOST unless this lease is still the newest on disk. */
  verify(): Promise<void>;
  release(): Promise<void>;
}
