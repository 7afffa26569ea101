import { Command, CommanderError } from 'commander';
import type { CommandContext, Outcome } from './action.js';
import { addBackupCommands } from './commands/backup.js';
import { addCaptureCommand } from './commands/capture.js';
import { addExportCommands } from './commands/export.js';
import { addOperationCommands } from './commands/operation.js';
import { addRepositoryCommands } from './commands/repository.js';
import { addRestoreCommands } from './commands/restore.js';
import { addRunCommands } from './commands/run.js';
import { addSystemCommands } from './commands/system.js';
import { addTokenCommands } from './commands/token.js';
import { addVmCommands } from './commands/vm.js';
import { addVolumeCommands } from './commands/volume.js';
import type { CliEnvironment } from './environment.js';
import { EXIT, toFailure, type CliFailure, type ExitCode } from './failure.js';
import { DEFAULT_TOKEN_FILE, DEFAULT_URL } from './session.js';
import { safeText } from './text.js';

const EXIT_CODE_HELP = `
Exit codes: 0 done; 1 failed, or a run that failed; 2 wrong usage; 3 the daemon does not answer;
4 not authorised; 5 the run was cancelled or interrupted; 130 interrupted by Ctrl-C.`;

/** Runs one command line and answers its exit code. Never throws. */
export async function runCli(argv: readonly string[], environment: CliEnvironment): Promise<ExitCode> {
  const outcome: Outcome = { exitCode: EXIT.ok };
  const program = buildProgram({ environment, outcome });
  try {
    await program.parseAsync(argv, { from: 'user' });
    return outcome.exitCode;
  } catch (error) {
    // Commander has already written what is wrong, or the help that was asked for.
    if (error instanceof CommanderError) return error.exitCode === 0 ? EXIT.ok : EXIT.usage;
    const failure = toFailure(error);
    report(failure, { environment, isJson: program.opts<{ json?: boolean }>().json === true });
    return failure.exitCode;
  }
}

function buildProgram(context: CommandContext): Command {
  const { stdout, stderr } = context.environment;
  const program = new Command('holdfast')
    .description('Client of the Holdfast daemon: backups of virtual-machine disks')
    .option('--url <url>', `address of the daemon (default: HOLDFAST_URL, else ${DEFAULT_URL})`)
    .option(
      '--token-file <file>',
      `file with the token (default: HOLDFAST_TOKEN_FILE, else ${DEFAULT_TOKEN_FILE})`,
    )
    .option('--json', 'one JSON document on standard output, for programs')
    .addHelpText('after', EXIT_CODE_HELP)
    .exitOverride()
    .configureOutput({
      writeOut: (text) => stdout.write(text),
      writeErr: (text) => stderr.write(text),
      outputError: (text, write) => {
        write(text.split('\n').map(safeText).join('\n'));
      },
    })
    .showHelpAfterError('See --help.');
  addRepositoryCommands(program, context);
  addVmCommands(program, context);
  addBackupCommands(program, context);
  addCaptureCommand(program, context);
  addRestoreCommands(program, context);
  addExportCommands(program, context);
  addVolumeCommands(program, context);
  addRunCommands(program, context);
  addOperationCommands(program, context);
  addTokenCommands(program, context);
  addSystemCommands(program, context);
  return program;
}

/** What, code, remedy on standard error; with --json the same on standard output too. */
function report(failure: CliFailure, to: { environment: CliEnvironment; isJson: boolean }): void {
  const { message, code, remedy, details, exitCode } = failure;
  const { stdout, stderr } = to.environment;
  if (to.isJson) stdout.write(`${JSON.stringify({ error: { code, message, remedy, details } }, null, 2)}\n`);
  if (exitCode === EXIT.interrupted) return;
  stderr.write(`holdfast: ${safeText(message)} (${safeText(code)})\n`);
  const facts = Object.entries(details).filter(([, value]) => value !== undefined && !isEmptyList(value));
  for (const [name, value] of facts) stderr.write(`  ${safeText(name)}: ${safeText(toText(value))}\n`);
  if (remedy !== '') stderr.write(`${safeText(remedy)}\n`);
}

function isEmptyList(value: unknown): boolean {
  return Array.isArray(value) && value.length === 0;
}

function toText(value: unknown): string {
  if (Array.isArray(value)) return value.map(toText).join(', ');
  return typeof value === 'string' ? value : JSON.stringify(value);
}
