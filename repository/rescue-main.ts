import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { Command, CommanderError, Option } from 'commander';
import { CleanupStack } from '../src/lib/cleanup.js';
import { cancelled } from '../src/lib/deadline.js';
import { isErrorCode, toAppError } from '../src/lib/errors.js';
import { newUlid } from '../src/lib/id.js';
import { formatBytes } from '../src/lib/units.js';
import { openFileTarget } from '../src/target/file-target.js';
import type { OpenTarget } from '../src/target/target.js';
import type { CheckReport } from './check-report.js';
import type { ChainCopyProgress } from './read-chain.js';
import { RescueRepository, type SurveyedVm } from './rescue.js';

/** `holdfast-rescue`: lists, checks and restores from a repository directory alone. */
const EXIT = { ok: 0, failed: 1, usage: 2, damaged: 3, interrupted: 130 } as const;

const LIMITS = { connectTimeoutMs: 10_000, stallTimeoutMs: 300_000 };
const CONNECTIONS = 4;

interface RestoreFlags {
  point: string;
  disk?: string;
  output: string;
  format: 'raw' | 'qcow2';
  acceptDamage?: true;
  overwrite?: true;
}

const interrupt = new AbortController();
for (const name of ['SIGINT', 'SIGTERM'] as const) {
  process.once(name, () => {
    interrupt.abort(cancelled('interrupted'));
  });
}
process.exitCode = await main(process.argv.slice(2));

async function main(args: string[]): Promise<number> {
  let exitCode: number = EXIT.ok;
  const program = buildProgram((code) => {
    exitCode = code;
  });
  try {
    await program.parseAsync(args, { from: 'user' });
    return exitCode;
  } catch (error) {
    if (error instanceof CommanderError) return error.exitCode === 0 ? EXIT.ok : EXIT.usage;
    const { code, message, remedy, details } = toAppError(error);
    process.stderr.write(`holdfast-rescue: ${message} [${code}]\n`);
    if (Object.keys(details).length > 0) process.stderr.write(`  ${JSON.stringify(details)}\n`);
    process.stderr.write(`  ${remedy}\n`);
    if (interrupt.signal.aborted) return EXIT.interrupted;
    if (isErrorCode(error, 'INVALID_INPUT')) return EXIT.usage;
    return isErrorCode(error, 'LAYER_CORRUPT', 'CHAIN_BROKEN', 'LAYER_NOT_FOUND')
      ? EXIT.damaged
      : EXIT.failed;
  }
}

function buildProgram(finish: (exitCode: number) => void): Command {
  const program = new Command('holdfast-rescue')
    .description('Lists, checks and restores recovery points from a repository directory alone.')
    .addHelpText(
      'after',
      '\nExit codes: 0 done, 1 failed, 2 wrong use, 3 damage found, 130 interrupted.\n' +
        'Needs the repository directory only: no daemon, no database. Never writes to it.',
    )
    .exitOverride();
  program
    .command('list')
    .description('machines and their recovery points')
    .argument('<repository>', 'the directory with holdfast.json')
    .option('--json', 'as JSON')
    .action(async (root: string, flags: { json?: true }) => {
      const vms = await (await RescueRepository.open(path.resolve(root))).survey();
      process.stdout.write(flags.json === true ? `${JSON.stringify(vms, null, 2)}\n` : renderSurvey(vms));
      finish(vms.some((vm) => vm.unreadable.length > 0) ? EXIT.damaged : EXIT.ok);
    });
  program
    .command('check')
    .description('compare manifests, layers and hashes; changes nothing')
    .argument('<repository>', 'the directory with holdfast.json')
    .option('--point <id>', 'one point and what it stands on')
    .option('--structure-only', 'do not read the data')
    .option('--json', 'as JSON')
    .action(async (root: string, flags: { point?: string; structureOnly?: true; json?: true }) => {
      const report = await (
        await RescueRepository.open(path.resolve(root))
      ).check({
        content: flags.structureOnly !== true,
        signal: interrupt.signal,
        ...(flags.point === undefined ? {} : { pointId: flags.point }),
      });
      process.stdout.write(
        flags.json === true ? `${JSON.stringify(report, null, 2)}\n` : renderReport(report),
      );
      finish(report.findings.some((finding) => finding.severity === 'error') ? EXIT.damaged : EXIT.ok);
    });
  addRestore(program, finish);
  return program;
}

