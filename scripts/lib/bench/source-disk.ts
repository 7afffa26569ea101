import { rm } from 'node:fs/promises';
import path from 'node:path';
import {
  addBitmap,
  makeRaw,
  qemuImg,
  qemuIo,
  SeededRandom,
  type Region,
} from '../../../integration/lab/disk-image.js';
import { startQemuNbd, type LabNbdServer } from '../../../integration/lab/nbd-server.js';
import { alignDown, GIB, KIB, MIB } from '../../../src/lib/units.js';

const CHANGED_PLACES = 1000;
const CHANGED_BYTES = 64 * MIB;
const CHANGE_BYTES = 64 * KIB;

/** The disk that is backed up: a QCOW2 image behind a qemu-nbd on a Unix socket. */
export class SourceDisk {
  readonly image: string;
  readonly #socketPath: string;
  #server: LabNbdServer | undefined;

  private constructor(
    directory: string,
    private readonly sizeBytes: number,
  ) {
    this.image = path.join(directory, 'source.qcow2');
    this.#socketPath = path.join(directory, 'source.sock');
  }

  static async make(directory: string, size: DiskSize): Promise<SourceDisk> {
    const disk = new SourceDisk(directory, bytesOf(size));
    await makeImage(disk.image, size);
    return disk;
  }

  get uri(): string {
    if (this.#server === undefined) throw new Error('the source is not served');
    return this.#server.uri;
  }

  async serve(options: { bitmap?: string } = {}): Promise<void> {
    this.#server = await startQemuNbd({
      image: this.image,
      format: 'qcow2',
      socketPath: this.#socketPath,
      exportName: 'bench',
      isReadOnly: true,
      shared: 32,
      ...options,
    });
  }

  async stop(): Promise<void> {
    await this.#server?.stop();
    this.#server = undefined;
  }

  /** 64 MiB of new data in 1,000 places, recorded in a new bitmap. */
  async change(bitmap: string, seed: number): Promise<void> {
    await addBitmap(this.image, bitmap);
    const commands = changeCommands(this.sizeBytes, seed);
    await qemuIo({ path: this.image, format: 'qcow2', commands });
  }
}

export interface DiskSize {
  diskGib: number;
  dataGib: number;
}

export function bytesOf({ diskGib }: DiskSize): number {
  return Math.round(diskGib * GIB);
}

/** A QCOW2 image with incompressible data spread over it. */
export async function makeImage(image: string, size: DiskSize): Promise<void> {
  const raw = `${image}.raw`;
  await makeRaw({ path: raw, sizeBytes: bytesOf(size), regions: spreadRegions(size) });
  await qemuImg(['convert', '-q', '-W', '-m', '8', '-f', 'raw', '-O', 'qcow2', raw, image]);
  await rm(raw);
}

/** qemu-io commands that write 64 MiB in 1,000 places. */
export function changeCommands(sizeBytes: number, seed: number): string[] {
  const random = new SeededRandom(seed);
  const places = new Map<number, number>();
  let left = CHANGED_BYTES;
  while (places.size < CHANGED_PLACES) {
    const offset = alignDown(random.between(0, sizeBytes - 2 * CHANGE_BYTES), 2 * CHANGE_BYTES);
    if (places.has(offset)) continue;
    const more = left - (CHANGED_PLACES - places.size) * CHANGE_BYTES;
    const length = more >= CHANGE_BYTES ? 2 * CHANGE_BYTES : CHANGE_BYTES;
    places.set(offset, length);
    left -= length;
  }
  return [...places].map(([offset, length]) => `write -P ${random.between(1, 256)} ${offset} ${length}`);
}

/** Runs of data of 64 KiB to 8 MiB with gaps between them, over the whole disk. */
function spreadRegions(size: DiskSize): Region[] {
  const diskBytes = bytesOf(size);
  let left = alignDown(Math.round(size.dataGib * GIB), CHANGE_BYTES);
  const gapShare = (diskBytes - left) / left;
  const random = new SeededRandom(1);
  const regions: Region[] = [];
  let offset = 0;
  while (left > 0 && offset < diskBytes) {
    const length = Math.min(left, diskBytes - offset, CHANGE_BYTES * random.between(1, 129));
    regions.push({ offset, length });
    left -= length;
    offset += length + alignDown(Math.floor(length * gapShare * (0.5 + random.next() * 0.9)), CHANGE_BYTES);
  }
  return regions;
}
