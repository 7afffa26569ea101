import { constants } from 'node:fs';
import { access, mkdir, open, realpath } from 'node:fs/promises';
import path from 'node:path';
import { systemClock, toTimestamp, type Clock } from '../src/lib/clock.js';
import { AppError, errnoOf } from '../src/lib/errors.js';
import { newId, type ApplianceId, type RepositoryId, type RunId } from '../src/lib/id.js';
import { CLUSTER_BYTES } from '../src/lib/units.js';
import type { HashAlgorithm } from '../src/nbd/index.js';
import { TEMPORARY_PREFIX, toStorageError, type Backend } from './backend.js';
import type { RepositoryContext } from './context.js';
import { RESTORE_GUIDE } from './guide.js';
import {
  GUIDE_FILE,
  LOCKS_DIRECTORY,
  MARKER_FILE,
  RUNS_DIRECTORY,
  TRASH_DIRECTORY,
  VMS_DIRECTORY,
} from './layout.js';
import { DEFAULT_LEASE_TERMS, acquireLease, type LeaseTerms } from './lease.js';
import { LocalBackend } from './local-backend.js';
import { encodeMarker, readMarker, requireOwner } from './marker.js';
import type { OpenOptions, Repository } from './repository.js';
import { StoredRepository } from './stored-repository.js';
import { FORMAT_VERSION, type RepositoryMarker } from './types.js';

export interface CreateOptions {
  /** Absolute path: an empty directory, or a name in an existing directory. */
  root: string;
  hash: HashAlgorithm;
  applianceId: ApplianceId;
  clock?: Clock;
}

/** Parts a test replaces. */
export interface RepositoryParts {
  backend?: (backend: Backend) => Backend;
  clock?: Clock;
  leaseTerms?: LeaseTerms;
}

const SKELETON = [VMS_DIRECTORY, RUNS_DIRECTORY, LOCKS_DIRECTORY, TRASH_DIRECTORY];
/** What mkfs leaves in the root of a file system. */
const HARMLESS = new Set(['lost+found']);

/**
 * Makes a repository in an empty or absent directory and opens it. REPOSITORY_EXISTS when anything
 * else is there. The marker comes last: a directory without it is no repository.
 */
export async function createRepository(options: CreateOptions): Promise<Repository> {
  const clock = options.clock ?? systemClock;
  const root = path.resolve(options.root);
  await makeRoot(options.root);
  const backend = new LocalBackend({ root });
  await requireEmpty(backend);
  for (const directory of SKELETON) await backend.makeDirectory(directory);
  await backend.writeDurable(GUIDE_FILE, Buffer.from(RESTORE_GUIDE), { mode: 0o644 });
  const marker: RepositoryMarker = {
    formatVersion: FORMAT_VERSION,
    repositoryId: newId<RepositoryId>(clock.nowMs()),
    hash: options.hash,
    clusterBytes: CLUSTER_BYTES,
    ownerApplianceId: options.applianceId,
    createdAt: toTimestamp(clock.nowMs()),
  };
  if (!(await backend.createExclusive(MARKER_FILE, encodeMarker(marker), { mode: 0o644 })))
    throw notEmpty(root);
  return openRepository({ root, applianceId: options.applianceId }, { clock });
}

/**
 * Opens the repository in `root`. Nothing is created: REPOSITORY_OFFLINE without a marker,
 * REPOSITORY_FORMAT for a newer format, REPOSITORY_FOREIGN when another appliance owns it.
 */
export async function openRepository(options: OpenOptions, parts: RepositoryParts = {}): Promise<Repository> {
  return new StoredRepository(await openContext(options, parts));
}

/** As `openRepository`, for the parts of this folder that work on the context itself. */
export async function openContext(
  options: OpenOptions,
  parts: RepositoryParts = {},
): Promise<RepositoryContext> {
  const root = path.resolve(options.root);
  const local = new LocalBackend({ root: options.root, anchor: MARKER_FILE });
  const backend = parts.backend?.(local) ?? local;
  const base = {
    backend,
    root,
    clock: parts.clock ?? systemClock,
    leaseTerms: parts.leaseTerms ?? DEFAULT_LEASE_TERMS,
  };
  const marker = await readMarker(backend);
  const { applianceId } = options;
  if (applianceId === undefined) return { ...base, marker, applianceId };
  if (options.takeover === true && marker.ownerApplianceId !== applianceId) {
    return { ...base, marker: await takeOver({ ...base, marker, applianceId }), applianceId };
  }
  requireOwner(marker, applianceId);
  return { ...base, marker, applianceId };
}

/**
 * Rewrites the owner under the lease `repository`, so that of two appliances that try at once one is
 * refused; then reads it back. The former owner finds out before its next write, since every write
 * path reads the marker first.
 */
async function takeOver(
  context: RepositoryContext & { applianceId: ApplianceId },
): Promise<RepositoryMarker> {
  const { backend, clock, applianceId, leaseTerms } = context;
  const leaseContext = { backend, clock, applianceId, terms: leaseTerms };
  const holder = { runId: newId<RunId>(clock.nowMs()), purpose: 'takeover' };
  await using lease = await acquireLease(leaseContext, 'repository', holder);
  const current = await readMarker(backend);
  const taken: RepositoryMarker = { ...current, ownerApplianceId: applianceId };
  await lease.verify();
  await backend.writeDurable(MARKER_FILE, encodeMarker(taken), { mode: 0o644 });
  const written = await readMarker(backend);
  requireOwner(written, applianceId);
  return written;
}

async function makeRoot(root: string): Promise<void> {
  if (!path.isAbsolute(root)) {
    throw new AppError('INVALID_INPUT', 'a repository root is an absolute path', { details: { root } });
  }
  try {
    await mkdir(root, { mode: 0o700 });
    await syncDirectory(path.dirname(root));
  } catch (error) {
    const errno = errnoOf(error);
    if (errno === 'ENOENT' || errno === 'ENOTDIR') {
      throw new AppError('INVALID_INPUT', 'the directory above the repository is not there', {
        cause: error,
        details: { root },
      });
    }
    if (errno !== 'EEXIST') throw toStorageError(error, 'creating the repository directory');
    await requireDirectory(root);
  }
}

async function requireDirectory(root: string): Promise<void> {
  try {
    await access(await realpath(root), constants.W_OK | constants.X_OK);
  } catch (error) {
    throw toStorageError(error, 'opening the repository directory');
  }
}

async function syncDirectory(directory: string): Promise<void> {
  const handle = await open(directory, constants.O_RDONLY | constants.O_DIRECTORY);
  try {
    await handle.sync();
  } finally {
    await handle.close();
  }
}

/** Empty, or what a creation that was interrupted before its marker has left. */
async function requireEmpty(backend: Backend): Promise<void> {
  const root = backend.localPath('');
  for (const entry of (await backend.list('')) ?? []) {
    if (HARMLESS.has(entry.name) || entry.name === GUIDE_FILE) continue;
    if (entry.kind === 'file' && entry.name.startsWith(TEMPORARY_PREFIX)) continue;
    const isEmptySkeleton =
      SKELETON.includes(entry.name) &&
      entry.kind === 'directory' &&
      (await backend.list(entry.name))?.length === 0;
    if (!isEmptySkeleton) throw notEmpty(root);
  }
}

function notEmpty(root: string): AppError {
  return new AppError('REPOSITORY_EXISTS', 'the directory is not empty', { details: { root } });
}
