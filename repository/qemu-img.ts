import path from 'node:path';
import { z } from 'zod';
import { AppError, isErrorCode } from '../src/lib/errors.js';
import { ToolError, runTool } from '../src/lib/process.js';
import { CLUSTER_BYTES, MIB } from '../src/lib/units.js';
import type { Backend } from './backend.js';

const CREATE_TIMEOUT_MS = 60_000;
/** qemu-img check reads metadata only, some 128 KiB for each GiB of data; a slow disk still makes 10 MiB a second. */
const CHECK_TIMEOUT_MS = 30 * 60_000;
/** With less than this free a tool that failed to write is taken to have run out of space. */
const FULL_BELOW_BYTES = 2 * MIB;

/**
 * Writes an empty layer into an existing file. `backingName` is the file name of the parent in the same
 * directory, so that it holds wherever the repository is mounted.
 */
export async function createImage(
  backend: Backend,
  image: { file: string; virtualBytes: number; backingName: string | null },
): Promise<void> {
  const { file, virtualBytes, backingName } = image;
  const backing = backingName === null ? [] : ['-F', 'qcow2', '-b', backingName];
  const options = `cluster_size=${CLUSTER_BYTES},lazy_refcounts=off,compat=1.1`;
  const args = [
    'create',
    '-q',
    '-f',
    'qcow2',
    '-o',
    options,
    ...backing,
    path.basename(file),
    String(virtualBytes),
  ];
  try {
    await runTool('qemu-img', args, { timeoutMs: CREATE_TIMEOUT_MS, cwd: path.dirname(file) });
  } catch (error) {
    throw await explainToolFailure(backend, error);
  }
}

/** The tool says only "failed": when the file system has nothing left, that is why. */
async function explainToolFailure(backend: Backend, error: unknown): Promise<unknown> {
  if (!isErrorCode(error, 'TOOL_FAILED')) return error;
  const { freeBytes } = await backend.capacity();
  if (freeBytes >= FULL_BELOW_BYTES) return error;
  return new AppError('REPOSITORY_FULL', 'there was no space left for a layer', {
    cause: error,
    details: { freeBytes },
  });
}

const checkSchema = z.object({
  'check-errors': z.number(),
  corruptions: z.number().optional(),
  leaks: z.number().optional(),
});

export interface ImageCheck {
  /** Metadata that contradicts itself, or could not be read. */
  errors: number;
  /** Clusters that are counted but not used: lost space, no lost content. */
  leaks: number;
}

/**
 * CONFLICT while somebody has the image open for writing, by QEMU's own lock on the file: what is read of it then
 * could still change.
 */
export async function requireClosed(file: string, signal?: AbortSignal): Promise<void> {
  try {
    await runTool('qemu-img', ['info', '-f', 'qcow2', imageAlone(file)], {
      timeoutMs: CREATE_TIMEOUT_MS,
      cwd: path.dirname(file),
      signal,
    });
  } catch (error) {
    // qemu's words are looked at because no exit code tells a lock from another failure.
    if (!(error instanceof ToolError) || !/Failed to get .*lock/.test(error.stderrTail)) throw error;
    throw new AppError('CONFLICT', 'a layer is still open for writing', { cause: error, details: { file } });
  }
}

/** Without `backing: null` qemu-img opens the whole chain, and a damaged parent would be held against this file. */
function imageAlone(file: string): string {
  const node = { driver: 'qcow2', backing: null, file: { driver: 'file', filename: path.basename(file) } };
  return `json:${JSON.stringify(node)}`;
}

/** `qemu-img check`, without repair. Exit codes 2 (corruptions) and 3 (leaks) are answers. */
export async function checkImage(file: string, signal?: AbortSignal): Promise<ImageCheck> {
  const args = ['check', '-f', 'qcow2', '--output=json', imageAlone(file)];
  const { stdout } = await runTool('qemu-img', args, {
    timeoutMs: CHECK_TIMEOUT_MS,
    cwd: path.dirname(file),
    acceptExitCodes: [0, 2, 3],
    signal,
  });
  const answer = parseCheck(stdout);
  return { errors: answer['check-errors'] + (answer.corruptions ?? 0), leaks: answer.leaks ?? 0 };
}

function parseCheck(stdout: string): z.infer<typeof checkSchema> {
  try {
    return checkSchema.parse(JSON.parse(stdout));
  } catch (error) {
    throw new AppError('TOOL_FAILED', 'qemu-img check gave an answer that cannot be read', {
      cause: error,
      details: { tool: 'qemu-img' },
    });
  }
}
