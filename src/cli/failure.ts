import { AppError, type ErrorDetails } from '../lib/errors.js';

/** Documented in docs/reference/cli.md. */
export const EXIT = {
  ok: 0,
  failed: 1,
  usage: 2,
  unreachable: 3,
  unauthorised: 4,
  runStopped: 5,
  interrupted: 130,
} as const;
export type ExitCode = (typeof EXIT)[keyof typeof EXIT];

/** A command ended badly: what, code and remedy for people, the same as JSON, and the exit code. */
export class CliFailure extends Error {
  override readonly name = 'CliFailure';
  readonly exitCode: ExitCode;
  readonly code: string;
  readonly remedy: string;
  readonly details: ErrorDetails;

  constructor(
    message: string,
    facts: { exitCode: ExitCode; code: string; remedy: string; details?: ErrorDetails; cause?: unknown },
  ) {
    super(message, facts.cause === undefined ? undefined : { cause: facts.cause });
    this.exitCode = facts.exitCode;
    this.code = facts.code;
    this.remedy = facts.remedy;
    this.details = facts.details ?? {};
  }
}

/** The command line itself is wrong. */
export function usageFailure(message: string, remedy = 'See --help.'): CliFailure {
  return new CliFailure(message, { exitCode: EXIT.usage, code: 'INVALID_INPUT', remedy });
}

export function interruptedFailure(): CliFailure {
  return new CliFailure('interrupted', { exitCode: EXIT.interrupted, code: 'CANCELLED', remedy: '' });
}

/** Any thrown value as a failure. */
export function toFailure(error: unknown): CliFailure {
  if (error instanceof CliFailure) return error;
  if (error instanceof AppError) {
    const { message, code, remedy, details } = error;
    const exitCode = code === 'INVALID_INPUT' || code === 'CONFIG_INVALID' ? EXIT.usage : EXIT.failed;
    return new CliFailure(message, { exitCode, code, remedy, details });
  }
  const message = error instanceof Error ? error.message : String(error);
  return new CliFailure(message, {
    exitCode: EXIT.failed,
    code: 'INTERNAL',
    remedy: 'This is a fault in Holdfast; report it.',
    cause: error,
  });
}
