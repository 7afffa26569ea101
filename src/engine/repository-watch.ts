import type { Lease, Repository } from '../../repository/index.js';
import { toAppError } from '../lib/errors.js';
import type { ActiveRun } from './active-run.js';

/** How often the repository is looked at while a run writes into it. */
const REPOSITORY_LOOK_MS = 1000;

/**
 * During the copy: a repository that went away is noticed, and what turned out larger than anybody knew
 * ends before it takes the reserve.
 */
export function watchRepository(run: ActiveRun, repository: Repository, lease: Lease): AsyncDisposable {
  let looking: Promise<void> | undefined;
  const look = async (): Promise<void> => {
    try {
      await lease.verify();
      await repository.requireSpace(0);
    } catch (error) {
      run.abort(toAppError(error));
    }
  };
  const timer = setInterval(() => {
    looking ??= look().finally(() => (looking = undefined));
  }, REPOSITORY_LOOK_MS);
  return {
    async [Symbol.asyncDispose]() {
      clearInterval(timer);
      await looking;
    },
  };
}
