import { describe, expect, it } from 'vitest';
import type { DiskRow, VmRow } from '../../src/db/index.js';
import { newId, type DiskId, type PointId, type VmId } from '../../src/lib/id.js';
import type { DatabaseHandles } from './database-contract.js';
import { addPair, pointEntry, runRow, vmRow } from './database-fixture.js';

const FACTS = { isPresent: true, state: 'running', changeRecords: [{ name: 'ä💾', pointId: null }] };

/** A discovered machine; `key` must be of this test alone. */
function machineRow(key: string, change: Partial<VmRow> = {}, diskCount = 1): VmRow {
  const source = { kind: 'libvirt', uri: 'qemu:///system', uuid: key };
  const row = vmRow({ sourceKey: key, source, facts: FACTS, ...change }, diskCount);
  for (const disk of row.disks) {
    Object.assign(disk, {
      lineage: `${key}:/images/${disk.number}`,
      source: { kind: 'libvirt', target: `vd${disk.number}`, serial: null },
      facts: { isPresent: true, target: `vd${disk.number}`, serial: 'ö' },
    });
  }
  return row;
}

/** As a rescan makes it: nothing is known of its sources. */
function lostRow(lineage: string, id = newId<VmId>()): VmRow {
  const row = vmRow({ id });
  Object.assign(row.disks[0]!, { lineage, source: null });
  return row;
}

const keyOf = (row: VmRow) => row.sourceKey;

