import { renameSync, writeFileSync } from 'node:fs';
import { readdir, rm, stat, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, it, test } from 'vitest';
import type { ExportRow } from '../../src/db/index.js';
import type { EngineContext } from '../../src/engine/context.js';
import { removeOverlay } from '../../src/engine/export-overlay.js';
import { publishAll, publishExport, unpublishExport } from '../../src/engine/export-publisher.js';
import { reapExports } from '../../src/engine/export-reaper.js';
import { definitionOf } from '../../src/engine/export-record.js';
import {
  createExportFile,
  hostMonotonicMs,
  readExportFile,
  type ExportStatus,
} from '../../src/exports/index.js';
import { AppError } from '../../src/lib/errors.js';
import { newId, type RunId } from '../../src/lib/id.js';
import { processStartTime } from '../../src/lib/process.js';
import { runRow, time } from '../contract/database-fixture.js';
import { openExportLab, publishedRow, PUBLISH_TIMEOUT_MS, SPEC, type ExportLab } from './export-fixture.js';

let lab: ExportLab;
let context: EngineContext;

beforeEach(async () => {
  lab = await openExportLab();
  ({ context } = lab);
});
afterEach(async () => {
  await lab[Symbol.asyncDispose]();
});

describe('publishing', () => {
  let onReload: () => void;
  afterEach(() => {
    process.off('SIGHUP', onReload);
  });
  /** As if this process were the export daemon, with nothing to serve. */
  async function pretendToServe(): Promise<void> {
    const { pidFile, statusFile, directory: exportsDirectory } = context.settings.exports;
    const status: ExportStatus = {
      ...{ version: 1, pid: process.pid, processStartTime: (await processStartTime(process.pid)) ?? '' },
      ...{ startedAt: '', exportsDirectory, generation: 1, appliedAt: '', readAtMs: 0 },
      ...{ listeners: [], files: [], events: [] },
    };
    onReload = () => {
      writeFileSync(`${statusFile}.new`, JSON.stringify({ ...status, readAtMs: hostMonotonicMs() }));
      renameSync(`${statusFile}.new`, statusFile);
    };
    process.on('SIGHUP', onReload);
    await writeFile(statusFile, JSON.stringify(status));
    await writeFile(pidFile, `${process.pid}\n`);
  }
  const nothingIsLeft = async () => {
    expect(await context.db.exports.listAll({})).toEqual([]);
    expect(await readdir(context.settings.exports.directory)).toEqual([]);
  };

  it('ends where the export is removed meanwhile, and leaves no file without a row', async () => {
    await pretendToServe();
    const confirm = async () => {
      for (const { id } of await context.db.exports.listAll({})) await context.db.exports.remove(id);
    };
    await expect(publishExport(context, { ...SPEC, confirm })).rejects.toMatchObject({ code: 'NOT_FOUND' });
    await nothingIsLeft();
  });

  it('of several ends with the first that is refused, and takes the others back', async () => {
    await pretendToServe();
    const asked: string[] = [];
    const spec = (name: string) => ({
      ...SPEC,
      name,
      confirm: async () => {
        const rows = await context.db.exports.listAll({});
        expect(rows.map((made) => `${made.name} ${made.state}`).sort()).toEqual([
          'one publishing',
          'two publishing',
        ]);
        asked.push(name);
        if (name === 'two') throw new AppError('POINT_IN_USE', 'the point is being deleted');
      },
    });
    const publishing = publishAll(context, [spec('one'), spec('two')]);
    await expect(publishing).rejects.toMatchObject({ code: 'POINT_IN_USE' });
    expect(asked).toEqual(['one', 'two']);
    await nothingIsLeft();
  });

  it('is refused while the daemon reads another directory', async () => {
    await pretendToServe();
    const exports = { ...context.settings.exports, directory: '/elsewhere' };
    const other = { ...context, settings: { ...context.settings, exports } };
    await expect(publishExport(other, SPEC)).rejects.toMatchObject({
      ...{ code: 'EXPORT_DAEMON_UNAVAILABLE', details: { directory: '/elsewhere' } },
    });
    await nothingIsLeft();
  });

  it('is not begun without an export daemon', async () => {
    await expect(publishExport(context, SPEC)).rejects.toMatchObject({ code: 'EXPORT_DAEMON_UNAVAILABLE' });
    await nothingIsLeft();
  });
});

