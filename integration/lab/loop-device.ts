import { randomUUID } from 'node:crypto';
import { runTool } from '../../src/lib/process.js';
import { MIB } from '../../src/lib/units.js';
import { makeRaw, writeRegions, type Region } from './disk-image.js';

const TIMEOUT_MS = 20_000;

const tool = async (name: string, ...args: string[]): Promise<string> =>
  (await runTool(name, args, { timeoutMs: TIMEOUT_MS })).stdout.trim();

/** A file behind a loop device. Disposal takes the device away, as `disconnect` does. */
export interface LoopDevice extends AsyncDisposable {
  readonly path: string;
  readonly file: string;
  disconnect(): Promise<void>;
}

/** Connects a file as the first free loop device, or as the one named. */
export async function connectLoop(file: string, at?: string): Promise<LoopDevice> {
  const path = at ?? (await tool('losetup', '-f', '--show', file));
  if (at !== undefined) await tool('losetup', at, file);
  let isConnected = true;
  const disconnect = async (): Promise<void> => {
    if (!isConnected) return;
    isConnected = false;
    await tool('losetup', '-d', path);
  };
  return { path, file, disconnect, [Symbol.asyncDispose]: disconnect };
}

/** A raw file with an ext4 filesystem, and other bytes in the places where that has none. Answers its UUID. */
export async function makeFilesystem(options: {
  path: string;
  uuid?: string;
  sizeBytes?: number;
  regions?: readonly Region[];
}): Promise<string> {
  const { path, uuid = randomUUID(), sizeBytes = 16 * MIB, regions = [] } = options;
  await makeRaw({ path, sizeBytes });
  await tool('mkfs.ext4', '-q', '-F', '-U', uuid, path);
  await writeRegions(path, regions);
  return uuid;
}
