import { pollUntil } from '../lib/deadline.js';
import { AppError } from '../lib/errors.js';
import { dataOf, type Api, type Schemas } from './client.js';
import { CliFailure, EXIT, interruptedFailure, type ExitCode } from './failure.js';
import { ProgressDisplay } from './progress.js';
import { formatOperation } from './render-attachments.js';
import { formatRun } from './render.js';
import { StreamLost, watchEvents } from './run-events.js';
import type { Session } from './session.js';

type Run = Schemas['Run'];
type Operation = Schemas['Operation'];

/** How long a daemon that went away (a restart) may take to answer again. */
const RECONNECT_MS = 60_000;
const RECONNECT_INTERVAL_MS = 500;

function hasEnded(run: Run): boolean {
  return run.state !== 'queued' && run.state !== 'running';
}

/**
 * Follows the run to its end, prints it, and answers the exit code. Ctrl-C leaves the run going.
 * A daemon that restarts on the way is waited for.
 */
export async function followRun(session: Session, run: Run): Promise<ExitCode> {
  const diskNames = await diskNamesOf(await session.api(), run);
  const ended = await watchToEnd(session, run, diskNames);
  session.print(ended, () => formatRun(ended, diskNames));
  return exitCodeOf(ended);
}

/** Follows an operation to its end, prints it, and answers the exit code, as `followRun` does. */
export async function followOperation(session: Session, { id }: Operation): Promise<ExitCode> {
  const api = await session.api();
  const path = { id };
  const run = await watchToEnd(session, dataOf(await api.GET('/runs/{id}', { params: { path } })), new Map());
  const ended = dataOf(await api.GET('/operations/{id}', { params: { path } }));
  session.print(ended, () => formatOperation(ended));
  return exitCodeOf(run);
}

async function watchToEnd(session: Session, run: Run, diskNames: ReadonlyMap<string, string>): Promise<Run> {
  const api = await session.api();
  const display = new ProgressDisplay(session.environment.stderr, diskNames);
  try {
    const ended = await followToEnd({ session, api, display }, run);
    display.finish();
    return ended;
  } catch (error) {
    display.finish();
    if (!session.environment.signal.aborted) throw error;
    session.note(`The run goes on. Follow it: holdfast run watch ${run.id}`);
    session.note(`Cancel it: holdfast run cancel ${run.id}`);
    throw interruptedFailure();
  }
}

async function followToEnd(
  context: { session: Session; api: Api; display: ProgressDisplay },
  started: Run,
): Promise<Run> {
  const { session, api, display } = context;
  let run = started;
  display.update(run);
  while (!hasEnded(run)) {
    try {
      for await (const state of watchEvents(api, run.id)) {
        run = state;
        display.update(run);
      }
    } catch (error) {
      const isLost = error instanceof StreamLost || isUnreachable(error);
      if (!isLost || session.environment.signal.aborted) throw error;
    }
    if (!hasEnded(run)) run = await reconnect(session, api, run.id);
  }
  return run;
}

function isUnreachable(error: unknown): error is CliFailure {
  return error instanceof CliFailure && error.exitCode === EXIT.unreachable;
}

/** The run as a daemon tells that may have been away for a while. */
async function reconnect(session: Session, api: Api, id: string): Promise<Run> {
  const { signal } = session.environment;
  let lost: CliFailure | undefined;
  try {
    return await pollUntil(
      async () => {
        try {
          return dataOf(await api.GET('/runs/{id}', { params: { path: { id } } }));
        } catch (error) {
          if (!isUnreachable(error)) throw error;
          lost = error;
          return undefined;
        }
      },
      { timeoutMs: RECONNECT_MS, intervalMs: RECONNECT_INTERVAL_MS, what: 'the daemon answering', signal },
    );
  } catch (error) {
    if (error instanceof AppError && error.code === 'TIMEOUT' && lost !== undefined) throw lost;
    throw error;
  }
}

/** Names to show; a machine removed meanwhile leaves only the ids. */
export async function diskNamesOf(api: Api, run: Run): Promise<Map<string, string>> {
  if (run.vmId === null) return new Map();
  const { data } = await api.GET('/vms/{id}', { params: { path: { id: run.vmId } } });
  return new Map((data?.disks ?? []).map((disk) => [disk.id, disk.name]));
}

/** How the run ended. */
function exitCodeOf(run: Run): ExitCode {
  if (run.state === 'cancelled' || run.state === 'interrupted') return EXIT.runStopped;
  if (run.state === 'failed') return EXIT.failed;
  return foundDamage(run) ? EXIT.failed : EXIT.ok;
}

/** A check that ran to its end and found something is no success. */
function foundDamage(run: Run): boolean {
  return (
    run.result?.kind === 'check' && run.result.report.findings.some((finding) => finding.severity === 'error')
  );
}

/** What a command does that has asked for a run: follow it, or with --detach only tell it. */
export function runStarted(session: Session, run: Run, isDetached: boolean): Promise<ExitCode> {
  if (!isDetached) return followRun(session, run);
  session.print(run, () => `Run ${run.id} is ${run.state}. Follow it: holdfast run watch ${run.id}\n`);
  return Promise.resolve(EXIT.ok);
}

/** The same for a command that has asked for an operation. */
export function operationStarted(
  session: Session,
  operation: Operation,
  isWaiting: boolean,
): Promise<ExitCode> {
  if (isWaiting) return followOperation(session, operation);
  const { id, state } = operation;
  session.print(operation, () => `Operation ${id} is ${state}. Look at it: holdfast operation show ${id}\n`);
  return Promise.resolve(EXIT.ok);
}
