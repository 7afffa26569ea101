/**
 * Measures the copy engine: NBD to NBD beside `nbdcopy`; NBD to a layer, and files to a raw file, beside
 * `qemu-img convert`.
 *
 *   node --import tsx integration/native/bench-copy.ts [runs] [connections] [request KiB] [in flight]
 *
 * On a machine with other work, `chrt -r 1` before it gives the figures of a quiet one.
 * Alternating runs on /dev/shm, medians. Wall seconds, and CPU seconds of all processes that took part.
 */
import { readFile, rm } from 'node:fs/promises';
import {
  COPY_OP,
  type CopySession,
  type CopySessionOptions,
  type WindowResult,
} from '../../native/lib/index.js';
import { LayerTables } from '../../repository/layer-tables.js';
import { runTool } from '../../src/lib/process.js';
import { makeLabDirectory } from '../lab/directory.js';
import { SeededRandom, makeRaw, qemuImg, type Region } from '../lab/disk-image.js';
import { startQemuNbd } from '../lab/nbd-server.js';
import { CLUSTER, nbd, openSession } from './fixtures.js';

const MIB = 1024 * 1024;
const DISK_BYTES = 8 * 1024 * MIB;
const DATA_BYTES = 2355 * MIB;
const WINDOW_BYTES = 1024 * MIB;
const TICKS_PER_SECOND = 100;
const [runs = 5, connections = 4, requestKib = 256, inFlight = 16] = process.argv.slice(2).map(Number);

interface Measure {
  wall: number;
  cpu: number;
}

const median = (values: number[]): number =>
  [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)] ?? 0;

async function cpuOf(pid: number): Promise<number> {
  const stat = await readFile(`/proc/${pid}/stat`, 'utf8');
  const fields = stat
    .slice(stat.lastIndexOf(')') + 2)
    .split(' ')
    .map(Number);
  // utime, stime and those of children that were waited for
  return ((fields[11] ?? 0) + (fields[12] ?? 0) + (fields[13] ?? 0) + (fields[14] ?? 0)) / TICKS_PER_SECOND;
}

async function measure(pids: number[], work: () => Promise<unknown>): Promise<Measure> {
  const all = [process.pid, ...pids];
  const before = await Promise.all(all.map(cpuOf));
  const start = performance.now();
  await work();
  const wall = (performance.now() - start) / 1000;
  const after = await Promise.all(all.map(cpuOf));
  return { wall, cpu: after.reduce((sum, it, index) => sum + it - (before[index] ?? 0), 0) };
}

function regions(): Region[] {
  const random = new SeededRandom(42);
  const list: Region[] = [];
  for (let offset = 0, left = DATA_BYTES; left > 0;) {
    const length = Math.min(left, random.between(1, 33) * MIB);
    list.push({ offset, length });
    offset += length + random.between(0, 64) * MIB;
    left -= length;
  }
  return list;
}

async function copyWindows(
  session: CopySession,
  {
    rowsOf,
    onResult,
  }: {
    rowsOf: (offset: number) => Promise<number[]>;
    onResult?: (result: WindowResult) => Promise<void>;
  },
): Promise<void> {
  const outstanding: Promise<WindowResult>[] = [];
  const settle = async (): Promise<void> => {
    const result = await outstanding.shift();
    if (result !== undefined) await onResult?.(result);
  };
  for (let offset = 0; offset < DISK_BYTES; offset += WINDOW_BYTES) {
    const rows = Float64Array.from(await rowsOf(offset));
    if (outstanding.length >= 3) await settle();
    outstanding.push(session.submit({ rows, zeroPolicy: 'skip', emitEntries: true }));
  }
  while (outstanding.length > 0) await settle();
}

function openFrom(source: string, sink: CopySessionOptions['sink']): Promise<CopySession> {
  return openSession({
    source: { ...nbd(source, connections), metaContexts: ['base:allocation'] },
    sink,
    diskBytes: DISK_BYTES,
    requestBytes: requestKib * 1024,
    requestsInFlight: inFlight,
  });
}

async function engineOverNbd(source: string, sink: string): Promise<void> {
  await using session = await openFrom(source, nbd(sink, connections));
  await copyWindows(session, { rowsOf: knownData(session) });
  await session.flush();
}

async function engineToLayer(source: string, path: string): Promise<void> {
  await using tables = await LayerTables.open(path);
  const sink = { kind: 'append', path, startOffset: tables.startOffset } as const;
  await using session = await openFrom(source, sink);
  const reserve = (bytes: number): number => session.reserve(bytes);
  await copyWindows(session, {
    rowsOf: knownData(session),
    onResult: (result) => tables.append(result, reserve),
  });
  await tables.finish(reserve);
  await session.flush();
}

function knownData(session: CopySession): (offset: number) => Promise<number[]> {
  return async (start) => {
    const rows: number[] = [];
    const status = (await session.blockStatus(start, WINDOW_BYTES))['base:allocation'] ?? [];
    for (let at = 0, offset = start; at < status.length; at += 2) {
      const length = status[at] ?? 0;
      const first = Math.floor(offset / CLUSTER) * CLUSTER;
      if (((status[at + 1] ?? 0) & 2) === 0)
        rows.push(first, Math.ceil((offset + length) / CLUSTER) * CLUSTER - first, COPY_OP.copy, 0, 0);
      offset += length;
    }
    return rows;
  };
}