function addRestore(program: Command, finish: (exitCode: number) => void): void {
  program
    .command('restore')
    .description('one disk of a point into a new file, every block compared with its hash')
    .argument('<repository>', 'the directory with holdfast.json')
    .requiredOption('--point <id>', 'the recovery point, as list shows it')
    .option('--disk <disk>', 'number, name or id; needed when the point has several disks')
    .requiredOption('--output <file>', 'the file to write')
    .addOption(new Option('--format <format>', 'of the file').choices(['raw', 'qcow2']).default('raw'))
    .option('--accept-damage', 'go on past blocks that do not match, and count them')
    .option('--overwrite', 'replace the file if it is there')
    .action(async (root: string, flags: RestoreFlags) => {
      finish(await restore(path.resolve(root), flags));
    });
}

async function restore(root: string, flags: RestoreFlags): Promise<number> {
  const repository = await RescueRepository.open(root);
  await using cleanup = new CleanupStack();
  const runtimeDirectory = await mkdtemp(path.join(tmpdir(), 'holdfast-rescue-'));
  cleanup.defer(() => rm(runtimeDirectory, { recursive: true, force: true }));
  const file = path.resolve(flags.output);
  const target = openFileTarget(
    { kind: 'file', path: file, format: flags.format },
    { runtimeDirectory, owner: newUlid(), connections: CONNECTIONS, forbiddenDirectories: [root] },
  );
  let opened: OpenTarget | undefined;
  const result = await repository.restore({
    pointId: flags.point,
    disk: flags.disk,
    acceptDamage: flags.acceptDamage === true,
    limits: LIMITS,
    signal: interrupt.signal,
    onProgress: process.stderr.isTTY ? renderProgress : undefined,
    openSink: async (disk) => {
      const request = {
        sizeBytes: disk.sizeBytes,
        overwrite: flags.overwrite === true,
        signal: interrupt.signal,
      };
      opened = cleanup.use(await target.open(request));
      return opened;
    },
  });
  await opened?.complete();
  if (process.stderr.isTTY) process.stderr.write('\n');
  process.stdout.write(
    `${file}: ${formatBytes(result.bytesWritten)} written, every block compared with its hash\n`,
  );
  if (result.damagedBytes === 0) return EXIT.ok;
  process.stdout.write(`${formatBytes(result.damagedBytes)} do not match and were written as they are:\n`);
  for (const [offset, length] of result.damagedRanges)
    process.stdout.write(`  offset ${offset}, ${length} bytes\n`);
  return EXIT.damaged;
}

function renderProgress(progress: ChainCopyProgress): void {
  const share = progress.totalBytes === 0 ? 1 : Math.min(1, progress.bytesRead / progress.totalBytes);
  process.stderr.write(`\r${(share * 100).toFixed(1)} %  ${formatBytes(progress.bytesRead)} read   `);
}

/** Names come from files of the repository: nothing in them may steer the terminal. */
function plain(text: string): string {
  return text.replace(/[\p{Cc}\p{Cf}]/gu, '?');
}

function renderSurvey(vms: SurveyedVm[]): string {
  const lines: string[] = [];
  for (const vm of vms) {
    lines.push(`${plain(vm.name ?? '(no name can be read)')}  ${vm.vmId}`);
    for (const point of vm.points) {
      lines.push(`  ${point.pointId}  ${point.capturedAt}  ${point.type}`);
      for (const disk of point.disks) {
        lines.push(`    disk ${disk.number}  ${plain(disk.name)}  ${formatBytes(disk.sizeBytes)}`);
      }
    }
    for (const { pointId, reason } of vm.unreadable)
      lines.push(`  cannot be read: ${pointId ?? 'vm.json'}: ${plain(reason)}`);
  }
  return lines.length === 0 ? 'no machines\n' : `${lines.join('\n')}\n`;
}

function renderReport(report: CheckReport): string {
  const lines = report.findings.map(
    ({ severity, code, message, pointId, file }) =>
      `${severity}: ${code}: ${plain(message)}${pointId === undefined ? '' : ` (point ${pointId})`}${file === undefined ? '' : `\n  ${plain(file)}`}`,
  );
  lines.push(
    `${report.vms} machines, ${report.points} points, ${report.layers} layers, ${formatBytes(report.bytesVerified)} compared`,
  );
  if (report.damagedPoints.length > 0) lines.push(`damaged points: ${report.damagedPoints.join(', ')}`);
  return `${lines.join('\n')}\n`;
}
