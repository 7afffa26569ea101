import { describe, expect, it } from 'vitest';
import {
  newId,
  type DiskId,
  type ExportId,
  type PointId,
  type RunId,
  type VolumeId,
} from '../../src/lib/id.js';
import type { DatabaseHandles } from './database-contract.js';
import { exportRow, time } from './database-fixture.js';

const idOf = (row: { id: ExportId }) => row.id;

export function describeExportTable(handles: () => DatabaseHandles): void {
  describe('exports', () => {
    it('keep what was inserted, of points and of volumes', async () => {
      const { first, second } = handles();
      const rows = [
        exportRow({
          pointId: newId<PointId>(),
          diskId: newId<DiskId>(),
          facts: { imagePath: `/ä/${'p'.repeat(3000)}`, sizeBytes: 2 ** 43 + 1 },
        }),
        exportRow({ kind: 'push', runId: newId<RunId>(), expiresAt: time(5), state: 'removing' }),
        exportRow({ kind: 'volume', volumeId: newId<VolumeId>(), facts: null }),
      ];
      for (const row of rows) {
        await first.exports.insert(row);
        expect(await second.exports.get(row.id)).toEqual(row);
      }
      expect(await first.exports.get(newId<ExportId>())).toBeNull();
    });

    it('refuse a second one of the same name or id, and say which there is', async () => {
      const { first, second } = handles();
      const row = exportRow();
      await first.exports.insert(row);
      await expect(second.exports.insert(exportRow({ name: row.name }))).rejects.toMatchObject({
        code: 'CONFLICT',
        details: { field: 'name', exportId: row.id },
      });
      await expect(second.exports.insert(exportRow({ id: row.id }))).rejects.toMatchObject({
        code: 'CONFLICT',
        details: { field: 'id', exportId: row.id },
      });
      expect(await first.exports.get(row.id)).toEqual(row);
    });

    it('take names that differ only in case as different, and none that is too long or empty', async () => {
      const { first } = handles();
      const name = `Backup-${newId()}`;
      await first.exports.insert(exportRow({ name }));
      await first.exports.insert(exportRow({ name: name.toLowerCase() }));
      for (const wrong of ['', 'n'.repeat(65)]) {
        await expect(first.exports.insert(exportRow({ name: wrong }))).rejects.toMatchObject({
          code: 'INVALID_INPUT',
        });
      }
    });

    it('let exactly one of several inserts of one name at once in', async () => {
      const { first, second } = handles();
      const name = `race-${newId()}`;
      const rows = Array.from({ length: 4 }, () => exportRow({ name }));
      const results = await Promise.allSettled(
        rows.map((row, index) => (index % 2 === 0 ? first : second).exports.insert(row)),
      );
      const winners = rows.filter((_row, index) => results[index]?.status === 'fulfilled');
      expect(winners).toHaveLength(1);
      for (const result of results.filter(({ status }) => status === 'rejected')) {
        expect(result).toMatchObject({
          reason: { code: 'CONFLICT', details: { field: 'name', exportId: winners[0]!.id } },
        });
      }
      expect(await second.exports.get(winners[0]!.id)).toEqual(winners[0]);
    });

    it('change their state, expiry and facts, each alone, and say when they are gone', async () => {
      const { first, second } = handles();
      const row = exportRow({ expiresAt: time(1) });
      await first.exports.insert(row);
      await first.exports.update(row.id, { state: 'published' });
      expect(await second.exports.get(row.id)).toEqual({ ...row, state: 'published' });
      await first.exports.update(row.id, { expiresAt: null, facts: { at: 10_900 } });
      await first.exports.update(row.id, {});
      expect(await second.exports.get(row.id)).toEqual({
        ...row,
        state: 'published',
        expiresAt: null,
        facts: { at: 10_900 },
      });
      await second.exports.remove(row.id);
      await second.exports.remove(row.id);
      expect(await first.exports.get(row.id)).toBeNull();
      for (const change of [{ state: 'published' as const }, {}]) {
        await expect(first.exports.update(row.id, change)).rejects.toMatchObject({
          code: 'NOT_FOUND',
          details: { exportId: row.id },
        });
      }
    });

    it('give their name free when they are removed', async () => {
      const { first, second } = handles();
      const row = exportRow();
      await first.exports.insert(row);
      await first.exports.remove(row.id);
      const again = exportRow({ name: row.name });
      await second.exports.insert(again);
      expect(await first.exports.get(again.id)).toEqual(again);
    });

    it('are found by kind, point, run and volume, and by several of them', async () => {
      const { first } = handles();
      const [pointId, runId, volumeId] = [newId<PointId>(), newId<RunId>(), newId<VolumeId>()];
      const ofPoint = exportRow({ pointId, createdAt: time(1) });
      const pushed = exportRow({ kind: 'push', pointId, runId, createdAt: time(2) });
      const ofVolume = exportRow({ kind: 'volume', volumeId, createdAt: time(3) });
      for (const row of [pushed, ofVolume, ofPoint]) await first.exports.insert(row);
      expect(await first.exports.listAll({ pointId })).toEqual([ofPoint, pushed]);
      expect(await first.exports.listAll({ runId })).toEqual([pushed]);
      expect(await first.exports.listAll({ volumeId })).toEqual([ofVolume]);
      expect(await first.exports.listAll({ kind: 'point', pointId })).toEqual([ofPoint]);
      expect(await first.exports.listAll({ kind: 'volume', pointId })).toEqual([]);
      const all = await first.exports.listAll({});
      expect(all).toEqual(expect.arrayContaining([ofPoint, pushed, ofVolume]));
    });

    it('are paged newest first, each once, while some are added', async () => {
      const { first } = handles();
      const pointId = newId<PointId>();
      const rows = [4, 4, 3, 2, 1].map((ms) => exportRow({ pointId, createdAt: time(ms) }));
      for (const row of rows) await first.exports.insert(row);
      const expected = [...rows].sort(
        (a, b) => b.createdAt.localeCompare(a.createdAt) || (a.id < b.id ? 1 : -1),
      );
      const seen: ExportId[] = [];
      let cursor: string | null = null;
      do {
        const page: { rows: { id: ExportId }[]; nextCursor: string | null } = await first.exports.list(
          { pointId },
          { limit: 2, cursor },
        );
        seen.push(...page.rows.map(idOf));
        cursor = page.nextCursor;
        await first.exports.insert(exportRow({ pointId, createdAt: time(9) }));
      } while (cursor !== null);
      expect(seen).toEqual(expected.map(idOf));
      await expect(first.exports.list({}, { limit: 1, cursor: 'x' })).rejects.toMatchObject({
        code: 'INVALID_INPUT',
        details: { field: 'cursor' },
      });
    });

    it('outlive their run and their machine', async () => {
      const { first } = handles();
      const row = exportRow({ kind: 'push', runId: newId<RunId>(), diskId: newId<DiskId>() });
      await first.exports.insert(row);
      expect(await first.runs.get(row.runId!)).toBeNull();
      expect(await first.exports.get(row.id)).toEqual(row);
    });
  });
}
