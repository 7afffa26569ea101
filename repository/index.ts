/** The public door of the repository domain. */
export { createRepository, openRepository, type CreateOptions } from './open.js';
export { openChainReader, type ChainReader, type ChainWindow } from './chain-reader.js';
export { LAYER_ABSENT, openComposedSums, type ComposedSums, type ComposedWindow } from './composed-sums.js';
export {
  copyChain,
  type ChainCopyOptions,
  type ChainCopyProgress,
  type ChainCopyResult,
} from './read-chain.js';
export { scanRepository, type ScannedVm } from './scan.js';
export type { CheckFinding, CheckOptions, CheckReport } from './check-report.js';
export type { LayerTables } from './layer-tables.js';
export type { Lease, LeaseHolder, LeaseTerms } from './lease.js';
export type {
  CommitOptions,
  DeleteResult,
  HashLayerOptions,
  LayerHash,
  NewLayer,
  OpenOptions,
  PartialLayer,
  Repository,
  SweepReport,
} from './repository.js';
export type { SumsEntry, SumsWriter } from './sums.js';
export * from './types.js';
