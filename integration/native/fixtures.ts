import { createHash } from 'node:crypto';
import {
  COPY_OP,
  HASH_BYTES,
  NbdError,
  connectNbd,
  hashBlock,
  openCopySession,
  type ConnectOptions,
  type CopySession,
  type CopySessionOptions,
  type CopyWindow,
  type HashAlgorithm,
  type NbdHandle,
} from '../../native/lib/index.js';

export const CLUSTER = 65_536;
export const CONNECT_TIMEOUT_MS = 5000;

export async function connectTo(uri: string, options: Partial<ConnectOptions> = {}): Promise<NbdHandle> {
  return connectNbd({ uri, connectTimeoutMs: CONNECT_TIMEOUT_MS, requestTimeoutMs: 5000, ...options });
}

/** A session with the tests' usual settings. */
export async function openSession(
  options: Pick<CopySessionOptions, 'source' | 'sink' | 'diskBytes'> & Partial<CopySessionOptions>,
  control: { signal?: AbortSignal } = {},
): Promise<CopySession> {
  return openCopySession(
    {
      hash: 'xxh3-128',
      clusterBytes: CLUSTER,
      connectTimeoutMs: CONNECT_TIMEOUT_MS,
      stallTimeoutMs: 10_000,
      ...options,
    },
    control,
  );
}

export function nbd(uri: string, connections = 2): { kind: 'nbd'; uri: string; connections: number } {
  return { kind: 'nbd', uri, connections };
}

/** One row: a range of the disk, read from NBD unless a place in a file is given. */
export function copyRow(offset: number, length: number, file: [number, number] = [0, 0]): number[] {
  return [offset, length, COPY_OP.copy, ...file];
}

export function zeroRow(offset: number, length: number): number[] {
  return [offset, length, COPY_OP.zero, 0, 0];
}

export function windowOf(rows: number[][], options: Partial<CopyWindow> = {}): CopyWindow {
  return { rows: Float64Array.from(rows.flat()), zeroPolicy: 'skip', emitEntries: true, ...options };
}

export interface Entry {
  cluster: number;
  isZero: boolean;
  hash: string;
}

export function readEntries(entries: Buffer, algorithm: HashAlgorithm = 'xxh3-128'): Entry[] {
  const stride = 8 + HASH_BYTES[algorithm];
  const list: Entry[] = [];
  for (let at = 0; at < entries.length; at += stride) {
    const index = entries.readBigUInt64LE(at);
    list.push({
      cluster: Number(BigInt.asUintN(63, index)),
      isZero: index >> 63n === 1n,
      hash: entries.subarray(at + 8, at + stride).toString('hex'),
    });
  }
  return list;
}

/** What the engine must say about a disk with this content when zero clusters are skipped. */
export function expectedEntries(disk: Buffer, algorithm: HashAlgorithm = 'xxh3-128'): Entry[] {
  const list: Entry[] = [];
  for (let at = 0; at < disk.length; at += CLUSTER) {
    const cluster = disk.subarray(at, at + CLUSTER);
    if (cluster.every((byte) => byte === 0)) continue;
    list.push({ cluster: at / CLUSTER, isZero: false, hash: hashOf(cluster, algorithm) });
  }
  return list;
}

/** SHA-256 comes from Node's own crypto, so that the addon is not measured by itself. */
export function hashOf(data: Buffer, algorithm: HashAlgorithm): string {
  if (algorithm === 'sha-256') return createHash('sha256').update(data).digest('hex');
  return hashBlock(algorithm, data).toString('hex');
}

export function expectRecord(kind: number, hash: Buffer | undefined, algorithm: HashAlgorithm): Buffer {
  return Buffer.concat([Buffer.from([kind]), hash ?? Buffer.alloc(HASH_BYTES[algorithm])]);
}

/** The error a call ends with; fails the test when it succeeds or ends with another kind. */
export async function nbdErrorOf(work: Promise<unknown>): Promise<NbdError> {
  try {
    await work;
  } catch (error) {
    if (error instanceof NbdError) return error;
    throw error;
  }
  throw new Error('it succeeded, where an NbdError was expected');
}

export async function elapsedMs(work: () => Promise<unknown>): Promise<number> {
  const start = performance.now();
  await work();
  return performance.now() - start;
}
