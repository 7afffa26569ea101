import type { PushServer } from '../capture/capture.js';
import { pollUntil } from '../lib/deadline.js';
import { newUlid } from '../lib/id.js';
import { dataOf, type Api, type Schemas } from './client.js';
import { CliFailure, EXIT, toFailure } from './failure.js';
import type { Session } from './session.js';

type Run = Schemas['Run'];

/** How long a push may wait for its turn and its exports. */
const START_MS = 10 * 60_000;
const START_INTERVAL_MS = 500;
/** Last words before the command ends, which may take two seconds. */
const CANCEL_MS = 1500;
const OVERTAKEN_INTERVAL_MS = 100;

/** The run ended, or is ending, at the daemon; `followRun` tells how. */
export class PushOver extends Error {
  override readonly name = 'PushOver';
}

/** Asks for the backup. A run that Ctrl-C overtakes is cancelled. */
export async function requestPush(session: Session, body: Schemas['BackupRequest']): Promise<Run> {
  const header = { 'Idempotency-Key': newUlid() };
  const ask = async (api: Api): Promise<Run> =>
    dataOf(await api.POST('/backups', { params: { header }, body }));
  try {
    return await ask(await session.api());
  } catch (error) {
    if (session.environment.signal.aborted) await sayLast(session, (api) => findOvertaken(() => ask(api)));
    throw error;
  }
}

/** Asks the same again: its answer is kept as soon as the daemon has noticed that nobody waits any more. */
async function findOvertaken(ask: () => Promise<Run>): Promise<string> {
  return pollUntil(
    async () => {
      try {
        return (await ask()).id;
      } catch (error) {
        if (error instanceof CliFailure && error.code === 'CONFLICT') return undefined;
        throw error;
      }
    },
    {
      timeoutMs: CANCEL_MS,
      intervalMs: OVERTAKEN_INTERVAL_MS,
      what: 'the answer to the request for the backup',
    },
  );
}

/** The run once its exports are there. Throws PushOver when it ended before. */
export async function waitForExports(
  session: Session,
  started: Run,
): Promise<{ pointId: string; push: Schemas['Push'] }> {
  const api = await session.api();
  let run = started;
  return pollUntil(
    async () => {
      const { progress, pointId } = run;
      if (progress.push !== null && pointId !== null) return { pointId, push: progress.push };
      requireActive(run);
      run = dataOf(await api.GET('/runs/{id}', { params: { path: { id: run.id } } }));
      return undefined;
    },
    {
      timeoutMs: START_MS,
      intervalMs: START_INTERVAL_MS,
      what: 'the exports of the push being there',
      signal: session.environment.signal,
    },
  );
}

function requireActive(run: Run): void {
  const isActive = run.state === 'queued' || run.state === 'running';
  if (!isActive || run.isCancelRequested) throw new PushOver(`the run is ${run.state}`);
}

/** The daemon as the agent talks to it. `onRun` gets the run as each answer shows it. */
export function pushServer(api: Api, pointId: string, onRun: (run: Run) => void): PushServer {
  return {
    report: (disks, signal) =>
      heard(async () => {
        const body = { disks: disks.map(({ diskId, progress }) => ({ diskId, ...progress })) };
        const path = { id: pointId };
        const answer = await api.POST('/backups/{id}/progress', { params: { path }, body, signal });
        if (isAway(answer.response)) return false;
        const run = dataOf(answer);
        onRun(run);
        requireActive(run);
        return true;
      }),
    complete: (disk, totals, signal) =>
      heard(async () => {
        const path = { id: pointId, diskId: disk.diskId };
        const body = { changeId: disk.changeId, ...totals };
        const route = '/backups/{id}/disks/{diskId}/complete';
        const answer = await api.POST(route, { params: { path }, body, signal });
        if (isAway(answer.response)) return false;
        dataOf(answer);
        return true;
      }),
  };
}

/** The daemon without its database, or what stands before it without the daemon. */
function isAway(response: Response): boolean {
  return response.status >= 500;
}

async function heard(say: () => Promise<boolean>): Promise<boolean> {
  try {
    return await say();
  } catch (error) {
    if (!(error instanceof CliFailure)) throw error;
    if (error.exitCode === EXIT.unreachable) return false;
    if (error.code === 'RUN_NOT_ACTIVE') throw new PushOver(error.message, { cause: error });
    throw error;
  }
}

/** Asks for the run to end, also after Ctrl-C; that it could not be said is told and is no error. */
export function cancelRun(session: Session, id: string): Promise<void> {
  return sayLast(session, () => Promise.resolve(id));
}

/** Cancels the run that `find` comes to. */
async function sayLast(session: Session, find: (api: Api) => Promise<string>): Promise<void> {
  try {
    const api = await session.apiUntil(AbortSignal.timeout(CANCEL_MS));
    const path = { id: await find(api) };
    dataOf(await api.POST('/runs/{id}/cancel', { params: { path } }));
    session.note('The backup was cancelled at the daemon.');
  } catch (error) {
    const failure = toFailure(error);
    if (failure.code === 'RUN_NOT_ACTIVE') return;
    const reason = failure.exitCode === EXIT.interrupted ? 'the daemon does not answer' : failure.message;
    session.note(
      `The backup could not be cancelled (${reason}); it ends when the daemon has heard nothing for long.`,
    );
  }
}
