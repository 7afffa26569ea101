import { describe, expect, it } from 'vitest';
import { newId, type LayerId, type PointId, type RepositoryId, type VmId } from '../../src/lib/id.js';
import type { Database, PointFilter, PointRow } from '../../src/db/index.js';
import type { DatabaseHandles } from './database-contract.js';
import { addPair, pointEntry, repositoryRow, time, vmRow, type PointEntry } from './database-fixture.js';

export function describeIndexTables(handles: () => DatabaseHandles): void {
  const insert = (db: Database, entry: PointEntry): Promise<void> =>
    db.points.insert(entry.point, entry.layers);
  const listIds = async (db: Database, filter: PointFilter, limit = 2): Promise<string[]> => {
    const ids: string[] = [];
    let cursor: string | null = null;
    do {
      const page: { rows: PointRow[]; nextCursor: string | null } = await db.points.list(filter, {
        limit,
        cursor,
      });
      ids.push(...page.rows.map((row) => row.id));
      cursor = page.nextCursor;
    } while (cursor !== null);
    return ids;
  };

  describe('recovery points', () => {
    it('are answered as they were, the manifest too', async () => {
      const { first, second } = handles();
      const { vm, repository } = await addPair(first, 2);
      const entry = pointEntry(vm, repository, { manifestPadding: '💾'.repeat(50_000) });
      await insert(first, entry);
      expect(await second.points.get(entry.point.id)).toEqual(entry.point);
      expect(await first.points.get(newId<PointId>())).toBeNull();
    });

    it('may be inserted again, also at once: a step may run twice', async () => {
      const { first, second } = handles();
      const { vm, repository } = await addPair(first);
      const entry = pointEntry(vm, repository);
      await Promise.all([insert(first, entry), insert(second, entry), insert(first, entry)]);
      await insert(second, entry);
      expect(await listIds(first, { vmId: vm.id })).toEqual([entry.point.id]);
    });

    it('are inserted with all their layers or not at all', async () => {
      const { first } = handles();
      const { vm, repository } = await addPair(first);
      const one = pointEntry(vm, repository);
      await insert(first, one);
      const two = pointEntry(vm, repository, { sequence: 2 });
      two.layers[0]!.id = one.layers[0]!.id;
      await expect(insert(first, two)).rejects.toMatchObject({ code: 'CONFLICT' });
      expect(await first.points.get(two.point.id)).toBeNull();
    });

    it('need their VM, disks and repository', async () => {
      const { first } = handles();
      const { vm, repository } = await addPair(first);
      await expect(insert(first, pointEntry(vmRow(), repository))).rejects.toMatchObject({
        code: 'NOT_FOUND',
      });
      await expect(insert(first, pointEntry(vm, repositoryRow()))).rejects.toMatchObject({
        code: 'NOT_FOUND',
      });
      const strange = pointEntry({ ...vm, disks: vmRow().disks }, repository);
      await expect(insert(first, strange)).rejects.toMatchObject({ code: 'NOT_FOUND' });
    });

    it('are paged newest first with ties by id, by VM and by repository', async () => {
      const { first } = handles();
      const { vm, repository } = await addPair(first);
      const { vm: otherVm, repository: otherRepository } = await addPair(first);
      const entries: PointEntry[] = [];
      for (let sequence = 1; sequence <= 5; sequence += 1) {
        entries.push(
          pointEntry(vm, repository, { sequence, committedAt: time(sequence > 3 ? 4 : sequence) }),
        );
      }
      entries.push(pointEntry(otherVm, repository, { committedAt: time(3) }));
      entries.push(pointEntry(vm, otherRepository, { committedAt: time(3) }));
      for (const entry of entries) await insert(first, entry);
      const expected = (filter: PointFilter): string[] =>
        entries
          .map((entry) => entry.point)
          .filter((point) => filter.vmId === undefined || point.vmId === filter.vmId)
          .filter((point) => filter.repositoryId === undefined || point.repositoryId === filter.repositoryId)
          .sort((a, b) => (`${a.committedAt}${a.id}` < `${b.committedAt}${b.id}` ? 1 : -1))
          .map((point) => point.id);
      for (const filter of [
        { vmId: vm.id },
        { repositoryId: repository.id },
        { vmId: vm.id, repositoryId: repository.id },
        { vmId: otherVm.id, repositoryId: otherRepository.id },
      ]) {
        expect(await listIds(first, filter)).toEqual(expected(filter));
      }
    });

    it('keep a page stable while newer points are added', async () => {
      const { first } = handles();
      const { vm, repository } = await addPair(first);
      for (let sequence = 1; sequence <= 3; sequence += 1) {
        await insert(first, pointEntry(vm, repository, { sequence }));
      }
      const page = await first.points.list({ vmId: vm.id }, { limit: 2, cursor: null });
      await insert(first, pointEntry(vm, repository, { sequence: 4 }));
      const next = await first.points.list({ vmId: vm.id }, { limit: 2, cursor: page.nextCursor });
      expect([...page.rows, ...next.rows].map((row) => row.sequence)).toEqual([3, 2, 1]);
      expect(next.nextCursor).toBeNull();
    });

    it('name their dependents: points with a layer on one of theirs', async () => {
      const { first } = handles();
      const { vm, repository } = await addPair(first, 2);
      const full = pointEntry(vm, repository);
      const children = [2, 3].map((sequence) => pointEntry(vm, repository, { sequence, parent: full }));
      const grandchild = pointEntry(vm, repository, { sequence: 4, parent: children[1]! });
      for (const entry of [full, ...children, grandchild]) await insert(first, entry);
      expect(await first.points.dependents(full.point.id)).toEqual(
        children.map((child) => child.point.id).sort(),
      );
      expect(await first.points.dependents(grandchild.point.id)).toEqual([]);
    });

    it('are removed with their layers; removing again is harmless', async () => {
      const { first } = handles();
      const { vm, repository } = await addPair(first);
      const entry = pointEntry(vm, repository);
      await insert(first, entry);
      await first.points.remove(entry.point.id);
      await first.points.remove(entry.point.id);
      expect(await first.points.get(entry.point.id)).toBeNull();
      await first.vms.remove(vm.id);
    });

    it('are counted', async () => {
      const { first } = handles();
      const { vm, repository } = await addPair(first);
      const other = vmRow();
      await first.vms.insert(other);
      const full = pointEntry(vm, repository);
      for (const entry of [
        full,
        pointEntry(vm, repository, { sequence: 2, parent: full }),
        pointEntry(other, repository, { sequence: 3 }),
      ]) {
        entry.point.fileBytes = 2 ** 51;
        await insert(first, entry);
      }
      expect(await first.points.stats({ repositoryId: repository.id })).toEqual({
        points: 3,
        fullPoints: 2,
        vms: 2,
        fileBytes: 3 * 2 ** 51,
        oldestCapturedAt: time(1),
        newestCapturedAt: time(3),
      });
      expect(await first.points.stats({ vmId: newId<VmId>() })).toEqual({
        points: 0,
        fullPoints: 0,
        vms: 0,
        fileBytes: 0,
        oldestCapturedAt: null,
        newestCapturedAt: null,
      });
    });
  });

  describe('a rescan', () => {
    it('replaces the points of its repository and of no other', async () => {
      const { first } = handles();
      const { vm, repository } = await addPair(first);
      const other = repositoryRow();
      await first.repositories.insert(other);
      const kept = pointEntry(vm, repository);
      const gone = pointEntry(vm, repository, { sequence: 2, parent: kept });
      const foreign = pointEntry(vm, other, { sequence: 3 });
      for (const entry of [kept, gone, foreign]) await insert(first, entry);
      const found = pointEntry(vm, repository, { sequence: 4, parent: kept });
      await first.points.replaceRepository(repository.id, { vms: [vm], points: [kept, found] });
      expect(await listIds(first, { vmId: vm.id })).toEqual(
        [found, foreign, kept].map((entry) => entry.point.id),
      );
      expect(await first.points.dependents(kept.point.id)).toEqual([found.point.id]);
      expect((await first.vms.get(vm.id))?.disks).toEqual(vm.disks);
    });

    it('makes VMs and disks that are not known, under a name that is free', async () => {
      const { first } = handles();
      const { vm: known, repository } = await addPair(first);
      const found = vmRow({ name: known.name }, 2);
      for (const disk of found.disks) disk.source = null;
      const grown = vmRow({ id: known.id, name: 'ignored' }, 0);
      grown.disks = [
        ...known.disks,
        { ...vmRow().disks[0]!, vmId: known.id, number: 7, name: 'seven', source: null },
      ];
      const entry = pointEntry(found, repository);
      await first.points.replaceRepository(repository.id, { vms: [found, grown], points: [entry] });
      expect(await first.vms.get(found.id)).toEqual({ ...found, name: `${known.name} (${found.id})` });
      expect((await first.vms.get(known.id))?.disks).toEqual(grown.disks);
    });

    it('records a layer whose parent is lost', async () => {
      const { first } = handles();
      const { vm, repository } = await addPair(first);
      const orphan = pointEntry(vm, repository);
      orphan.layers[0]!.parentLayerId = newId<LayerId>();
      await first.points.replaceRepository(repository.id, { vms: [], points: [orphan] });
      expect(await listIds(first, { repositoryId: repository.id })).toEqual([orphan.point.id]);
    });

    it('changes nothing when a part of it is refused', async () => {
      const { first } = handles();
      const { vm, repository } = await addPair(first);
      const before = pointEntry(vm, repository);
      await insert(first, before);
      const strange = pointEntry(vmRow(), repository);
      await expect(
        first.points.replaceRepository(repository.id, { vms: [], points: [strange] }),
      ).rejects.toMatchObject({ code: 'NOT_FOUND' });
      await expect(
        first.points.replaceRepository(repository.id, { vms: [], points: [pointEntry(vm, repositoryRow())] }),
      ).rejects.toMatchObject({ code: 'INVALID_INPUT' });
      await expect(
        first.points.replaceRepository(newId<RepositoryId>(), { vms: [], points: [] }),
      ).rejects.toMatchObject({ code: 'NOT_FOUND' });
      expect(await listIds(first, { repositoryId: repository.id })).toEqual([before.point.id]);
    });
  });
}
