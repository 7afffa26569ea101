import { rm, statfs } from 'node:fs/promises';
import path from 'node:path';
import { addBitmap, exportRaw, firstDifference } from '../../../integration/lab/disk-image.js';
import { startQemuNbd, type LabNbdServer } from '../../../integration/lab/nbd-server.js';
import { AppError } from '../../../src/lib/errors.js';
import { runTool } from '../../../src/lib/process.js';
import { formatBytes, GIB } from '../../../src/lib/units.js';
import type { Schemas } from '../api-client.js';
import {
  ADDED_FILE,
  changeDemoDisk,
  checkDemoFilesystem,
  makeDemoDisk,
  replayChanges,
  sha256InDemoDisk,
} from '../demo-disk.js';
import type { Account } from './account.js';
import type { OwnSource } from './options.js';

type DiskSource = NonNullable<Schemas['Disk']['source']>;
const COPY_TIMEOUT_MS = 600_000;

/** The disk that is backed up, and what is known about what it held at each point. */
export interface Scene extends AsyncDisposable {
  readonly vmName: string;
  readonly source: DiskSource;
  /** How the second point must have been taken; null: whatever is right for the user's source. */
  readonly expectedMethod: 'bitmap' | null;
  /** Between the full and the incremental. */
  change(pointId: string): Promise<void>;
  /** Fails unless the restored file is what the source was at that point. */
  compare(point: 1 | 2, restored: string): Promise<void>;
}

/** A disk of the user's own. It is only read. */
export function ownScene(own: OwnSource, account: Account): Scene {
  const source: DiskSource =
    own.kind === 'nbd'
      ? { kind: 'nbd', uri: own.uri, changeTracking: 'auto' }
      : { kind: 'image', path: own.path, format: own.format, changeTracking: 'auto' };
  const [name, format] = own.kind === 'nbd' ? [own.uri, 'raw'] : [own.path, own.format];
  return {
    vmName: `quickstart ${name}`.slice(0, 200),
    source,
    expectedMethod: null,
    change: () => {
      account.line(
        'The source is yours: nothing is written to it. What changed by itself is found by comparing.',
      );
      return Promise.resolve();
    },
    compare: async (_point, restored) => {
      const { exitCode } = await runTool('qemu-img', ['compare', '-f', 'raw', '-F', format, restored, name], {
        timeoutMs: COPY_TIMEOUT_MS,
        acceptExitCodes: [0, 1],
      });
      if (exitCode !== 0) {
        throw new AppError(
          'INTERNAL',
          `${restored} differs from what ${name} holds now. That is so when something writes to the source; give one that is quiet, or a snapshot of it.`,
        );
      }
    },
    [Symbol.asyncDispose]: () => Promise.resolve(),
  };
}

/** A disk made for the occasion, served over NBD as a hypervisor would. */
export async function demoScene(
  places: { directory: string; socketPath: string },
  account: Account,
): Promise<Scene> {
  await needSpace(places.directory);
  const demo = new DemoDisk(places, account);
  await demo.make();
  return demo;
}

async function needSpace(directory: string): Promise<void> {
  const { bavail, bsize } = await statfs(directory);
  const freeBytes = bavail * bsize;
  if (freeBytes < 4 * GIB) {
    throw new AppError(
      'TARGET_FULL',
      `${directory} has ${formatBytes(freeBytes)} free; the demonstration needs 4 GiB`,
    );
  }
}

class DemoDisk implements Scene {
  readonly vmName = 'quickstart';
  readonly expectedMethod = 'bitmap';
  readonly #image: string;
  readonly #copies: Record<1 | 2, string>;
  #server: LabNbdServer | undefined;
  #addedSha256 = '';

