import { createHash } from 'node:crypto';
import { open, readFile } from 'node:fs/promises';
import { pushDisks, type DiskReport, type PushJob } from '../../src/capture/capture.js';
import type { PushedDisk, PushedTotals } from '../../src/capture/disk-push.js';
import { openCaptureSource, type CaptureSource, type SourceSpec } from '../../src/capture/source.js';
import { CLUSTER_BYTES, MIB } from '../../src/lib/units.js';
import { hashBlock, type TlsOptions } from '../../src/nbd/index.js';
import { definition, startExportd, type ExportdRig, type RigOptions } from '../exportd/rig.js';
import { makeLabDirectory, type LabDirectory } from '../lab/directory.js';
import { expectCleanImage, exportRaw, qemuImg } from '../lab/disk-image.js';

/** A directory, an export daemon, and layers it takes writes for. */
export interface CaptureRig extends AsyncDisposable {
  lab: LabDirectory;
  exportd: ExportdRig;
  /** A new layer, served writable. */
  addLayer(name: string, options: { sizeBytes: number; parent?: string }): Promise<Layer>;
  source(spec: SourceSpec): Promise<CaptureSource>;
}

export interface Layer {
  path: string;
  tcp: string;
  unix: string;
  /** What a reader of the chain sees, as a raw file. The image must be clean. */
  read(): Promise<string>;
}

export async function startCaptureRig(options: Partial<RigOptions> = {}): Promise<CaptureRig> {
  const lab = await makeLabDirectory();
  const exportd = await startExportd({ directory: lab.file('exportd'), ...options });
  return {
    lab,
    exportd,
    addLayer: async (name, { sizeBytes, parent }) => {
      const path = lab.file(`${name}.qcow2`);
      const backing = parent === undefined ? [] : ['-b', parent, '-F', 'qcow2'];
      const sectors = Math.ceil(sizeBytes / 512) * 512;
      await qemuImg(['create', '-q', '-f', 'qcow2', ...backing, path, String(sectors)]);
      await exportd.write(`${name}.conf`, definition(name, path, { isReadOnly: false }));
      await exportd.reload();
      return {
        path,
        tcp: exportd.tcp(name),
        unix: exportd.unix(name),
        read: async () => {
          await exportd.remove(`${name}.conf`);
          await exportd.reload();
          await expectCleanImage(path);
          const copy = lab.file(`${name}.copy`);
          await exportRaw(path, 'qcow2', copy);
          const file = await open(copy, 'r+');
          await file.truncate(sizeBytes);
          await file.close();
          return copy;
        },
      };
    },
    source: (spec) =>
      openCaptureSource(spec, {
        runtimeDirectory: lab.path,
        connections: 2,
        signal: new AbortController().signal,
      }),
    [Symbol.asyncDispose]: async () => {
      await exportd.stop();
      await lab[Symbol.asyncDispose]();
    },
  };
}

export interface Pushed {
  completed: Map<string, PushedTotals>;
  reports: DiskReport[][];
  notes: string[];
}

export function disk(
  source: CaptureSource,
  uri: string,
  more: Partial<PushedDisk> & { tls?: TlsOptions } = {},
): PushedDisk {
  const { tls = {}, ...rest } = more;
  return {
    diskId: 'd0',
    name: 'vda',
    source,
    sink: { uri, tls },
    sizeBytes: source.sizeBytes,
    method: 'full',
    dirtyContext: null,
    parentSizeBytes: null,
    changeId: 'c1',
    ...rest,
  };
}

export interface Started extends Pushed {
  ended: Promise<void>;
  stop(): void;
}

/** Begins a push; the server of it says yes to everything unless told otherwise. */
export function startPush(disks: PushedDisk[], options: Partial<PushJob> = {}): Started {
  const pushed: Pushed = { completed: new Map(), reports: [], notes: [] };
  const stop = new AbortController();
  const ended = pushDisks({
    disks,
    hash: 'xxh3-128',
    clusterBytes: CLUSTER_BYTES,
    connections: 2,
    bytesPerSecond: 0,
    retryMs: 20_000,
    flushBytes: 8 * MIB,
    silenceMs: 60_000,
    notify: (text) => pushed.notes.push(text),
    signal: stop.signal,
    ...options,
    server: {
      report: (reports) => {
        pushed.reports.push([...reports]);
        return Promise.resolve(true);
      },
      complete: (it, totals) => {
        pushed.completed.set(it.name, totals);
        return Promise.resolve(true);
      },
      ...options.server,
    },
  });
  ended.catch(() => undefined);
  return {
    ...pushed,
    ended,
    stop: () => {
      stop.abort();
    },
  };
}

export async function push(disks: PushedDisk[], options: Partial<PushJob> = {}): Promise<Pushed> {
  const started = startPush(disks, options);
  await started.ended;
  return started;
}

/**
 * The digest that the agent must come to: entries of the clusters of a raw file, zero ones left out of a full, those
 * that are not dirty out of an incremental.
 */
export async function expectedDigest(
  file: string,
  { isDirty = null }: { isDirty?: ((cluster: number) => boolean) | null } = {},
): Promise<string> {
  const content = await readFile(file);
  const digest = createHash('sha256');
  const zeroes = Buffer.alloc(CLUSTER_BYTES);
  for (let cluster = 0; cluster * CLUSTER_BYTES < content.length; cluster += 1) {
    const bytes = content.subarray(cluster * CLUSTER_BYTES, (cluster + 1) * CLUSTER_BYTES);
    const isZero = bytes.equals(zeroes.subarray(0, bytes.length));
    if (isDirty === null ? isZero : !isDirty(cluster)) continue;
    const index = Buffer.alloc(8);
    index.writeBigUInt64LE(BigInt(cluster) | (isZero ? 1n << 63n : 0n));
    digest.update(index).update(isZero ? Buffer.alloc(16) : hashBlock('xxh3-128', bytes));
  }
  return digest.digest('hex');
}
