import { link, lstat, open, realpath, rename, rm, truncate, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { CleanupStack } from '../lib/cleanup.js';
import { AppError, errnoOf } from '../lib/errors.js';
import { runTool } from '../lib/process.js';
import { alignUp, SECTOR_BYTES } from '../lib/units.js';
import { startQemuNbd, type ServerPlace } from '../nbd/qemu-nbd.js';
import type { OpenTarget, Target, TargetOpenOptions, TargetSpec } from './target.js';

type FileSpec = Extract<TargetSpec, { kind: 'file' }>;

export interface FileTargetOptions extends ServerPlace {
  connections: number;
  /** Directories nothing may be restored into: repositories and the daemon's own state. */
  forbiddenDirectories: readonly string[];
}

const CREATE_TIMEOUT_MS = 30_000;

/**
 * A new image file. It is written under a temporary name that carries the run id and appears under
 * its own name only when it is complete and synced; with `overwrite` it replaces what stood there.
 */
export function openFileTarget(spec: FileSpec, options: FileTargetOptions): Target {
  const partial = partialPath(spec.path, options.owner);
  const check = async (request: TargetOpenOptions): Promise<void> => {
    await requireAllowed(spec.path, options.forbiddenDirectories);
    await requireFree(spec.path, request.overwrite);
  };
  return {
    identity: async () => {
      const directory = await asTargetError(realpath(path.dirname(spec.path)));
      return `file:${path.join(directory, path.basename(spec.path))}`;
    },
    check,
    async open(request) {
      await check(request);
      await using undo = new CleanupStack();
      await createEmpty(partial);
      undo.defer(() => rm(partial, { force: true }));
      const sink =
        spec.format === 'raw'
          ? await openRaw(partial, request.sizeBytes)
          : await openQcow2(partial, { ...options, sizeBytes: request.sizeBytes, signal: request.signal });
      undo.defer(() => sink.stop());
      undo.release();
      return fileTarget({ spec, partial, sink, overwrite: request.overwrite });
    },
  };
}

/** Where a restore of this run into that file stands until it is complete; recovery removes it by this name. */
export function partialPath(file: string, runId: string): string {
  return path.join(path.dirname(file), `.holdfast-restore-${runId}-${path.basename(file)}`.slice(0, 255));
}

interface FileSinkHandle {
  sink: OpenTarget['sink'];
  /** Ends what serves the file, so that every byte has reached it. Idempotent. */
  stop(): Promise<void>;
}

function fileTarget(target: {
  spec: FileSpec;
  partial: string;
  sink: FileSinkHandle;
  overwrite: boolean;
}): OpenTarget {
  const { spec, partial, sink, overwrite } = target;
  let isComplete = false;
  return {
    sink: sink.sink,
    isZeroed: true,
    async complete() {
      await sink.stop();
      await syncPath(partial);
      await appear(partial, spec.path, overwrite);
      await syncPath(path.dirname(spec.path));
      isComplete = true;
    },
    async [Symbol.asyncDispose]() {
      await sink.stop();
      if (!isComplete) await rm(partial, { force: true });
    },
  };
}

async function openRaw(partial: string, sizeBytes: number): Promise<FileSinkHandle> {
  await asTargetError(truncate(partial, sizeBytes));
  return { sink: { kind: 'file', path: partial, isZeroed: true }, stop: () => Promise.resolve() };
}

async function openQcow2(
  partial: string,
  options: FileTargetOptions & { sizeBytes: number; signal: AbortSignal },
): Promise<FileSinkHandle> {
  const virtualBytes = alignUp(options.sizeBytes, SECTOR_BYTES);
  await runTool(
    'qemu-img',
    ['create', '-q', '-f', 'qcow2', '-o', 'cluster_size=65536', '--', partial, String(virtualBytes)],
    { timeoutMs: CREATE_TIMEOUT_MS, signal: options.signal },
  );
  const server = await startQemuNbd({
    imagePath: partial,
    format: 'qcow2',
    isReadOnly: false,
    connections: options.connections,
    runtimeDirectory: options.runtimeDirectory,
    registry: options.registry,
    owner: options.owner,
    signal: options.signal,
  });
  return {
    sink: { kind: 'nbd', uri: server.uri, connections: options.connections },
    stop: () => server.stop(),
  };
}

/** The directory is resolved first, so that a link cannot lead into a forbidden place. */
export async function requireAllowed(file: string, forbidden: readonly string[]): Promise<void> {
  if (!path.isAbsolute(file) || file.includes('\u0000')) {
    throw new AppError('INVALID_INPUT', 'the path of a target must be absolute', {
      details: { field: 'path' },
    });
  }
  const directory = await asTargetError(realpath(path.dirname(file)));
  for (const place of forbidden) {
    const real = await realpath(place).catch((error: unknown) => {
      if (errnoOf(error) === 'ENOENT') return place;
      throw error;
    });
    if (directory === real || directory.startsWith(`${real}/`)) {
      throw new AppError('TARGET_FORBIDDEN', `${file} lies inside ${place}`);
    }
  }
}

/** TARGET_EXISTS when something is there that is not a file, or may not be overwritten. */
export async function requireFree(file: string, overwrite: boolean): Promise<void> {
  try {
    const facts = await lstat(file);
    if (!facts.isFile()) {
      throw new AppError('TARGET_EXISTS', `${file} is there and is not a regular file`);
    }
    if (!overwrite) throw new AppError('TARGET_EXISTS', `${file} is there already`);
  } catch (error) {
    if (errnoOf(error) !== 'ENOENT') throw error;
  }
}

async function createEmpty(partial: string): Promise<void> {
  const handle = await asTargetError(open(partial, 'wx', 0o600));
  await handle.close();
}

/** A small file in one step, as a disk's appears: complete and synced under its name, mode 0600, or not at all. */
export async function placeFile(
  spec: { path: string; content: Buffer },
  options: { owner: string; overwrite: boolean },
): Promise<void> {
  const partial = partialPath(spec.path, options.owner);
  await using undo = new CleanupStack();
  await createEmpty(partial);
  undo.defer(() => rm(partial, { force: true }));
  await asTargetError(writeFile(partial, spec.content));
  await syncPath(partial);
  await appear(partial, spec.path, options.overwrite);
  await syncPath(path.dirname(spec.path));
}

/** Without overwrite a link(2) fails when somebody made the file meanwhile; a rename would replace it. */
async function appear(partial: string, file: string, overwrite: boolean): Promise<void> {
  if (overwrite) {
    await asTargetError(rename(partial, file));
    return;
  }
  await asTargetError(link(partial, file));
  await asTargetError(rm(partial));
}

async function syncPath(file: string): Promise<void> {
  const handle = await asTargetError(open(file, 'r'));
  try {
    await asTargetError(handle.sync());
  } finally {
    await handle.close();
  }
}

/** A system error of the target as an AppError: TARGET_FULL, TARGET_EXISTS, else TARGET_IO. */
export async function asTargetError<T>(work: Promise<T>): Promise<T> {
  try {
    return await work;
  } catch (error) {
    const errno = errnoOf(error);
    if (errno === undefined) throw error;
    if (errno === 'ENOSPC' || errno === 'EDQUOT') {
      throw new AppError('TARGET_FULL', 'no space left where the restore is written', { cause: error });
    }
    if (errno === 'EEXIST')
      throw new AppError('TARGET_EXISTS', 'the target is there already', { cause: error });
    throw new AppError('TARGET_IO', `the target cannot be written: ${errno}`, { cause: error });
  }
}
