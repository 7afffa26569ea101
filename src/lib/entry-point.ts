import { AppError, toAppError } from './errors.js';

/** For programs' entry points alone: resolves with the name of the first SIGTERM or SIGINT; a second one ends the process. */
export function waitForSignal(): Promise<string> {
  return new Promise((resolve) => {
    for (const name of ['SIGTERM', 'SIGINT'] as const) {
      process.once(name, () => {
        resolve(name);
      });
    }
  });
}

/** Says on standard error why a program ends, with the stack when nobody foresaw it. */
export function reportFailure(program: string, error: unknown): AppError {
  const known = toAppError(error);
  process.stderr.write(`${program}: ${known.code}: ${known.message}\n`);
  if (!(error instanceof AppError) && error instanceof Error) {
    process.stderr.write(`${error.stack ?? ''}\n`);
  }
  return known;
}