interface MapEntry {
  start: number;
  length: number;
  data: boolean;
  offset?: number;
}

async function engineOverFiles(layer: string, map: MapEntry[], target: string): Promise<void> {
  await runTool('truncate', [`--size=${DISK_BYTES}`, target], { timeoutMs: 10_000 });
  await using session = await openSession({
    source: { kind: 'files', paths: [layer] },
    sink: { kind: 'file', path: target, isZeroed: true },
    diskBytes: DISK_BYTES,
    requestBytes: requestKib * 1024,
  });
  const rows = map
    .filter((it) => it.data)
    .map((it) => [it.start, it.length, COPY_OP.copy, 0, it.offset ?? 0]);
  await session.submit({ rows: Float64Array.from(rows.flat()), zeroPolicy: 'skip', emitEntries: true });
  await session.flush();
}

function report(title: string, ours: Measure[], theirs: Measure[]): void {
  const line = (name: string, list: Measure[]): string =>
    `${name}: wall ${median(list.map((it) => it.wall)).toFixed(2)} s (${list.map((it) => it.wall.toFixed(2)).join(' ')}), cpu ${median(list.map((it) => it.cpu)).toFixed(2)} s`;
  const ratio = median(ours.map((it) => it.wall)) / median(theirs.map((it) => it.wall));
  console.log(
    `${title}\n  ${line('engine', ours)}\n  ${line('stock ', theirs)}\n  ratio ${ratio.toFixed(2)}`,
  );
}

async function main(): Promise<void> {
  await using lab = await makeLabDirectory({ wantBytes: 9 * 1024 * MIB });
  const disk = lab.file('disk.raw');
  await makeRaw({ path: disk, sizeBytes: DISK_BYTES, regions: regions() });
  const overNbd = async (copy: (source: string, sink: string) => Promise<unknown>): Promise<Measure> => {
    const layer = lab.file('layer.qcow2');
    await rm(layer, { force: true });
    await qemuImg(['create', '-q', '-f', 'qcow2', layer, String(DISK_BYTES)]);
    await using source = await startQemuNbd({
      image: disk,
      format: 'raw',
      socketPath: lab.file('s.sock'),
      isReadOnly: true,
    });
    await using sink = await startQemuNbd({
      image: layer,
      format: 'qcow2',
      socketPath: lab.file('d.sock'),
      extra: ['--discard=unmap'],
    });
    return await measure([source.pid, sink.pid], () => copy(source.uri, sink.uri));
  };
  const [ours, theirs, oursFiles, theirsFiles]: Measure[][] = [[], [], [], []];
  for (let run = 0; run < runs; run++) {
    theirs?.push(
      await overNbd((source, sink) => runTool('nbdcopy', ['--flush', source, sink], { timeoutMs: 300_000 })),
    );
    ours?.push(await overNbd(engineOverNbd));
  }
  report('NBD to QCOW2 behind qemu-nbd, against nbdcopy --flush', ours ?? [], theirs ?? []);
  const toLayer = async (copy: (source: string, layer: string) => Promise<unknown>): Promise<Measure> => {
    const layer = lab.file('layer.qcow2');
    await rm(layer, { force: true });
    await qemuImg(['create', '-q', '-f', 'qcow2', layer, String(DISK_BYTES)]);
    await using source = await startQemuNbd({
      image: disk,
      format: 'raw',
      socketPath: lab.file('s.sock'),
      isReadOnly: true,
    });
    return await measure([source.pid], () => copy(source.uri, layer));
  };
  const [oursLayer, theirsLayer]: Measure[][] = [[], []];
  for (let run = 0; run < runs; run++) {
    theirsLayer?.push(
      await toLayer((source, layer) => qemuImg(['convert', '-f', 'raw', '-n', '-O', 'qcow2', source, layer])),
    );
    oursLayer?.push(await toLayer(engineToLayer));
  }
  report('NBD to a layer, against qemu-img convert', oursLayer ?? [], theirsLayer ?? []);
  await qemuImg(['compare', '-f', 'raw', '-F', 'qcow2', disk, lab.file('layer.qcow2')]);
  const [layer, target] = [lab.file('layer.qcow2'), lab.file('target.raw')];
  const map = JSON.parse(await qemuImg(['map', '--output=json', '-f', 'qcow2', layer])) as MapEntry[];
  for (let run = 0; run < runs; run++) {
    const convert = ['convert', '-f', 'qcow2', '-O', 'raw', layer, target];
    theirsFiles?.push(await measure([], () => qemuImg(convert)));
    await rm(target);
    oursFiles?.push(await measure([], () => engineOverFiles(layer, map, target)));
    await rm(target);
  }
  report('layer files to a raw file, against qemu-img convert', oursFiles ?? [], theirsFiles ?? []);
}

await main();
