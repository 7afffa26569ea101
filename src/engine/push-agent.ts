import { isDeepStrictEqual } from 'node:util';
import type { Lease, Repository } from '../../repository/index.js';
import type { PushDiskRow } from '../db/database.js';
import { toTimestamp } from '../lib/clock.js';
import { pause } from '../lib/deadline.js';
import { AppError } from '../lib/errors.js';
import type { DiskId } from '../lib/id.js';
import type { ActiveRun } from './active-run.js';
import type { EngineContext } from './context.js';
import type { PushCompletion, PushReport } from './engine.js';
import { watchRepository } from './repository-watch.js';
import type { PushDiskView, PushView } from './types.js';

/** How often what the agent said is looked at. */
const LOOK_MS = 500;
const COUNTS = ['totalBytes', 'bytesRead', 'bytesWritten', 'bytesZeroed', 'bytesSkipped'] as const;

interface FollowedPush {
  context: EngineContext;
  run: ActiveRun;
  repository: Repository;
  lease: Lease;
}

/**
 * Shows the exports to the agent and follows what it says until every disk is complete. PUSH_SILENT when it says
 * nothing for `silenceMs`. An agent that lives and moves nothing is shown as stalled and waited for: only it knows
 * whether its source will answer, and whoever does not want to wait cancels the run.
 */
export async function followAgent(push: FollowedPush, view: PushView): Promise<Map<DiskId, PushCompletion>> {
  const { context, run, repository, lease } = push;
  const seenAt = toTimestamp(context.clock.nowMs());
  const rows = view.disks.map(({ diskId }): PushDiskRow => {
    return { runId: run.id, diskId, seenAt, progress: null, completion: null };
  });
  await run.insist(() => context.db.pushDisks.replace(run.id, rows));
  await run.setPush(view);
  run.log('info', {
    code: 'PUSH_PUBLISHED',
    message: `${view.disks.length} disk(s) can be written: ${view.exports}`,
  });
  await using _watch = watchRepository(run, repository, lease);
  const listener = new AgentListener(push, view);
  for (;;) {
    const completions = await listener.look();
    if (completions.size === view.disks.length) return completions;
    await pause(LOOK_MS, run.signal);
  }
}

/** Measures silence by this process's own clock: those of agent, API and worker need not agree. */
class AgentListener {
  readonly #push: FollowedPush;
  #view: PushView;
  #heard = '';
  #heardAtMs: number;

  constructor(push: FollowedPush, view: PushView) {
    this.#push = push;
    this.#view = view;
    this.#heardAtMs = push.context.clock.monotonicMs();
  }

  /** The completions so far. */
  async look(): Promise<Map<DiskId, PushCompletion>> {
    const { context, run } = this.#push;
    const askedAtMs = context.clock.monotonicMs();
    const rows = await run.insist(() => context.db.pushDisks.list(run.id));
    run.signal.throwIfAborted();
    const nowMs = context.clock.monotonicMs();
    const said = JSON.stringify(rows);
    if (said !== this.#heard) {
      this.#heard = said;
      this.#heardAtMs = nowMs;
      await this.#show(rows);
    } else {
      // While the database was away nobody could say anything.
      this.#heardAtMs += nowMs - askedAtMs;
      this.#requireHeard(nowMs);
    }
    return completionsOf(rows);
  }

  #requireHeard(nowMs: number): void {
    const { silenceMs } = this.#view;
    if (nowMs - this.#heardAtMs <= silenceMs) return;
    throw new AppError('PUSH_SILENT', `the agent has said nothing for ${Math.round(silenceMs / 1000)} s`, {
      details: { silenceMs },
    });
  }

  async #show(rows: readonly PushDiskRow[]): Promise<void> {
    const disks = this.#view.disks.map((disk) => {
      const row = rows.find(({ diskId }) => diskId === disk.diskId);
      const completion = (row?.completion ?? null) as PushCompletion | null;
      const report = (row?.progress ?? {}) as Partial<PushReport>;
      this.#showProgress(disk, completion === null ? report : completedReport(report, completion));
      return completion === null ? disk : { ...disk, isCompleted: true, changeIdTo: completion.changeId };
    });
    if (isDeepStrictEqual(disks, this.#view.disks)) return;
    this.#view = { ...this.#view, disks };
    await this.#push.run.setPush(this.#view);
  }

  /** An agent that writes again what a lost connection took may count more than the disk has. */
  #showProgress({ diskId, sizeBytes }: PushDiskView, said: Partial<PushReport>): void {
    const change: Partial<PushReport> = {};
    for (const key of COUNTS) {
      const bytes = said[key];
      if (bytes !== undefined) change[key] = Math.min(bytes, sizeBytes);
    }
    this.#push.run.updateDisk(diskId, change);
  }
}

/** An agent that is done before its first report never said how much there was to do. */
function completedReport(report: Partial<PushReport>, completion: PushCompletion): Partial<PushReport> {
  const { bytesRead, bytesZeroed } = completion;
  return { ...completion, totalBytes: Math.max(report.totalBytes ?? 0, bytesRead + bytesZeroed) };
}

/** The columns were written by this engine; their shape is the code's own. */
function completionsOf(rows: readonly PushDiskRow[]): Map<DiskId, PushCompletion> {
  return new Map(
    rows.flatMap(({ diskId, completion }) =>
      completion === null ? [] : [[diskId, completion as PushCompletion] as const],
    ),
  );
}