  constructor(
    private readonly places: { directory: string; socketPath: string },
    private readonly account: Account,
  ) {
    this.#image = path.join(places.directory, 'disk.qcow2');
    this.#copies = {
      1: path.join(places.directory, 'what-it-was-at-point-1.raw'),
      2: path.join(places.directory, 'what-it-was-at-point-2.raw'),
    };
  }

  get source(): DiskSource {
    return { kind: 'nbd', uri: this.#served().uri, changeTracking: 'auto' };
  }

  async make(): Promise<void> {
    for (const file of [this.#image, ...Object.values(this.#copies)]) await rm(file, { force: true });
    const { files, fileBytes } = await makeDemoDisk(this.#copies[1]);
    const args = ['convert', '-q', '-f', 'raw', '-O', 'qcow2', this.#copies[1], this.#image];
    await runTool('qemu-img', args, { timeoutMs: COPY_TIMEOUT_MS });
    await this.#serve();
    this.account.facts({
      disk: `${this.#image}: GPT, one ext4 filesystem, ${files} files of this machine, ${formatBytes(fileBytes)}`,
      'served at': this.#served().uri,
    });
  }

  /** The bitmap's name carries the point's id: nobody knew it before, so the bitmap began after it. */
  async change(pointId: string): Promise<void> {
    const bitmap = `holdfast-${pointId}`;
    await this.#stop();
    await addBitmap(this.#image, bitmap);
    await runTool('cp', ['--sparse=always', this.#copies[1], this.#copies[2]], {
      timeoutMs: COPY_TIMEOUT_MS,
    });
    const { sha256 } = await changeDemoDisk(this.#copies[2], this.places.directory);
    this.#addedSha256 = sha256;
    await this.#serve();
    const written = await replayChanges({
      before: this.#copies[1],
      after: this.#copies[2],
      uri: this.#served().uri,
      scratchDirectory: this.places.directory,
    });
    await this.#stop();
    await this.#checkServed();
    await this.#serve(bitmap);
    this.account.facts({
      bitmap,
      changed: `${ADDED_FILE} added, ten files and their blocks removed, a directory made`,
      'written over NBD': `${formatBytes(written.bytes)} in ${written.writes} places`,
    });
  }

  async compare(point: 1 | 2, restored: string): Promise<void> {
    const difference = await firstDifference(restored, this.#copies[point]);
    if (difference !== null) {
      throw new AppError('INTERNAL', `${restored} is not what the source was: ${JSON.stringify(difference)}`);
    }
    await checkDemoFilesystem(restored);
    if (point !== 2) return;
    const sha256 = await sha256InDemoDisk(restored, ADDED_FILE, path.join(this.places.directory, 'dumped'));
    if (sha256 !== this.#addedSha256)
      throw new AppError('INTERNAL', `${ADDED_FILE} in ${restored} is another file`);
    this.account.line(`its filesystem is clean (e2fsck), and ${ADDED_FILE} in it has the right SHA-256`);
  }

  /** The copy that restores are compared with must be what the server really holds. */
  async #checkServed(): Promise<void> {
    const held = path.join(this.places.directory, 'held.raw');
    try {
      await exportRaw(this.#image, 'qcow2', held);
      if ((await firstDifference(held, this.#copies[2])) !== null) {
        throw new AppError('INTERNAL', 'the served disk does not hold what was written to it');
      }
    } finally {
      await rm(held, { force: true });
    }
  }

  #served(): LabNbdServer {
    if (this.#server === undefined) throw new AppError('INTERNAL', 'the disk is not served');
    return this.#server;
  }

  async #serve(bitmap?: string): Promise<void> {
    this.#server = await startQemuNbd({
      image: this.#image,
      format: 'qcow2',
      socketPath: this.places.socketPath,
      exportName: 'demo',
      // With a bitmap it is there to be backed up: nothing may write meanwhile.
      ...(bitmap === undefined ? {} : { bitmap, isReadOnly: true }),
    });
  }

  async #stop(): Promise<void> {
    await this.#server?.stop();
    this.#server = undefined;
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.#stop();
  }
}
