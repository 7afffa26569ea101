import { openRepository, type Capacity, type LeaseTerms, type Repository } from '../../repository/index.js';
import type { Database } from '../db/database.js';
import { withDeadline } from '../lib/deadline.js';
import { AppError } from '../lib/errors.js';
import type { ApplianceId, RepositoryId } from '../lib/id.js';

const LOOK_TIMEOUT_MS = 10_000;

/** The repositories the database knows, opened when first used. */
export interface RepositoryPool {
  /** NOT_FOUND for an unknown id; REPOSITORY_OFFLINE and the like when it cannot be opened. */
  open(id: RepositoryId): Promise<Repository>;
  /** Whether it is usable right now, within the deadline, without stalling on a dead file system. */
  look(id: RepositoryId): Promise<Capacity>;
}

/**
 * One dead network file system must not take the others along: Node's file calls share four threads.
 * So at most one look at a time is under way for each repository, and while an overdue one has not
 * come back the answer is REPOSITORY_OFFLINE at once.
 */
export function createRepositoryPool(
  db: Database,
  { applianceId, leaseTerms }: { applianceId: ApplianceId; leaseTerms: LeaseTerms },
): RepositoryPool {
  const opened = new Map<RepositoryId, Repository>();
  const looking = new Map<RepositoryId, Promise<Capacity>>();

  const openOnce = async (id: RepositoryId): Promise<Repository> => {
    const known = opened.get(id);
    if (known !== undefined) return known;
    const repository = await openAnew(id);
    opened.set(id, repository);
    return repository;
  };
  const openAnew = async (id: RepositoryId): Promise<Repository> => {
    const row = await db.repositories.get(id);
    if (row === null) throw new AppError('NOT_FOUND', `there is no repository ${id}`);
    const repository = await openRepository({ root: row.root, applianceId }, { leaseTerms });
    if (repository.marker.repositoryId !== id) {
      throw new AppError('REPOSITORY_OFFLINE', `another repository is mounted at ${row.root}`, {
        details: { expected: id, found: repository.marker.repositoryId },
      });
    }
    return repository;
  };

  const bounded = async <T>(work: Promise<T>): Promise<T> => {
    try {
      return await withDeadline(work, { timeoutMs: LOOK_TIMEOUT_MS, what: 'opening the repository' });
    } catch (error) {
      if (!(error instanceof AppError) || error.code !== 'TIMEOUT') throw error;
      throw new AppError('REPOSITORY_OFFLINE', 'the storage under the repository does not answer', {
        cause: error,
      });
    }
  };

  return {
    open: (id) => bounded(openOnce(id)),
    look(id) {
      const pending = looking.get(id);
      if (pending !== undefined) return bounded(pending);
      // Anew: a directory that is not mounted any more would answer with the capacity of what is under it.
      const look = openAnew(id)
        .then((repository) => repository.capacity())
        .finally(() => looking.delete(id));
      looking.set(id, look);
      return bounded(look);
    },
  };
}
