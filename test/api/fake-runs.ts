import { EventEmitter, on } from 'node:events';
import type { Engine, RunFilter } from '../../src/engine/engine.js';
import {
  ENDED_STATES,
  type Page,
  type PageRequest,
  type RunEvent,
  type RunRequest,
  type RunView,
} from '../../src/engine/types.js';
import { AppError } from '../../src/lib/errors.js';
import { newId, type PointId, type RepositoryId, type RunId, type VmId } from '../../src/lib/id.js';
import { find, NOW, pageOf } from './fake-views.js';

type RunUseCases = Pick<Engine, 'listRuns' | 'getRun' | 'getRunLog' | 'cancelRun' | 'watchRun'>;

/** Runs stand still until a test moves them with `moveRun`. */
export class FakeRuns implements RunUseCases {
  readonly runs: RunView[] = [];
  readonly runLog: RunEvent[] = [];
  readonly requests: unknown[] = [];
  readonly #changes = new EventEmitter();
  watchers = 0;

  async listRuns(filter: RunFilter, page: PageRequest): Promise<Page<RunView>> {
    const runs = this.runs.filter(
      (run) =>
        (filter.kind ?? run.kind) === run.kind &&
        (filter.state ?? run.state) === run.state &&
        (filter.vmId ?? run.vmId) === run.vmId,
    );
    return pageOf(runs, page);
  }
  async getRun(id: RunId): Promise<RunView> {
    return find(this.runs, id, 'run');
  }
  async getRunLog(id: RunId, afterSequence: number, limit: number): Promise<RunEvent[]> {
    find(this.runs, id, 'run');
    return this.runLog.filter((event) => event.sequence > afterSequence).slice(0, limit);
  }
  async cancelRun(id: RunId): Promise<RunView> {
    const run = await this.getRun(id);
    if (ENDED_STATES.includes(run.state)) throw new AppError('RUN_NOT_ACTIVE', 'the run has ended');
    return this.moveRun(id, {
      isCancelRequested: true,
      ...(run.state === 'queued' ? { state: 'cancelled' } : {}),
    });
  }
  async *watchRun(id: RunId, signal: AbortSignal): AsyncIterable<RunView> {
    this.watchers += 1;
    try {
      // Listening begins before the first look, so that no change falls between the two.
      const changes = on(this.#changes, id, { signal });
      let run = await this.getRun(id);
      yield run;
      if (ENDED_STATES.includes(run.state)) return;
      for await (const [change] of changes as AsyncIterable<[RunView]>) {
        run = change;
        yield run;
        if (ENDED_STATES.includes(run.state)) return;
      }
    } finally {
      this.watchers -= 1;
    }
  }

  /** Changes a run and tells its watchers. */
  moveRun(id: string, change: Partial<RunView>): RunView {
    const index = this.runs.findIndex((run) => run.id === id);
    const run = { ...this.runs[index]!, ...change };
    this.runs[index] = run;
    this.#changes.emit(id, run);
    return run;
  }

  protected addRun(
    request: RunRequest,
    facts: { vmId?: VmId; repositoryId?: RepositoryId; pointId?: PointId } = {},
  ): RunView {
    const run: RunView = {
      id: newId<RunId>(),
      kind: request.kind === 'push' ? 'backup' : request.kind,
      state: 'queued',
      stage: null,
      vmId: facts.vmId ?? null,
      repositoryId: facts.repositoryId ?? null,
      pointId: facts.pointId ?? null,
      attempt: 1,
      createdAt: NOW,
      startedAt: null,
      endedAt: null,
      isStalled: false,
      isCancelRequested: false,
      progress: { share: null, bytesPerSecond: 0, etaSeconds: null, disks: [], push: null },
      error: null,
      request,
      result: null,
    };
    this.runs.unshift(run);
    return run;
  }
}
