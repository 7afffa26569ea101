import { createHash, randomBytes } from 'node:crypto';
import type { Dirent } from 'node:fs';
import { copyFile, mkdir, open, readdir, rm, stat, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { AppError, errnoOf } from '../../src/lib/errors.js';
import { runTool } from '../../src/lib/process.js';
import { KIB, MIB } from '../../src/lib/units.js';

const TOOL_TIMEOUT_MS = 120_000;
const DISK_BYTES = 1024 * MIB;
const PARTITION_OFFSET = MIB;
/** GPT keeps its second table in the last 33 sectors. */
const PARTITION_BYTES = DISK_BYTES - 2 * MIB;
const FILES_BYTES = 400 * MIB;
const BLOCK_BYTES = 4 * KIB;
/** Where files of this machine are taken from, and how much at most of each. */
const FILE_ROOTS: readonly (readonly [string, number])[] = [
  ['/usr/share/doc', 16 * MIB],
  ['/usr/bin', 160 * MIB],
  ['/usr/lib', FILES_BYTES],
];

/** The filesystem in the disk image, in the way e2fsprogs names a place inside a file. */
export function demoFilesystem(disk: string): string {
  return `${disk}?offset=${PARTITION_OFFSET}`;
}

/** A raw disk with a GPT and one ext4 filesystem, filled with files of this machine. Nothing is mounted. */
export async function makeDemoDisk(disk: string): Promise<{ files: number; fileBytes: number }> {
  const staging = `${disk}.files`;
  await rm(staging, { recursive: true, force: true });
  try {
    const filled = await collectFiles(staging);
    await writeFile(disk, '');
    await truncateTo(disk, DISK_BYTES);
    const table = `label: gpt\nstart=${PARTITION_OFFSET / 512}, size=${PARTITION_BYTES / 512}, type=linux\n`;
    await runTool('sfdisk', ['--quiet', '--no-reread', '--no-tell-kernel', disk], {
      timeoutMs: TOOL_TIMEOUT_MS,
      input: table,
    });
    const extended = `offset=${PARTITION_OFFSET},lazy_itable_init=0,lazy_journal_init=0,nodiscard`;
    await runTool(
      'mke2fs',
      [
        '-q',
        '-F',
        '-t',
        'ext4',
        '-L',
        'demo',
        '-E',
        extended,
        '-d',
        staging,
        disk,
        `${PARTITION_BYTES / KIB}k`,
      ],
      { timeoutMs: TOOL_TIMEOUT_MS },
    );
    return filled;
  } finally {
    await rm(staging, { recursive: true, force: true });
  }
}

async function truncateTo(file: string, sizeBytes: number): Promise<void> {
  const handle = await open(file, 'r+');
  try {
    await handle.truncate(sizeBytes);
  } finally {
    await handle.close();
  }
}

async function collectFiles(staging: string): Promise<{ files: number; fileBytes: number }> {
  const filled = { files: 0, fileBytes: 0 };
  for (const [root, rootBytes] of FILE_ROOTS) {
    const endBytes = Math.min(FILES_BYTES, filled.fileBytes + rootBytes);
    for await (const { file, sizeBytes } of walkFiles(root)) {
      if (filled.fileBytes + sizeBytes > endBytes) continue;
      const copy = path.join(staging, file);
      await mkdir(path.dirname(copy), { recursive: true });
      await copyFile(file, copy);
      filled.files += 1;
      filled.fileBytes += sizeBytes;
      if (filled.fileBytes > endBytes - MIB) break;
    }
  }
  return filled;
}

async function* walkFiles(directory: string): AsyncGenerator<{ file: string; sizeBytes: number }> {
  for (const entry of await readDirectory(directory)) {
    const file = path.join(directory, entry.name);
    if (entry.isDirectory()) yield* walkFiles(file);
    if (!entry.isFile()) continue;
    const { size } = await stat(file);
    if (size <= 32 * MIB) yield { file, sizeBytes: size };
  }
}

async function readDirectory(directory: string): Promise<Dirent[]> {
  try {
    return await readdir(directory, { withFileTypes: true });
  } catch (error) {
    if (errnoOf(error) === 'ENOENT') return [];
    throw error;
  }
}

/** The file that `changeDemoDisk` adds, and where. */
export const ADDED_FILE = '/changed-by-quickstart.bin';

/**
 * Changes files in a copy of the disk: adds one of 8 MiB whose SHA-256 it answers, overwrites one, removes some.
 * `copy` must exist. The filesystem is clean afterwards.
 */
export async function changeDemoDisk(copy: string, scratchDirectory: string): Promise<{ sha256: string }> {
  const content = path.join(scratchDirectory, 'added.bin');
  const bytes = randomBytes(8 * MIB);
  await writeFile(content, bytes);
  const removed = await listSomeFiles(copy);
  const commands = [
    `write ${content} ${ADDED_FILE}`,
    ...removed.map((file) => `rm "${file}"`),
    'mkdir /new-directory',
  ];
  const commandFile = path.join(scratchDirectory, 'debugfs.commands');
  await writeFile(commandFile, `${commands.join('\n')}\n`);
  await runTool('debugfs', ['-w', '-f', commandFile, demoFilesystem(copy)], { timeoutMs: TOOL_TIMEOUT_MS });
  await checkDemoFilesystem(copy);
  await rm(content);
  await rm(commandFile);
  return { sha256: createHash('sha256').update(bytes).digest('hex') };
}

/** A few files of the filesystem, to be removed. */
async function listSomeFiles(disk: string): Promise<string[]> {
  const listing = await runTool('debugfs', ['-R', 'ls -p /usr/share/doc', demoFilesystem(disk)], {
    timeoutMs: TOOL_TIMEOUT_MS,
  });
  const found: string[] = [];
  for (const line of listing.stdout.split('\n')) {
    const name = line.split('/')[5];
    if (name === undefined || name.startsWith('.') || !/^[\w.+-]+$/.test(name)) continue;
    const directory = `/usr/share/doc/${name}`;
    const inner = await runTool('debugfs', ['-R', `ls -p ${directory}`, demoFilesystem(disk)], {
      timeoutMs: TOOL_TIMEOUT_MS,
    });
    if (inner.stdout.includes('/copyright/')) found.push(`${directory}/copyright`);
    if (found.length === 10) break;
  }
  return found;
}

/** Fails unless e2fsck finds the filesystem clean. It only reads. */
export async function checkDemoFilesystem(disk: string): Promise<void> {
  await runTool('e2fsck', ['-f', '-n', demoFilesystem(disk)], { timeoutMs: TOOL_TIMEOUT_MS });
}

/** SHA-256 of a file inside the filesystem. */
export async function sha256InDemoDisk(disk: string, file: string, scratch: string): Promise<string> {
  await runTool('debugfs', ['-R', `dump ${file} ${scratch}`, demoFilesystem(disk)], {
    timeoutMs: TOOL_TIMEOUT_MS,
  });
  const handle = await open(scratch, 'r');
  try {
    return createHash('sha256')
      .update(await handle.readFile())
      .digest('hex');
  } finally {
    await handle.close();
    await rm(scratch, { force: true });
  }
}

/**
 * Writes what differs between two raw images of one size into an NBD export, in runs of 4 KiB blocks, so that
 * the server sees the writes of a guest that changed the disk from `before` to `after`.
 */
export async function replayChanges(options: {
  before: string;
  after: string;
  uri: string;
  scratchDirectory: string;
}): Promise<{ writes: number; bytes: number }> {
  const runs = await findChangedRuns(options.before, options.after);
  const directory = path.join(options.scratchDirectory, 'changes');
  await mkdir(directory, { recursive: true });
  try {
    const commands: string[] = [];
    for (const [index, run] of runs.entries()) {
      const file = path.join(directory, String(index));
      await copyRun(options.after, file, run);
      commands.push('-c', `write -s ${file} ${run.offset} ${run.length}`);
    }
    for (let first = 0; first < commands.length; first += 400) {
      await runTool('qemu-io', ['-f', 'raw', ...commands.slice(first, first + 400), options.uri], {
        timeoutMs: TOOL_TIMEOUT_MS,
      });
    }
  } finally {
    await rm(directory, { recursive: true, force: true });
  }
  return { writes: runs.length, bytes: runs.reduce((sum, run) => sum + run.length, 0) };
}

interface Run {
  offset: number;
  length: number;
}

async function findChangedRuns(before: string, after: string): Promise<Run[]> {
  const [left, right] = [await open(before, 'r'), await open(after, 'r')];
  const runs: Run[] = [];
  const [a, b] = [Buffer.alloc(MIB), Buffer.alloc(MIB)];
  try {
    for (let position = 0; position < DISK_BYTES; position += MIB) {
      const reads = [await left.read(a, 0, MIB, position), await right.read(b, 0, MIB, position)];
      if (reads.some(({ bytesRead }) => bytesRead !== MIB)) {
        throw new AppError('INTERNAL', `the demonstration disk ended before ${position + MIB}`);
      }
      if (!a.equals(b)) addRuns(runs, [a, b], position);
    }
  } finally {
    await left.close();
    await right.close();
  }
  return runs;
}

function addRuns(runs: Run[], [a, b]: readonly [Buffer, Buffer], position: number): void {
  for (let at = 0; at < MIB; at += BLOCK_BYTES) {
    if (a.subarray(at, at + BLOCK_BYTES).equals(b.subarray(at, at + BLOCK_BYTES))) continue;
    const offset = position + at;
    const last = runs.at(-1);
    if (last !== undefined && last.offset + last.length === offset) last.length += BLOCK_BYTES;
    else runs.push({ offset, length: BLOCK_BYTES });
  }
}

async function copyRun(from: string, to: string, run: Run): Promise<void> {
  const source = await open(from, 'r');
  try {
    const buffer = Buffer.alloc(run.length);
    await source.read(buffer, 0, run.length, run.offset);
    await writeFile(to, buffer);
  } finally {
    await source.close();
  }
}
