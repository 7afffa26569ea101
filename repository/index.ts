/** The public door of the repository domain. */
export { createRepository, openRepository, type CreateOptions } from './open.js';
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
export * from './types.js';
