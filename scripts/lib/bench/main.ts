import { mkdtemp, rm, statfs, writeFile } from 'node:fs/promises';
import os from 'node:os';
import path from 'node:path';
import { runTool } from '../../../src/lib/process.js';
import { CleanupStack } from '../../../src/lib/cleanup.js';
import { AppError, toAppError } from '../../../src/lib/errors.js';
import { formatBytes, GIB, MIB } from '../../../src/lib/units.js';
import { runApiCase, seedPoints, type ApiResult } from './api-case.js';
import { BenchDaemon } from './holdfast.js';
import { runLibvirtCases } from './libvirt-case.js';
import { runMainCases } from './main-cases.js';
import { parseBenchOptions, USAGE, type BenchOptions } from './options.js';
import { formatGuestTable, formatTable, mediansOf, type Result } from './report.js';
import { runSparseCase, type SparseResult } from './sparse-case.js';

const NEEDED_BYTES = 8 * GIB;

interface Outcome {
  results: Result[];
  idleRssBytes: number;
  sparse?: SparseResult;
  api?: ApiResult;
}

async function runBench(options: BenchOptions): Promise<void> {
  const { bavail, bsize } = await statfs(options.directory);
  if (bavail * bsize < NEEDED_BYTES) {
    throw new AppError(
      'TARGET_FULL',
      `${options.directory} has ${formatBytes(bavail * bsize)} free, not 8 GiB`,
    );
  }
  await using cleanup = new CleanupStack();
  endOnSignal(cleanup);
  const directory = await mkdtemp(path.join(options.directory, 'holdfast-bench-'));
  cleanup.defer(() => rm(directory, { recursive: true, force: true }));
  const outcome: Outcome = { results: [], idleRssBytes: 0 };
  if (options.isApiWanted) await seedPoints(path.join(directory, 'state'), path.join(directory, 'list'));
  const daemon = await BenchDaemon.start(directory);
  cleanup.defer(() => daemon.stop());
  await runCases(options, { directory, daemon, outcome });
  printOutcome(outcome);
  if (options.jsonFile !== undefined) await writeJson(options, outcome);
}

/** What is written here is memory: it must go also when somebody interrupts the run, or closes its output. */
function endOnSignal(cleanup: CleanupStack): void {
  const end = (exitCode: number): void => {
    void cleanup.run().finally(() => process.exit(exitCode));
  };
  for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) {
    process.once(signal, () => {
      end(130);
    });
  }
  process.stdout.once('error', () => {
    end(1);
  });
}

async function runCases(
  options: BenchOptions,
  { directory, daemon, outcome }: { directory: string; daemon: BenchDaemon; outcome: Outcome },
): Promise<void> {
  outcome.idleRssBytes = daemon.idleRssBytes();
  if (options.isApiWanted) outcome.api = await runApiCase(daemon);
  const record = (result: Result): void => {
    outcome.results.push(result);
    print(`${result.case} ${result.tool}: ${result.wallSeconds.toFixed(2)} s`);
  };
  const bench = { options, directory, daemon, record };
  if (options.isMainWanted) await runMainCases(bench);
  if (options.isLibvirtWanted) await runLibvirtCases(bench);
  if (options.isSparseWanted) outcome.sparse = await runSparseCase(daemon, directory);
}

function print(text: string): void {
  process.stdout.write(`${text}\n`);
}

function printOutcome({ results, idleRssBytes, sparse, api }: Outcome): void {
  if (results.length > 0) print(`\nMedians:\n\n${formatTable(results, idleRssBytes)}`);
  const guestTable = formatGuestTable(results);
  if (guestTable !== '') print(`\nThe guest's writes meanwhile:\n\n${guestTable}`);
  if (sparse !== undefined) {
    const { extents, wallSeconds, overIdleBytes, peakRssBytes } = sparse;
    print(
      `\n4 TiB with ${extents} extents: ${wallSeconds.toFixed(1)} s, peak ${formatBytes(peakRssBytes)}, ` +
        `${formatBytes(overIdleBytes)} over idle`,
    );
  }
  if (api !== undefined) {
    print(
      `\n50 of ${api.points} points, ${api.requests} requests: median ${api.medianMs.toFixed(1)} ms, ` +
        `99th percentile ${api.p99Ms.toFixed(1)} ms`,
    );
  }
}

async function writeJson(options: BenchOptions, outcome: Outcome): Promise<void> {
  const firstLine = async (tool: string, ...args: string[]): Promise<string> =>
    (await runTool(tool, args, { timeoutMs: 5000 })).stdout.split('\n')[0] ?? '';
  const document = {
    host: {
      cpus: os.cpus().length,
      cpuModel: os.cpus()[0]?.model ?? 'unknown',
      memoryMib: Math.round(os.totalmem() / MIB),
      kernel: os.release(),
      node: process.version,
      qemu: await firstLine('qemu-img', '--version'),
      ...(options.isLibvirtWanted
        ? {
            virtnbdbackup: await firstLine('virtnbdbackup', '--version'),
            libvirt: await firstLine('virsh', '--version'),
          }
        : {}),
    },
    settings: { diskGib: options.diskGib, dataGib: options.dataGib, runs: options.runs },
    ...outcome,
    medians: mediansOf(outcome.results),
  };
  await writeFile(options.jsonFile ?? '', `${JSON.stringify(document, undefined, 2)}\n`);
}

try {
  const options = parseBenchOptions(process.argv.slice(2));
  if (options === 'help') process.stdout.write(USAGE);
  else await runBench(options);
} catch (error) {
  const { code, message, details } = toAppError(error);
  process.stderr.write(`bench: ${code}: ${message} ${JSON.stringify(details)}\n`);
  process.exitCode = 1;
}
