export type * from './types.js';
export type { CheckFinding, CheckOptions, CheckReport } from './check.js';
export type { Lease, LeaseHolder } from './lease.js';
export type {
  CommitOptions,
  DeleteResult,
  NewLayer,
  OpenOptions,
  PartialLayer,
  Repository,
  SweepReport,
} from './repository.js';
export type { SumsEntry, SumsWriter } from './sums.js';
