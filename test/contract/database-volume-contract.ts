import { describe, expect, it } from 'vitest';
import type { DeviceMappingRow, VolumeRow } from '../../src/db/index.js';
import { newId, type VolumeId } from '../../src/lib/id.js';
import type { DatabaseHandles } from './database-contract.js';
import { mappingRow, time, volumeRow } from './database-fixture.js';

export function describeVolumeTable(handles: () => DatabaseHandles): void {
  const add = async (change: Partial<VolumeRow> = {}, mapping: DeviceMappingRow | null = null) => {
    const { first } = handles();
    const row = volumeRow(change);
    await first.volumes.insert(row);
    if (mapping !== null) await first.volumes.attach(row.id, mapping);
    return { ...row, mapping };
  };

  describe('volumes', () => {
    it('keep what was inserted, and are found by id and exact name', async () => {
      const { second } = handles();
      const mark = newId();
      const row = await add({
        name: `Größe 💾 ${mark}`,
        identity: `serial:${'ü'.repeat(900)} ${mark}`,
        facts: { model: 'ä', paths: ['/dev/disk/by-id/x'] },
      });
      expect(await second.volumes.get(row.id)).toEqual(row);
      expect(await second.volumes.findByName(row.name)).toEqual(row);
      for (const other of [row.name.toLowerCase(), `${row.name} `, '']) {
        expect(await second.volumes.findByName(other), other).toBeNull();
      }
      expect(await second.volumes.get(newId<VolumeId>())).toBeNull();
    });

    it('refuse a second one of the same name or identity, and say which there is', async () => {
      const { second } = handles();
      const [one, two] = [await add(), await add()];
      const cases = [
        { change: { name: one.name }, details: { field: 'name', volumeId: one.id } },
        { change: { identity: two.identity }, details: { field: 'identity', volumeId: two.id } },
        // The name goes first, with the volume that has the name.
        { change: { name: one.name, identity: two.identity }, details: { field: 'name', volumeId: one.id } },
        { change: { id: two.id }, details: { field: 'id', volumeId: two.id } },
      ];
      for (const { change, details } of cases) {
        await expect(second.volumes.insert(volumeRow(change))).rejects.toMatchObject({
          code: 'CONFLICT',
          details,
        });
      }
    });

    it('of one identity are there once, also when several are inserted at once', async () => {
      const { first, second } = handles();
      const identity = `wwn:${newId()}`;
      const rows = Array.from({ length: 4 }, () => volumeRow({ identity }));
      const results = await Promise.allSettled(
        rows.map((row, index) => (index % 2 === 0 ? first : second).volumes.insert(row)),
      );
      const winners = rows.filter((_row, index) => results[index]?.status === 'fulfilled');
      expect(winners).toHaveLength(1);
      for (const result of results.filter(({ status }) => status === 'rejected')) {
        expect(result).toMatchObject({
          reason: { code: 'CONFLICT', details: { field: 'identity', volumeId: winners[0]!.id } },
        });
      }
    });

    it('refuse a name, identity or device path that is too long, or empty', async () => {
      const { first } = handles();
      for (const change of [{ name: '' }, { name: 'n'.repeat(256) }, { identity: 'i'.repeat(1025) }]) {
        await expect(first.volumes.insert(volumeRow(change))).rejects.toMatchObject({
          code: 'INVALID_INPUT',
        });
      }
      const row = await add();
      await expect(first.volumes.update(row.id, { name: '' })).rejects.toMatchObject({
        code: 'INVALID_INPUT',
      });
      const mapping = mappingRow({ devicePath: `/dev/${'x'.repeat(4092)}` });
      await expect(first.volumes.attach(row.id, mapping)).rejects.toMatchObject({ code: 'INVALID_INPUT' });
      expect(await first.volumes.get(row.id)).toEqual(row);
    });

    it('change their name, identity, size and facts, each alone, and keep the rest', async () => {
      const { first, second } = handles();
      const row = await add({}, mappingRow());
      const name = `renamed ${row.id}`;
      await first.volumes.update(row.id, { name });
      expect(await second.volumes.findByName(name)).toEqual({ ...row, name });
      expect(await second.volumes.findByName(row.name)).toBeNull();
      const identity = `fs-uuid:${row.id}`;
      await first.volumes.update(row.id, { identity });
      await first.volumes.update(row.id, { sizeBytes: 2 ** 44, facts: null });
      await first.volumes.update(row.id, {});
      const changed = { ...row, name, identity, sizeBytes: 2 ** 44, facts: null };
      expect(await second.volumes.get(row.id)).toEqual(changed);
      await add({ name: row.name, identity: row.identity });
      await expect(first.volumes.update(newId<VolumeId>(), { sizeBytes: 1 })).rejects.toMatchObject({
        code: 'NOT_FOUND',
      });
    });

    it('do not take the name or identity of another', async () => {
      const { first, second } = handles();
      const [row, one, two] = [await add(), await add(), await add()];
      const cases = [
        { change: { name: one.name }, details: { field: 'name', volumeId: one.id } },
        { change: { identity: two.identity }, details: { field: 'identity', volumeId: two.id } },
        // Its own name is not in the way.
        {
          change: { name: row.name, identity: two.identity },
          details: { field: 'identity', volumeId: two.id },
        },
      ];
      for (const { change, details } of cases) {
        await expect(first.volumes.update(row.id, { ...change, sizeBytes: 1 })).rejects.toMatchObject({
          code: 'CONFLICT',
          details,
        });
      }
      expect(await second.volumes.get(row.id)).toEqual(row);
      await expect(first.volumes.update(row.id, { identity: '' })).rejects.toMatchObject({
        code: 'INVALID_INPUT',
      });
    });

    it('are paged by id with their mappings, each once, while some are added', async () => {
      const { first } = handles();
      const rows = [await add({}, mappingRow()), await add(), await add({}, mappingRow())];
      const seen: VolumeRow[] = [];
      let cursor: string | null = null;
      do {
        const page: { rows: VolumeRow[]; nextCursor: string | null } = await first.volumes.list({
          limit: 2,
          cursor,
        });
        seen.push(...page.rows);
        cursor = page.nextCursor;
        if (seen.length < 6) await add();
      } while (cursor !== null);
      const ids = seen.map(({ id }) => id);
      expect(ids).toEqual([...new Set(ids)].sort());
      for (const row of rows) expect(seen.find(({ id }) => id === row.id)).toEqual(row);
    });

    it('that are attached are listed apart', async () => {
      const { first } = handles();
      const [attached, free] = [await add({}, mappingRow()), await add()];
      const list = await first.volumes.listAttached();
      expect(list).toContainEqual(attached);
      expect(list.every(({ mapping }) => mapping !== null)).toBe(true);
      expect(list.map(({ id }) => id)).not.toContain(free.id);
    });

    it('have one device at a time, which belongs to no other', async () => {
      const { first, second } = handles();
      const mapping = mappingRow({ devicePath: `/dev/mapper/${'ä'.repeat(3000)}${newId()}` });
      const [row, other] = [await add({}, mapping), await add()];
      expect(await second.volumes.get(row.id)).toEqual(row);
      await expect(second.volumes.attach(row.id, mappingRow())).rejects.toMatchObject({
        code: 'CONFLICT',
        details: { volumeId: row.id, devicePath: mapping.devicePath },
      });
      for (const change of [{ devicePath: mapping.devicePath }, { deviceNumber: mapping.deviceNumber }]) {
        await expect(second.volumes.attach(other.id, mappingRow(change))).rejects.toMatchObject({
          code: 'CONFLICT',
          details: { volumeId: row.id, devicePath: mapping.devicePath },
        });
      }
      expect(await second.volumes.get(row.id)).toEqual(row);
      expect(await second.volumes.get(other.id)).toEqual(other);
      await expect(first.volumes.attach(newId<VolumeId>(), mappingRow())).rejects.toMatchObject({
        code: 'NOT_FOUND',
      });
    });

    it('that are attached to one path at once: exactly one gets it', async () => {
      const { first, second } = handles();
      const rows = [await add(), await add(), await add(), await add()];
      const { devicePath } = mappingRow();
      const mappings = rows.map(() => mappingRow({ devicePath }));
      const results = await Promise.allSettled(
        rows.map(({ id }, index) => (index % 2 === 0 ? first : second).volumes.attach(id, mappings[index]!)),
      );
      const winner = results.findIndex(({ status }) => status === 'fulfilled');
      expect(results.filter(({ status }) => status === 'fulfilled')).toHaveLength(1);
      for (const result of results.filter(({ status }) => status === 'rejected')) {
        expect(result).toMatchObject({
          reason: { code: 'CONFLICT', details: { volumeId: rows[winner]!.id, devicePath } },
        });
      }
      for (const [index, { id }] of rows.entries()) {
        const expected = index === winner ? mappings[index] : null;
        expect((await first.volumes.get(id))?.mapping).toEqual(expected);
      }
    });

    it('attached twice at once have one of the two devices', async () => {
      const { first, second } = handles();
      const row = await add();
      const mappings = [mappingRow(), mappingRow()];
      const results = await Promise.allSettled([
        first.volumes.attach(row.id, mappings[0]!),
        second.volumes.attach(row.id, mappings[1]!),
      ]);
      expect(results.map(({ status }) => status).sort()).toEqual(['fulfilled', 'rejected']);
      const winner = mappings[results.findIndex(({ status }) => status === 'fulfilled')];
      expect(await first.volumes.get(row.id)).toEqual({ ...row, mapping: winner });
    });

    it('follow their device to another path, unless that belongs to another', async () => {
      const { first, second } = handles();
      const [row, other] = [await add({}, mappingRow()), await add({}, mappingRow())];
      const moved = mappingRow({ attachedAt: row.mapping!.attachedAt, verifiedAt: time(7) });
      await first.volumes.updateMapping(row.id, moved);
      expect(await second.volumes.get(row.id)).toEqual({ ...row, mapping: moved });
      await first.volumes.updateMapping(row.id, moved);
      const taken = { ...moved, devicePath: other.mapping!.devicePath };
      await expect(second.volumes.updateMapping(row.id, taken)).rejects.toMatchObject({
        code: 'CONFLICT',
        details: { volumeId: other.id },
      });
      expect(await second.volumes.get(row.id)).toEqual({ ...row, mapping: moved });
      // What it had before is free again.
      const third = await add();
      await first.volumes.attach(third.id, row.mapping!);
      await first.volumes.detach(row.id);
      await expect(first.volumes.updateMapping(row.id, moved)).rejects.toMatchObject({ code: 'NOT_FOUND' });
      expect((await second.volumes.get(row.id))?.mapping).toBeNull();
    });

    it('give their device free when they are detached, and are not removed before', async () => {
      const { first, second } = handles();
      const mapping = mappingRow();
      const [row, other] = [await add({}, mapping), await add()];
      await expect(second.volumes.remove(row.id)).rejects.toMatchObject({
        code: 'CONFLICT',
        details: { volumeId: row.id },
      });
      expect(await first.volumes.get(row.id)).toEqual(row);
      await first.volumes.detach(row.id);
      await first.volumes.detach(row.id);
      await second.volumes.attach(other.id, mapping);
      expect(await first.volumes.remove(row.id)).toBe(true);
      expect(await first.volumes.remove(row.id)).toBe(false);
      expect(await first.volumes.get(row.id)).toBeNull();
      expect(await first.volumes.get(other.id)).toEqual({ ...other, mapping });
    });

    it('removed while being attached are either', async () => {
      const { first, second } = handles();
      for (let round = 0; round < 5; round += 1) {
        const row = await add();
        const [attached, removed] = await Promise.allSettled([
          first.volumes.attach(row.id, mappingRow()),
          second.volumes.remove(row.id),
        ]);
        const left = await first.volumes.get(row.id);
        if (attached.status === 'fulfilled') {
          expect(removed).toMatchObject({ status: 'rejected', reason: { code: 'CONFLICT' } });
          expect(left?.mapping).not.toBeNull();
        } else {
          expect(attached.reason).toMatchObject({ code: 'NOT_FOUND' });
          expect(removed).toMatchObject({ status: 'fulfilled', value: true });
          expect(left).toBeNull();
        }
      }
    });
  });
}