/** What discovered machines need of the tables for VMs and runs. */
export function describeMachineTables(handles: () => DatabaseHandles): void {
  describe('machines', () => {
    it('keep what discovery found, and are found by their source key', async () => {
      const { first, second } = handles();
      const key = `libvirt:${newId()}`;
      const vm = machineRow(key, {}, 2);
      await first.vms.insert(vm);
      expect(await second.vms.get(vm.id)).toEqual(vm);
      expect(await second.vms.findByName(vm.name)).toEqual(vm);
      expect(await second.vms.findBySourceKey(key)).toEqual(vm);
      for (const other of [key.toLowerCase(), key.slice(0, -1), `${key}0`, '%', '']) {
        expect(await first.vms.findBySourceKey(other), other).toBeNull();
      }
    });

    it('of one source key are there once, also two at once; without a key any number', async () => {
      const { first, second } = handles();
      const key = `qemu:/run/${newId()}`;
      const results = await Promise.allSettled([
        first.vms.insert(machineRow(key)),
        second.vms.insert(machineRow(key)),
      ]);
      expect(results.map(({ status }) => status).sort()).toEqual(['fulfilled', 'rejected']);
      expect(results.find(({ status }) => status === 'rejected')).toMatchObject({
        reason: { code: 'CONFLICT' },
      });
      for (const row of [vmRow(), vmRow()]) await first.vms.insert(row);
    });

    it('are listed by how their key begins, as text and not as a pattern', async () => {
      const { first, second } = handles();
      const mark = newId();
      const rows = ['a_%:1', 'a_%:ä2', 'aXX:3'].map((key) => machineRow(`${mark}${key}`, {}, 2));
      for (const row of rows) await first.vms.insert(row);
      const list = async (prefix: string) => (await second.vms.listBySourceKey(mark + prefix)).map(keyOf);
      expect((await list('a_%:')).sort()).toEqual([`${mark}a_%:1`, `${mark}a_%:ä2`]);
      expect((await list('a')).sort()).toEqual(rows.map(keyOf).sort());
      expect(await list('a_%:ä')).toEqual([`${mark}a_%:ä2`]);
      for (const prefix of ['A', 'a_%:1 and more', 'a_%: ']) expect(await list(prefix)).toEqual([]);
      expect(await second.vms.listBySourceKey(`${mark}aXX`)).toEqual([rows[2]]);
    });

    it('follow what they are now: name, source, facts, and their disks by id', async () => {
      const { first, second } = handles();
      const vm = machineRow(`libvirt:${newId()}`, {}, 3);
      await first.vms.insert(vm);
      const [grown, unseen, gone] = vm.disks as [DiskRow, DiskRow, DiskRow];
      const added: DiskRow = { ...grown, id: newId<DiskId>(), number: 9, name: 'added', lineage: 'new' };
      const changed: VmRow = {
        ...vm,
        name: `renamed ${vm.id}`,
        source: { kind: 'libvirt', uri: 'qemu+ssh://other/system' },
        facts: { ...FACTS, isPresent: false },
        disks: [
          { ...grown, sizeBytes: 2 ** 44, lineage: 'elsewhere', facts: { serial: 'ü' } },
          { ...gone, facts: { isPresent: false } },
          added,
        ],
      };
      await first.vms.follow(changed);
      const disks = [changed.disks[0], unseen, changed.disks[1], added];
      expect(await second.vms.get(vm.id)).toEqual({ ...changed, disks });
      expect(await second.vms.findByName(vm.name)).toBeNull();
      await second.vms.follow({ ...changed, disks: [] });
      expect(await first.vms.get(vm.id)).toEqual({ ...changed, disks });
    });

    it('keep the time they were recorded at, and may be given a source key later', async () => {
      const { first } = handles();
      const lost = lostRow(`lineage of ${newId()}`);
      await first.vms.insert(lost);
      const key = `libvirt:${newId()}`;
      await first.vms.follow({ ...lost, sourceKey: key, createdAt: '1999-01-01T00:00:00.000Z' });
      expect(await first.vms.findBySourceKey(key)).toEqual({ ...lost, sourceKey: key });
    });

    it('follow in whole or not at all', async () => {
      const { first } = handles();
      const [vm, other] = [machineRow(`libvirt:${newId()}`, {}, 2), machineRow(`libvirt:${newId()}`)];
      for (const row of [vm, other]) await first.vms.insert(row);
      const [disk, second] = vm.disks as [DiskRow, DiskRow];
      const wrong: VmRow[] = [
        { ...vm, name: other.name },
        { ...vm, sourceKey: other.sourceKey },
        {
          ...vm,
          disks: [
            { ...disk, sizeBytes: 1 },
            { ...disk, id: newId<DiskId>(), number: second.number, name: 'x' },
          ],
        },
      ];
      for (const row of wrong) {
        await expect(first.vms.follow({ ...row, facts: null })).rejects.toMatchObject({ code: 'CONFLICT' });
        expect(await first.vms.get(vm.id)).toEqual(vm);
      }
      const unknown = machineRow(`libvirt:${newId()}`, { id: newId<VmId>() });
      await expect(first.vms.follow(unknown)).rejects.toMatchObject({ code: 'NOT_FOUND' });
      expect(await first.vms.get(unknown.id)).toBeNull();
    });

    it('never follow with the disk of another machine', async () => {
      const { first } = handles();
      const [vm, other] = [machineRow(`libvirt:${newId()}`), machineRow(`libvirt:${newId()}`)];
      for (const row of [vm, other]) await first.vms.insert(row);
      const stolen: VmRow = {
        ...vm,
        disks: [{ ...other.disks[0]!, vmId: vm.id, number: 5, name: 'stolen' }],
      };
      await expect(first.vms.follow(stolen)).rejects.toMatchObject({ code: 'CONFLICT' });
      expect(await first.vms.get(other.id)).toEqual(other);
      expect(await first.vms.get(vm.id)).toEqual(vm);
    });

    it('that a rescan made are adopted by the lineage of a disk, the newest first', async () => {
      const { first, second } = handles();
      const key = `libvirt:${newId()}_%`;
      const ids = [newId<VmId>(), newId<VmId>()].sort();
      const [older, newer] = [lostRow(`${key}:/images/a`, ids[0]), lostRow(`${key}:/images/b`, ids[1])];
      for (const row of [newer, older]) await first.vms.insert(row);
      expect(await second.vms.findAdoptable(`${key}:`)).toEqual(newer);
      expect(await second.vms.findAdoptable(`${key}:/images/a`)).toEqual(older);
      expect(await second.vms.findAdoptable(`${key}:/images/c`)).toBeNull();
      expect(await second.vms.findAdoptable(`${key.slice(0, -2)}xx:`)).toBeNull();
    });

    it('whose sources are known are nobody’s to adopt', async () => {
      const { first } = handles();
      const key = `libvirt:${newId()}`;
      await first.vms.insert(machineRow(key));
      expect(await first.vms.findAdoptable(`${key}:`)).toBeNull();
      const byHand = vmRow();
      byHand.disks[0]!.lineage = `${key}:/images/hand`;
      await first.vms.insert(byHand);
      expect(await first.vms.findAdoptable(`${key}:`)).toBeNull();
    });
  });

  describe('points that runs were to make', () => {
    it('are told with their repository, of this VM and of backups only', async () => {
      const { first, second } = handles();
      const { vm, repository } = await addPair(first);
      const { vm: otherVm, repository: otherRepository } = await addPair(first);
      const insert = async (change: Parameters<typeof runRow>[0]): Promise<PointId> => {
        const pointId = newId<PointId>();
        await first.runs.insert(runRow({ vmId: vm.id, pointId, ...change }), { turn: 'none' });
        return pointId;
      };
      const completed = await insert({ repositoryId: repository.id, state: 'completed' });
      const failed = await insert({ repositoryId: otherRepository.id, state: 'failed' });
      const queued = await insert({ repositoryId: repository.id });
      const restored = await insert({ repositoryId: repository.id, kind: 'restore' });
      const foreign = await insert({ repositoryId: repository.id, vmId: otherVm.id });
      const unasked = await insert({ repositoryId: repository.id });
      const asked = [completed, failed, queued, restored, foreign, newId<PointId>()];
      const found = await second.runs.findPointRepositories(vm.id, asked);
      expect(found).not.toContainEqual(expect.objectContaining({ pointId: unasked }));
      expect(new Map(found.map(({ pointId, repositoryId }) => [pointId, repositoryId]))).toEqual(
        new Map([
          [completed, repository.id],
          [failed, otherRepository.id],
          [queued, repository.id],
        ]),
      );
      expect(found).toHaveLength(3);
      expect(await first.runs.findPointRepositories(vm.id, [])).toEqual([]);
    });

    it('are told of more points than one statement takes', async () => {
      const { first } = handles();
      const { vm, repository } = await addPair(first);
      const pointId = newId<PointId>();
      const run = runRow({ vmId: vm.id, repositoryId: repository.id, pointId });
      await first.runs.insert(run, { turn: 'none' });
      const many = [...Array.from({ length: 1200 }, () => newId<PointId>()), pointId];
      expect(await first.runs.findPointRepositories(vm.id, many)).toEqual([
        { pointId, repositoryId: repository.id },
      ]);
    });

    it('are not told when their run has no point: an indexed point alone is no run', async () => {
      const { first } = handles();
      const { vm, repository } = await addPair(first);
      const { point, layers } = pointEntry(vm, repository);
      await first.points.insert(point, layers);
      expect(await first.runs.findPointRepositories(vm.id, [point.id])).toEqual([]);
    });
  });
}
