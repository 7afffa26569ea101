import type { Clock } from '../src/lib/clock.js';
import type { ApplianceId } from '../src/lib/id.js';
import type { Backend } from './backend.js';
import type { LeaseTerms } from './lease.js';
import type { RepositoryMarker } from './types.js';

/** What every part of an open repository works with. */
export interface RepositoryContext {
  readonly backend: Backend;
  readonly root: string;
  readonly marker: RepositoryMarker;
  /** Undefined: opened for reading only. */
  readonly applianceId: ApplianceId | undefined;
  readonly clock: Clock;
  readonly leaseTerms: LeaseTerms;
}