describe('removing an export', () => {
  test('leaves the file of somebody else who has the name', async () => {
    const { directory: exportsDirectory } = context.settings.exports;
    const ours = await lab.insert({ name: 'disk' });
    await createExportFile(exportsDirectory, { ...definitionOf(ours), imagePath: '/srv/other.qcow2' });
    await unpublishExport(context, ours.id);
    expect(await context.db.exports.get(ours.id)).toBeNull();
    expect((await readExportFile(exportsDirectory, 'disk'))?.imagePath).toBe('/srv/other.qcow2');
  });

  test('finds our file also when somebody has written more into it', async () => {
    const { directory: exportsDirectory } = context.settings.exports;
    const ours = await lab.insert({ name: 'disk' });
    await createExportFile(exportsDirectory, { ...definitionOf(ours), description: 'mine now' });
    await unpublishExport(context, ours.id);
    expect(await readdir(exportsDirectory)).toEqual([]);
    await unpublishExport(context, ours.id);
  });

  test('removes the overlay that was made, nothing that took its place, and no image that stands alone', async () => {
    const imagePath = path.join(lab.directory, 'overlay.qcow2');
    const make = async () => {
      await rm(imagePath, { force: true });
      await writeFile(imagePath, 'overlay');
      return String((await stat(imagePath, { bigint: true })).ino);
    };
    const isThere = async () => (await readdir(lab.directory)).includes('overlay.qcow2');
    const inode = await make();
    const overlay = { backingPath: '/srv/layer.qcow2', inode };
    const runId = newId<RunId>();
    await removeOverlay(publishedRow({}, { imagePath, overlay: { ...overlay, inode: null } }));
    await removeOverlay(publishedRow({}, { imagePath, overlay: { ...overlay, inode: `${inode}0` } }));
    await removeOverlay(
      publishedRow({}, { imagePath, overlay, materialization: { state: 'completed', runId } }),
    );
    await removeOverlay(publishedRow({}, { imagePath }));
    expect(await isThere()).toBe(true);
    await removeOverlay(
      publishedRow({}, { imagePath, overlay, materialization: { state: 'failed', runId } }),
    );
    expect(await isThere()).toBe(false);
    await removeOverlay(publishedRow({}, { imagePath, overlay }));
  });
});

describe('the reaper', () => {
  const remains = async ({ id }: ExportRow) => (await context.db.exports.get(id)) !== null;
  const reap = (deadWorkerIds: string[] = []) => reapExports(context, deadWorkerIds);

  it('removes what has expired, and nothing before that', async () => {
    const expiring = await lab.insert({ expiresAt: time(500) });
    const lasting = await lab.insert();
    lab.clock.nowMs += 499;
    await reap();
    expect([await remains(expiring), await remains(lasting)]).toEqual([true, true]);
    lab.clock.nowMs += 1;
    await reap();
    expect([await remains(expiring), await remains(lasting)]).toEqual([false, true]);
  });

  it('removes what nobody goes on publishing', async () => {
    const late = await lab.insert({ state: 'publishing' });
    const ofDead = await lab.insert({ state: 'publishing', createdAt: time(5000) }, { workerId: 'dead' });
    const under = await lab.insert({ state: 'publishing', createdAt: time(5000) });
    lab.clock.nowMs += 3 * PUBLISH_TIMEOUT_MS;
    await reap();
    expect([await remains(late), await remains(ofDead), await remains(under)]).toEqual([true, true, true]);
    lab.clock.nowMs += 1;
    await reap(['dead']);
    expect([await remains(late), await remains(ofDead), await remains(under)]).toEqual([false, false, true]);
  });

  it('finishes removals, with the file', async () => {
    const half = await lab.insert({ state: 'removing' });
    await createExportFile(context.settings.exports.directory, definitionOf(half));
    await reap();
    expect(await remains(half)).toBe(false);
    expect(await readdir(context.settings.exports.directory)).toEqual([]);
  });

  it('removes exports of pushes when their run has ended, or is not there', async () => {
    const runs = ['running', 'queued', 'failed'].map((state) => runRow({ state }));
    for (const run of runs) await context.db.runs.insert(run, { turn: 'none' });
    const exports = [];
    for (const runId of [...runs.map(({ id }) => id), newId<RunId>()]) {
      exports.push(await lab.insert({ kind: 'push', runId }));
    }
    await reap();
    expect(await Promise.all(exports.map(remains))).toEqual([true, true, false, false]);
  });

  it('leaves an expired export alone while it is materialized', async () => {
    const run = runRow({ state: 'running', kind: 'materialize', workerId: 'w' });
    await context.db.runs.insert(run, { turn: 'none' });
    const facts = { materialization: { state: 'running' as const, runId: run.id } };
    const expired = await lab.insert({ expiresAt: time(0) }, facts);
    await reap();
    expect(await remains(expired)).toBe(true);
    await context.db.runs.end(run.id, 'w', { state: 'failed', at: time(1), error: null, result: null });
    await reap();
    expect(await remains(expired)).toBe(false);
  });
});
