import type { Command } from 'commander';
import type { CliEnvironment } from './environment.js';
import { EXIT, type ExitCode } from './failure.js';
import { openSession, type Session } from './session.js';

/** Where the program's exit code comes together. */
export interface Outcome {
  exitCode: ExitCode;
}

export interface CommandContext {
  environment: CliEnvironment;
  outcome: Outcome;
}

/** What a command does, given its session, its arguments and its options. */
export type CommandWork<Options> = (call: {
  session: Session;
  args: string[];
  options: Options;
}) => Promise<ExitCode | undefined>;

/** The commander action around `work`: opens the session, keeps the exit code. */
export function action<Options extends object>(
  context: CommandContext,
  work: CommandWork<Options>,
): (...given: unknown[]) => Promise<void> {
  return async (...given) => {
    const command = given.at(-1) as Command;
    const session = openSession(context.environment, command);
    const code = await work({ session, args: command.args, options: command.opts<Options>() });
    context.outcome.exitCode = code ?? EXIT.ok;
  };
}

/** The option parser for one that may be given several times. */
export function collect(value: string, before: string[] | undefined): string[] {
  return [...(before ?? []), value];
}

/** The n-th argument; commander has made sure that it is there. */
export function argument(args: readonly string[], index = 0): string {
  return args[index] ?? '';
}
