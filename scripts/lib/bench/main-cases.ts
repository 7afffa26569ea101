import { rm } from 'node:fs/promises';
import path from 'node:path';
import { exportRaw, firstDifference } from '../../../integration/lab/disk-image.js';
import { AppError } from '../../../src/lib/errors.js';
import { GIB } from '../../../src/lib/units.js';
import type { BenchDaemon } from './holdfast.js';
import type { BenchOptions } from './options.js';
import type { Case, Result, Tool } from './report.js';
import { SourceDisk } from './source-disk.js';
import { convertFull, convertRestore, nbdcopyFull } from './tools.js';
import type { Usage } from './usage.js';

interface Bench {
  options: BenchOptions;
  directory: string;
  daemon: BenchDaemon;
  record: (result: Result) => void;
}

/** Full, incremental and restore, each tool in turn; which one begins changes from run to run. */
export async function runMainCases(bench: Bench): Promise<void> {
  const source = await SourceDisk.make(bench.directory, bench.options);
  try {
    await source.serve();
    const { vmId, diskId } = await bench.daemon.addVm('bench', source.uri);
    const kept = await runFulls(bench, source, vmId);
    const pointIds = await runIncrementals(bench, source, { vmId, ...kept });
    const firstIncrement = pointIds[0];
    if (firstIncrement === undefined) throw new AppError('INTERNAL', 'no incremental was made');
    await runRestores(bench, { pointId: firstIncrement, diskId });
  } finally {
    await source.stop();
    await rm(source.image, { force: true });
  }
}

/** Answers the repository and the point of the last run, which is kept for what follows. */
async function runFulls(
  bench: Bench,
  source: SourceDisk,
  vmId: string,
): Promise<{ repositoryId: string; pointId: string }> {
  const { options, directory, daemon } = bench;
  const output = path.join(directory, 'output.qcow2');
  let kept: { repositoryId: string; pointId: string; root: string } | undefined;
  for (let run = 0; run < options.runs; run += 1) {
    const holdfast = async (): Promise<Usage> => {
      if (kept !== undefined) await rm(kept.root, { recursive: true });
      const root = path.join(directory, `repository-${run}`);
      const repositoryId = await daemon.createRepository(root);
      const { usage, pointId } = await daemon.backup({ vmId, repositoryId, type: 'full' });
      kept = { repositoryId, pointId, root };
      return usage;
    };
    await runInTurn(bench, 'full', {
      run,
      contenders: [
        ['holdfast', holdfast],
        ['nbdcopy', removingAfter(output, () => nbdcopyFull(source, output, options.diskGib * GIB))],
        ['qemu-img-convert', removingAfter(output, () => convertFull(source, output))],
      ],
    });
  }
  if (kept === undefined) throw new AppError('INTERNAL', 'no full backup was made');
  return kept;
}

async function runIncrementals(
  bench: Bench,
  source: SourceDisk,
  start: { vmId: string; repositoryId: string; pointId: string },
): Promise<string[]> {
  const pointIds: string[] = [];
  let lastPointId = start.pointId;
  for (let run = 0; run < bench.options.runs; run += 1) {
    const bitmap = `holdfast-${lastPointId}`;
    await source.stop();
    await source.change(bitmap, run + 1);
    await source.serve({ bitmap });
    const { vmId, repositoryId } = start;
    const { usage, pointId } = await bench.daemon.backup({ vmId, repositoryId, type: 'incremental' });
    bench.record({ case: 'incremental', tool: 'holdfast', ...usage });
    pointIds.push(pointId);
    lastPointId = pointId;
  }
  return pointIds;
}

async function runRestores(bench: Bench, point: { pointId: string; diskId: string }): Promise<void> {
  const { daemon, directory, options } = bench;
  const file = path.join(directory, 'restored.raw');
  const top = await daemon.topOfChain(point.pointId);
  for (let run = 0; run < options.runs; run += 1) {
    await runInTurn(bench, 'restore', {
      run,
      contenders: [
        ['holdfast', removingAfter(file, () => daemon.restore({ ...point, file }))],
        ['qemu-img-convert', removingAfter(file, () => convertRestore(top, file))],
      ],
    });
  }
  await checkRestore(daemon, { ...point, top, file });
}

/** The figures mean nothing unless the bytes are right: once more, and compared with stock qemu-img. */
async function checkRestore(
  daemon: BenchDaemon,
  { file, top, ...point }: { pointId: string; diskId: string; top: string; file: string },
): Promise<void> {
  const stock = `${file}.stock`;
  try {
    await daemon.restore({ ...point, file });
    await exportRaw(top, 'qcow2', stock);
    const difference = await firstDifference(file, stock);
    if (difference !== null)
      throw new AppError('INTERNAL', `the restore is wrong: ${JSON.stringify(difference)}`);
  } finally {
    await rm(file, { force: true });
    await rm(stock, { force: true });
  }
}

type Contender = readonly [Tool, () => Promise<Usage>];

async function runInTurn(
  bench: Bench,
  name: Case,
  { run, contenders }: { run: number; contenders: readonly Contender[] },
): Promise<void> {
  for (let turn = 0; turn < contenders.length; turn += 1) {
    const contender = contenders[(run + turn) % contenders.length];
    if (contender === undefined) continue;
    const [tool, work] = contender;
    bench.record({ case: name, tool, ...(await work()) });
  }
}

function removingAfter(file: string, work: () => Promise<Usage>): () => Promise<Usage> {
  return async () => {
    try {
      return await work();
    } finally {
      await rm(file, { force: true });
    }
  };
}
