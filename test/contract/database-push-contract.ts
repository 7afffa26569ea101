import { describe, expect, it } from 'vitest';
import type { Database, PushDiskRow } from '../../src/db/index.js';
import { newId, type DiskId, type RunId } from '../../src/lib/id.js';
import type { DatabaseHandles } from './database-contract.js';
import { addPair, runRow, time } from './database-fixture.js';

async function addRun(db: Database): Promise<RunId> {
  const run = runRow();
  await db.runs.insert(run, { turn: 'none' });
  return run.id;
}

function pushDiskRows(runId: RunId, count: number): PushDiskRow[] {
  return Array.from({ length: count }, () => ({
    runId,
    diskId: newId<DiskId>(),
    seenAt: time(0),
    progress: null,
    completion: null,
  })).sort((a, b) => (a.diskId < b.diskId ? -1 : 1));
}

export function describePushDiskTable(handles: () => DatabaseHandles): void {
  describe('disks of a push', () => {
    it('are there for their run alone, and those of an earlier attempt go', async () => {
      const { first, second } = handles();
      const [runId, other] = [await addRun(first), await addRun(first)];
      const [earlier, rows, others] = [
        pushDiskRows(runId, 2),
        pushDiskRows(runId, 150),
        pushDiskRows(other, 1),
      ];
      await first.pushDisks.replace(other, others);
      await first.pushDisks.replace(runId, earlier);
      await first.pushDisks.complete(runId, earlier[0]!.diskId, { completion: { bytes: 1 }, at: time(1) });
      await first.pushDisks.replace(runId, [...rows, { ...earlier[0]!, seenAt: time(2) }]);
      const all = [...rows, { ...earlier[0]!, seenAt: time(2) }];
      expect(await second.pushDisks.list(runId)).toEqual(all.sort((a, b) => (a.diskId < b.diskId ? -1 : 1)));
      expect(await second.pushDisks.list(other)).toEqual(others);
      await first.pushDisks.replace(runId, []);
      expect(await second.pushDisks.list(runId)).toEqual([]);
      expect(await second.pushDisks.list(other)).toEqual(others);
    });

    it('are replaced in whole or not at all', async () => {
      const { first } = handles();
      const runId = await addRun(first);
      const rows = pushDiskRows(runId, 2);
      await first.pushDisks.replace(runId, rows);
      const [twice] = pushDiskRows(runId, 1);
      await expect(first.pushDisks.replace(runId, [twice!, twice!])).rejects.toMatchObject({
        code: 'CONFLICT',
      });
      expect(await first.pushDisks.list(runId)).toEqual(rows);
    });

    it('replaced by several at once are those of one of them', async () => {
      const { first, second } = handles();
      const runId = await addRun(first);
      const sets = Array.from({ length: 4 }, () => pushDiskRows(runId, 3));
      const shared = pushDiskRows(runId, 1)[0]!;
      for (const set of sets) set[0] = shared;
      await Promise.all(
        sets.map((set, index) => (index % 2 === 0 ? first : second).pushDisks.replace(runId, set)),
      );
      const left = (await first.pushDisks.list(runId)).map(({ diskId }) => diskId);
      const possible = sets.map((set) => set.map(({ diskId }) => diskId).sort());
      expect(possible).toContainEqual(left);
    });

    it('need a run', async () => {
      const { first } = handles();
      const runId = newId<RunId>();
      await expect(first.pushDisks.replace(runId, pushDiskRows(runId, 1))).rejects.toMatchObject({
        code: 'NOT_FOUND',
        details: { runId },
      });
    });

    it('keep the newest report until they are completed', async () => {
      const { first, second } = handles();
      const runId = await addRun(first);
      const [disk, other] = pushDiskRows(runId, 2) as [PushDiskRow, PushDiskRow];
      await first.pushDisks.replace(runId, [disk, other]);
      const { diskId } = disk;
      for (const bytes of [1, 2 ** 43 + 1]) {
        const report = { progress: { bytes, note: 'ä' }, at: time(bytes === 1 ? 1 : 2) };
        expect(await second.pushDisks.report(runId, diskId, report)).toBe(true);
      }
      const reported = { ...disk, progress: { bytes: 2 ** 43 + 1, note: 'ä' }, seenAt: time(2) };
      expect(await first.pushDisks.list(runId)).toEqual([reported, other]);
      // The same again: a row that does not change is there all the same.
      const same = { progress: reported.progress, at: reported.seenAt };
      expect(await first.pushDisks.report(runId, diskId, same)).toBe(true);
      const completed = { ...reported, completion: { sumsDigest: 'a' }, seenAt: time(3) };
      expect(
        await second.pushDisks.complete(runId, diskId, { completion: { sumsDigest: 'a' }, at: time(3) }),
      ).toEqual(completed);
      expect(await first.pushDisks.report(runId, diskId, { progress: null, at: time(4) })).toBe(false);
      expect(await first.pushDisks.list(runId)).toEqual([completed, other]);
    });

    it('that are not there, or of another run, are neither reported nor completed', async () => {
      const { first } = handles();
      const [runId, otherRun] = [await addRun(first), await addRun(first)];
      const rows = pushDiskRows(runId, 1);
      await first.pushDisks.replace(runId, rows);
      const { diskId } = rows[0]!;
      const wrong: [RunId, DiskId][] = [
        [runId, newId<DiskId>()],
        [otherRun, diskId],
        [newId<RunId>(), diskId],
      ];
      for (const [run, disk] of wrong) {
        expect(await first.pushDisks.report(run, disk, { progress: {}, at: time(1) })).toBe(false);
        expect(await first.pushDisks.complete(run, disk, { completion: {}, at: time(1) })).toBeNull();
      }
      expect(await first.pushDisks.list(runId)).toEqual(rows);
    });

    it('are completed once: of several at once one wins, and all get its row', async () => {
      const { first, second } = handles();
      const runId = await addRun(first);
      const rows = pushDiskRows(runId, 1);
      await first.pushDisks.replace(runId, rows);
      const { diskId } = rows[0]!;
      const answers = await Promise.all(
        Array.from({ length: 6 }, (_item, index) =>
          (index % 2 === 0 ? first : second).pushDisks.complete(runId, diskId, {
            completion: { by: index },
            at: time(index + 1),
          }),
        ),
      );
      const [kept] = await second.pushDisks.list(runId);
      expect(kept?.completion).toEqual({ by: expect.any(Number) as number });
      const { by } = kept?.completion as { by: number };
      expect(kept).toEqual({ ...rows[0], completion: { by }, seenAt: time(by + 1) });
      for (const answer of answers) expect(answer).toEqual(kept);
      expect(
        await first.pushDisks.complete(runId, diskId, { completion: { by: 'later' }, at: time(99) }),
      ).toEqual(kept);
    });

    it('stay when the machine of their run goes', async () => {
      const { first } = handles();
      const { vm, repository } = await addPair(first);
      const run = runRow({ vmId: vm.id, repositoryId: repository.id, state: 'completed' });
      await first.runs.insert(run, { turn: 'none' });
      const rows = pushDiskRows(run.id, 1);
      await first.pushDisks.replace(run.id, rows);
      await first.vms.remove(vm.id);
      expect(await first.pushDisks.list(run.id)).toEqual(rows);
    });
  });
}
