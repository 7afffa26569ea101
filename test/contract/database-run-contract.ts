import { describe, expect, it } from 'vitest';
import { newId, type PointId, type RunId, type VmId } from '../../src/lib/id.js';
import type { Database, RunRow } from '../../src/db/index.js';
import type { DatabaseHandles } from './database-contract.js';
import { addPair, runRow, time } from './database-fixture.js';

const WORKER = 'host:1:a';

export function describeRunTables(handles: () => DatabaseHandles): void {
  const insertQueued = async (db: Database, change: Partial<RunRow> = {}): Promise<RunRow> => {
    const run = runRow(change);
    await db.runs.insert(run, { turn: 'wait' });
    return run;
  };
  const claimAs = (db: Database, id: RunId, workerId = WORKER): Promise<boolean> =>
    db.runs.claim(id, { workerId, at: time(100) });
  const end = { state: 'completed', at: time(200), error: null, result: { kind: 'rescan' } };

  describe('runs', () => {
    it('keeps every column', async () => {
      const { first, second } = handles();
      const { vm, repository } = await addPair(first);
      const run = runRow({
        vmId: vm.id,
        repositoryId: repository.id,
        pointId: newId<PointId>(),
        stage: 'transfer',
        cancelRequested: true,
        progress: { share: 0.5, text: "ä'\\" },
        error: { code: 'X' },
      });
      await first.runs.insert(run, { turn: 'refuse' });
      expect(await second.runs.get(run.id)).toEqual(run);
      expect(await first.runs.get(newId<RunId>())).toBeNull();
    });

    it('refuses an unknown VM', async () => {
      await expect(
        handles().first.runs.insert(runRow({ vmId: newId<VmId>() }), { turn: 'wait' }),
      ).rejects.toMatchObject({ code: 'NOT_FOUND' });
    });

    it('lets one of many requests that refuse to wait in, and names the run that is active', async () => {
      const { first, second } = handles();
      const { vm, repository } = await addPair(first);
      const runs = Array.from({ length: 8 }, () => runRow({ vmId: vm.id, repositoryId: repository.id }));
      const results = await Promise.allSettled(
        runs.map((run, index) => (index % 2 === 0 ? first : second).runs.insert(run, { turn: 'refuse' })),
      );
      const winners = runs.filter((_run, index) => results[index]?.status === 'fulfilled');
      expect(winners).toHaveLength(1);
      for (const result of results.filter((one) => one.status === 'rejected')) {
        expect(result.reason).toMatchObject({ code: 'RUN_ACTIVE', details: { runId: winners[0]?.id } });
      }
    });

    it('refuses for the pair of VM and repository only, and only while a run is active', async () => {
      const { first } = handles();
      const { vm, repository } = await addPair(first);
      const { vm: otherVm, repository: otherRepository } = await addPair(first);
      const pair = { vmId: vm.id, repositoryId: repository.id };
      const run = await insertQueued(first, pair);
      await first.runs.insert(runRow({ ...pair, vmId: otherVm.id }), { turn: 'refuse' });
      await first.runs.insert(runRow({ ...pair, repositoryId: otherRepository.id }), { turn: 'refuse' });
      await insertQueued(first, pair);
      expect(await claimAs(first, run.id)).toBe(true);
      await expect(first.runs.insert(runRow(pair), { turn: 'refuse' })).rejects.toMatchObject({
        code: 'RUN_ACTIVE',
        details: { runId: run.id },
      });
    });

    it('lets one backup of a VM run, whatever the repository', async () => {
      const { first } = handles();
      const { vm, repository } = await addPair(first);
      const { vm: otherVm, repository: otherRepository } = await addPair(first);
      const running = await insertQueued(first, { vmId: vm.id, repositoryId: repository.id });
      const waiting = await insertQueued(first, { vmId: vm.id, repositoryId: otherRepository.id });
      const foreign = await insertQueued(first, { vmId: otherVm.id, repositoryId: repository.id });
      const restore = runRow({ vmId: vm.id, repositoryId: otherRepository.id, kind: 'restore' });
      await first.runs.insert(restore, { turn: 'none' });
      expect(await claimAs(first, running.id)).toBe(true);
      expect(await claimAs(first, waiting.id)).toBe(false);
      expect(await claimAs(first, foreign.id)).toBe(true);
      expect(await claimAs(first, restore.id)).toBe(true);
      expect(await first.runs.end(running.id, WORKER, end)).toBe(true);
      expect(await claimAs(first, waiting.id)).toBe(true);
    });

    it('lets one backup of a VM run when two are claimed at once', async () => {
      const { first, second } = handles();
      const { repository } = await addPair(first);
      for (let round = 0; round < 10; round += 1) {
        const { vm, repository: otherRepository } = await addPair(first);
        const one = await insertQueued(first, { vmId: vm.id, repositoryId: repository.id });
        const two = await insertQueued(first, { vmId: vm.id, repositoryId: otherRepository.id });
        const claims = await Promise.all([claimAs(first, one.id), claimAs(second, two.id)]);
        expect(claims.filter(Boolean), `round ${round}`).toHaveLength(1);
      }
    });

    it('is claimed by exactly one of many workers', async () => {
      const { first, second } = handles();
      const run = await insertQueued(first);
      const claims = await Promise.all(
        Array.from({ length: 8 }, (_item, index) =>
          claimAs(index % 2 === 0 ? first : second, run.id, `worker ${index}`),
        ),
      );
      expect(claims.filter(Boolean)).toHaveLength(1);
      expect(await first.runs.get(run.id)).toMatchObject({
        state: 'running',
        workerId: `worker ${claims.indexOf(true)}`,
        startedAt: time(100),
        heartbeatAt: time(100),
        progressAt: time(100),
      });
      expect(await claimAs(first, newId<RunId>())).toBe(false);
    });

    it('claims the runs of a pair first in, first out', async () => {
      const { first } = handles();
      const { vm, repository } = await addPair(first);
      const pair = { vmId: vm.id, repositoryId: repository.id };
      const older = await insertQueued(first, { ...pair, createdAt: time(1) });
      const newer = await insertQueued(first, { ...pair, createdAt: time(2) });
      expect(await claimAs(first, newer.id)).toBe(false);
      expect(await claimAs(first, older.id)).toBe(true);
      expect(await claimAs(first, newer.id)).toBe(false);
      expect(await first.runs.end(older.id, WORKER, end)).toBe(true);
      expect(await claimAs(first, newer.id)).toBe(true);
    });

    it('never runs two of a pair, also when the older one appears after the newer was claimed', async () => {
      const { first } = handles();
      const { vm, repository } = await addPair(first);
      const pair = { vmId: vm.id, repositoryId: repository.id };
      const newer = await insertQueued(first, { ...pair, createdAt: time(2) });
      expect(await claimAs(first, newer.id)).toBe(true);
      const older = await insertQueued(first, { ...pair, createdAt: time(1) });
      expect(await claimAs(first, older.id)).toBe(false);
    });

    it('keeps runs that take no turns out of it: they neither wait, nor block, nor refuse', async () => {
      const { first } = handles();
      const { vm, repository } = await addPair(first);
      const pair = { vmId: vm.id, repositoryId: repository.id };
      const readers = [runRow({ ...pair, createdAt: time(1) }), runRow({ ...pair, createdAt: time(4) })];
      await first.runs.insert(readers[0]!, { turn: 'none' });
      const writer = runRow({ ...pair, createdAt: time(2) });
      await first.runs.insert(writer, { turn: 'refuse' });
      const next = await insertQueued(first, { ...pair, createdAt: time(3) });
      await first.runs.insert(readers[1]!, { turn: 'none' });
      expect(await claimAs(first, writer.id)).toBe(true);
      for (const reader of readers) expect(await claimAs(first, reader.id)).toBe(true);
      expect(await claimAs(first, next.id)).toBe(false);
      expect(await first.runs.end(writer.id, WORKER, end)).toBe(true);
      expect(await claimAs(first, next.id)).toBe(true);
    });

    it('lets runs of one pair run one at a time under many claims at once', async () => {
      const { first, second } = handles();
      const { vm, repository } = await addPair(first);
      const runs: RunRow[] = [];
      for (let i = 0; i < 6; i += 1) {
        runs.push(
          await insertQueued(first, { vmId: vm.id, repositoryId: repository.id, createdAt: time(i) }),
        );
      }
      for (const expected of runs) {
        const claims = await Promise.all(
          runs.map((run, index) => claimAs(index % 2 === 0 ? first : second, run.id)),
        );
        expect(runs.filter((_run, index) => claims[index]).map((run) => run.id)).toEqual([expected.id]);
        expect(await first.runs.end(expected.id, WORKER, end)).toBe(true);
      }
    });

    it('changes only under the worker that holds it', async () => {
      const { first, second } = handles();
      const run = await insertQueued(first);
      const change = {
        stage: 'transfer',
        progress: { share: 1 },
        progressAt: time(150),
        heartbeatAt: time(151),
      };
      expect(await first.runs.update(run.id, WORKER, change)).toBe(false);
      await claimAs(first, run.id);
      expect(await first.runs.update(run.id, 'other', change)).toBe(false);
      expect(await first.runs.update(run.id, WORKER, change)).toBe(true);
      expect(await first.runs.update(run.id, WORKER, change)).toBe(true);
      expect(await first.runs.update(run.id, WORKER, {})).toBe(true);
      expect(await second.runs.get(run.id)).toMatchObject(change);
      expect(await first.runs.end(run.id, 'other', end)).toBe(false);
      expect(await first.runs.end(run.id, WORKER, { ...end, progress: { share: 2 } })).toBe(true);
      expect(await first.runs.end(run.id, WORKER, { ...end, state: 'failed' })).toBe(false);
      expect(await first.runs.update(run.id, WORKER, change)).toBe(false);
      expect(await second.runs.get(run.id)).toMatchObject({
        state: 'completed',
        endedAt: time(200),
        progress: { share: 2 },
        result: { kind: 'rescan' },
      });
    });

    it('goes back to the queue with the next attempt', async () => {
      const { first } = handles();
      const { vm, repository } = await addPair(first);
      const run = await insertQueued(first, { vmId: vm.id, repositoryId: repository.id });
      await claimAs(first, run.id);
      expect(await first.runs.requeue(run.id, 'other')).toBe(false);
      expect(await first.runs.requeue(run.id, WORKER)).toBe(true);
      expect(await first.runs.get(run.id)).toEqual({ ...run, attempt: 2 });
      expect((await first.runs.listQueued()).map((row) => row.id)).toContain(run.id);
      expect(await claimAs(first, run.id, 'second worker')).toBe(true);
    });

    it('is cancelled at once while queued, and marked while running', async () => {
      const { first } = handles();
      const queued = await insertQueued(first);
      const running = await insertQueued(first);
      await claimAs(first, running.id);
      expect(await first.runs.requestCancel(queued.id, time(9))).toBe('queued');
      expect(await first.runs.get(queued.id)).toMatchObject({ state: 'cancelled', endedAt: time(9) });
      expect(await claimAs(first, queued.id)).toBe(false);
      expect(await first.runs.requestCancel(running.id, time(9))).toBe('running');
      expect(await first.runs.isCancelRequested([queued.id, running.id, newId<RunId>()])).toEqual(
        expect.arrayContaining([queued.id, running.id]),
      );
      expect(await first.runs.isCancelRequested([])).toEqual([]);
      expect(await first.runs.requestCancel(queued.id, time(10))).toBeNull();
      expect(await first.runs.requestCancel(newId<RunId>(), time(10))).toBeNull();
    });

    it('is found abandoned by its heartbeat or worker, and ended only if nobody revived it', async () => {
      const { first } = handles();
      const run = await insertQueued(first);
      const worker = `crashed ${newId()}`;
      await claimAs(first, run.id, worker);
      const listIds = async (heartbeatBefore: string, workerIds: string[]): Promise<string[]> =>
        (await first.runs.listAbandoned({ heartbeatBefore, workerIds })).map((row) => row.id);
      expect(await listIds(time(100), [])).not.toContain(run.id);
      expect(await listIds(time(101), [])).toContain(run.id);
      expect(await listIds(time(0), [worker])).toContain(run.id);
      const interrupted = { ...end, state: 'interrupted' };
      await first.runs.update(run.id, worker, { heartbeatAt: time(120) });
      expect(await first.runs.endAbandoned(run.id, time(100), interrupted)).toBe(false);
      expect(await first.runs.endAbandoned(run.id, null, interrupted)).toBe(false);
      expect(await first.runs.endAbandoned(run.id, time(120), interrupted)).toBe(true);
      expect(await first.runs.update(run.id, worker, { heartbeatAt: time(130) })).toBe(false);
      expect(await listIds(time(1000), [worker])).not.toContain(run.id);
    });

    it('is listed newest first by kind, state and VM', async () => {
      const { first } = handles();
      const { vm } = await addPair(first);
      const runs: RunRow[] = [];
      for (let i = 0; i < 5; i += 1) {
        const kind = i % 2 === 0 ? 'backup' : 'check';
        runs.push(await insertQueued(first, { vmId: vm.id, kind, createdAt: time(i > 2 ? 2 : i) }));
      }
      await first.runs.requestCancel(runs[0]!.id, time(9));
      const ids = async (filter: Parameters<Database['runs']['list']>[0]): Promise<string[]> => {
        const found: string[] = [];
        let cursor: string | null = null;
        do {
          const page: { rows: RunRow[]; nextCursor: string | null } = await first.runs.list(filter, {
            limit: 2,
            cursor,
          });
          found.push(...page.rows.map((row) => row.id));
          cursor = page.nextCursor;
        } while (cursor !== null);
        return found;
      };
      const newestFirst = [...runs.slice(2)]
        .sort((a, b) => (a.id < b.id ? 1 : -1))
        .concat(runs[1]!, runs[0]!);
      expect(await ids({ vmId: vm.id })).toEqual(newestFirst.map((run) => run.id));
      expect(await ids({ vmId: vm.id, kind: 'check' })).toEqual(
        newestFirst.filter((run) => run.kind === 'check').map((run) => run.id),
      );
      expect(await ids({ vmId: vm.id, state: 'cancelled', kind: 'backup' })).toEqual([runs[0]!.id]);
    });

    it('names the active runs of a point', async () => {
      const { first } = handles();
      const pointId = newId<PointId>();
      const active = await insertQueued(first, { kind: 'restore', pointId });
      await insertQueued(first, { kind: 'restore', pointId, state: 'completed' });
      expect(await first.runs.countActiveForPoint(pointId)).toEqual([active.id]);
    });
  });
}
