import { copyFile, rm, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';
import { openDatabase, type ExportRow } from '../../src/db/index.js';
import type { ExportFacts } from '../../src/engine/export-record.js';
import type { ExportView } from '../../src/engine/types.js';
import { formatExportFile } from '../../src/exports/index.js';
import { systemClock, toTimestamp } from '../../src/lib/clock.js';
import { pollUntil } from '../../src/lib/deadline.js';
import { newId, type ExportId, type PointId } from '../../src/lib/id.js';
import { silentLogger } from '../../src/lib/log.js';
import { MIB } from '../../src/lib/units.js';
import { connect, definition, fileOf, reads } from '../exportd/rig.js';
import { makeQcow2, makeRaw } from '../lab/disk-image.js';
import { startQemuNbd } from '../lab/nbd-server.js';
import { killDaemon } from './crash.js';
import { backUp, setUp } from './daemon.js';
import {
  expectNoExports,
  exportFiles,
  filesBelow,
  isServed,
  listed,
  publish,
  restartExportd,
  restartHoldfastd,
  show,
  startExportRig,
  stopExportRig,
  topLayer,
  waitForNoExports,
  type ExportRig,
} from './export-rig.js';
import { imageDisk } from './rig.js';

const DISK_BYTES = 4 * MIB;
/** Of somebody else, in our directory. */
const FOREIGN = 'hand-made.conf';

describe('exports when something goes wrong', () => {
  let rig: ExportRig;
  let point: string;

  beforeAll(async () => {
    rig = await startExportRig({ settings: { exports: { publishTimeoutMs: 2000 } } });
    const { lab, daemon, exportd } = rig;
    await makeRaw({
      path: lab.file('disk.raw'),
      sizeBytes: DISK_BYTES,
      regions: [{ offset: 0, length: MIB }],
    });
    const disks = [{ name: 'disk', source: imageDisk(lab.file('disk.raw')) }];
    const setup = await setUp(daemon, { root: lab.file('repository'), disks });
    point = (await backUp(daemon, setup)).pointId ?? '';
    await makeQcow2({ path: lab.file('foreign.qcow2'), sizeBytes: MIB });
    await exportd.write(FOREIGN, definition('hand-made', lab.file('foreign.qcow2')));
    await exportd.reload();
  });
  afterEach(async () => {
    // A test that failed may have left it standing still.
    process.kill(rig.exportd.pid, 'SIGCONT');
    expect(await isServed(rig.exportd.tcp('hand-made'))).toBe(true);
    for (const { id } of await listed(rig.daemon)) await remove(id);
    for (const file of await exportFiles(rig)) if (file !== FOREIGN) await rig.exportd.remove(file);
    await rig.exportd.reload();
  });
  afterAll(async () => {
    await stopExportRig(rig);
  });

  const post = (more: Record<string, unknown> = {}) =>
    rig.daemon.request('POST', '/exports', { pointId: point, ...more });
  const remove = (id: string) => rig.daemon.request('DELETE', `/exports/${id}`);
  const confOf = ({ name }: Pick<ExportView, 'name'>) => `${name}.conf`;

  it('without an export daemon nothing is published, and nothing is left', async () => {
    await rig.exportd.stop();
    const refused = await post({ isReadOnly: false });
    expect([refused.status, refused.body]).toMatchObject([503, { code: 'EXPORT_DAEMON_UNAVAILABLE' }]);
    expect(await rig.daemon.expect(200, 'GET', '/exports/daemon')).toMatchObject({
      ...{ isRunning: false, status: null, problem: { code: 'EXPORT_DAEMON_UNAVAILABLE' } },
    });
    await restartExportd(rig);
    await expectNoExports(rig, [FOREIGN]);
    await publish(rig.daemon, { pointId: point });
    await rig.exportd.kill();
    expect(await rig.daemon.expect(200, 'GET', '/exports/daemon')).toMatchObject({
      ...{
        isRunning: false,
        status: { pid: rig.exportd.pid },
        problem: { code: 'EXPORT_DAEMON_UNAVAILABLE' },
      },
    });
    await restartExportd(rig);
  });

  it('an image that another holds for writing is refused with the reason, and nothing is left', async () => {
    const image = await topLayer(rig.daemon, point);
    await using _holder = await startQemuNbd({
      image,
      format: 'qcow2',
      socketPath: rig.lab.file('holder.sock'),
    });
    for (const isReadOnly of [true, false]) {
      const { status, body } = await post({ isReadOnly });
      expect([status, body]).toMatchObject([
        409,
        { code: 'EXPORT_REFUSED', detail: expect.stringMatching(/lock/i) as string, details: { reason: {} } },
      ]);
    }
    await expectNoExports(rig, [FOREIGN]);
  });

  it('an image that is gone is an error, not an export', async () => {
    const image = await topLayer(rig.daemon, point);
    const made = await publish(rig.daemon, { pointId: point });
    await copyFile(image, rig.lab.file('kept'));
    await rm(image);
    await rig.exportd.stop();
    await restartExportd(rig);
    expect(await show(rig.daemon, made.id)).toMatchObject({
      ...{ state: 'published', uris: [], problem: { code: 'EXPORT_REFUSED' } },
    });
    expect((await remove(made.id)).status).toBe(204);
    const { status, body } = await post();
    expect([status, body]).toMatchObject([409, { code: 'LAYER_NOT_FOUND' }]);
    await copyFile(rig.lab.file('kept'), image);
    await expectNoExports(rig, [FOREIGN]);
  });

  it('an export daemon that stands still: published or removed later, or not at all, but never half', async () => {
    const made = await publish(rig.daemon, { pointId: point });
    process.kill(rig.exportd.pid, 'SIGSTOP');
    const refused = await post({ isReadOnly: false });
    expect([refused.status, refused.body]).toMatchObject([503, { code: 'EXPORT_DAEMON_UNAVAILABLE' }]);
    const removal = await remove(made.id);
    expect([removal.status, removal.body]).toMatchObject([503, { code: 'EXPORT_DAEMON_UNAVAILABLE' }]);
    expect(await exportFiles(rig)).toEqual([FOREIGN]);
    expect((await listed(rig.daemon)).map(({ state }) => state)).toEqual(['removing', 'removing']);
    expect(await isServed(made.uris[0]!)).toBe(true);
    process.kill(rig.exportd.pid, 'SIGCONT');
    await waitForNoExports(rig, [FOREIGN]);
    expect(await isServed(made.uris[0]!)).toBe(false);
  });

  it('an export outlives holdfastd, and the export daemon that serves it', async () => {
    const made = await publish(rig.daemon, { pointId: point, isReadOnly: false });
    await using client = await connect(made.uris[0]!);
    await client.pwrite(0, Buffer.alloc(MIB, 0x42));
    await killDaemon(rig);
    await client.flush();
    expect((await client.pread(0, 4096)).equals(Buffer.alloc(4096, 0x42))).toBe(true);
    await restartHoldfastd(rig);
    expect(await show(rig.daemon, made.id)).toEqual(made);
    await rig.exportd.kill();
    const away = await show(rig.daemon, made.id);
    expect(away).toMatchObject({ uris: [], problem: { code: 'EXPORT_DAEMON_UNAVAILABLE' } });
    await restartExportd(rig);
    expect(await show(rig.daemon, made.id)).toEqual(made);
    expect(await reads(made.uris[0]!, 0x42)).toBe(true);
    expect((await remove(made.id)).status).toBe(204);
    await expectNoExports(rig, [FOREIGN]);
  });

  it('an export can be removed while no export daemon runs, and is not served afterwards', async () => {
    const made = await publish(rig.daemon, { pointId: point, isReadOnly: false });
    await rig.exportd.kill();
    expect((await remove(made.id)).status).toBe(204);
    expect(await exportFiles(rig)).toEqual([FOREIGN]);
    await restartExportd(rig);
    await expectNoExports(rig, [FOREIGN]);
    expect(await isServed(made.uris[0]!)).toBe(false);
  });

  it.each(['publishing', 'removing'] as const)(
    'holdfastd killed while it is %s leaves nothing',
    async (what) => {
      const made =
        what === 'removing' ? await publish(rig.daemon, { pointId: point, isReadOnly: false }) : undefined;
      process.kill(rig.exportd.pid, 'SIGSTOP');
      // It ends with the daemon.
      const asked = (made === undefined ? post({ isReadOnly: false }) : remove(made.id)).catch(
        () => 'cut off',
      );
      await pollUntil(
        async () => {
          const [row] = await listed(rig.daemon);
          const isWritten = (await exportFiles(rig)).length === (what === 'publishing' ? 2 : 1);
          return row?.state === what && isWritten ? true : undefined;
        },
        { timeoutMs: 5000, what: `an export ${what}` },
      );
      await killDaemon(rig);
      expect(await asked).toBe('cut off');
      expect(await filesBelow(rig.overlayDirectory)).toHaveLength(1);
      process.kill(rig.exportd.pid, 'SIGCONT');
      await restartHoldfastd(rig);
      await waitForNoExports(rig, [FOREIGN]);
      await publish(rig.daemon, { pointId: point });
    },
  );

  it('finishes what a crash left at any other step', async () => {
    const template = await publish(rig.daemon, { pointId: point, isReadOnly: false });
    const image = await topLayer(rig.daemon, point);
    await killDaemon(rig);
    const left = await rememberCrash(async (row) => {
      const facts = row.facts as ExportFacts;
      const overlayAt = (name: string) => ({
        imagePath: rig.lab.file(name),
        overlay: { backingPath: image, inode: null },
      });
      return [
        // Only the row; an overlay that somebody else has under the name; one that was not named yet.
        { ...row, name: 'row-only', state: 'publishing', facts: { ...facts, ...overlayAt('nothing.qcow2') } },
        { ...row, name: 'not-ours', state: 'publishing', facts: { ...facts, ...overlayAt('mine.qcow2') } },
        { ...row, name: 'begun', state: 'publishing', facts: { ...facts, ...overlayAt('begun.qcow2') } },
        // The name of the file is taken by somebody else; by us.
        { ...row, name: 'taken', state: 'publishing', facts: { ...facts, imagePath: image, overlay: null } },
        {
          ...row,
          name: 'written',
          state: 'publishing',
          facts: { ...facts, imagePath: image, overlay: null },
        },
        {
          ...row,
          name: 'half-removed',
          state: 'removing',
          facts: { ...facts, imagePath: image, overlay: null },
        },
      ];
    });
    await writeFile(rig.lab.file('mine.qcow2'), 'mine');
    await writeFile(rig.lab.file(`.holdfast-export-${left['begun']!}`), 'unfinished');
    const write = (name: string, imagePath: string) =>
      writeFile(
        path.join(rig.exportd.exportsDirectory, `${name}.conf`),
        formatExportFile(definition(name, imagePath)),
      );
    await write('taken', rig.lab.file('foreign.qcow2'));
    await write('written', image);
    await write('half-removed', image);
    await rig.exportd.reload();
    await restartHoldfastd(rig);
    await pollUntil(async () => ((await listed(rig.daemon)).length === 1 ? true : undefined), {
      timeoutMs: 15_000,
      intervalMs: 100,
      what: 'the reaper removing what a crash left',
    });
    expect(await show(rig.daemon, template.id)).toEqual(template);
    expect(await exportFiles(rig)).toEqual([confOf(template), FOREIGN, 'taken.conf'].sort());
    expect(await isServed(rig.exportd.tcp('taken'))).toBe(true);
    expect(await isServed(rig.exportd.tcp('written'))).toBe(false);
    const inLab = await filesBelow(rig.lab.path);
    expect(inLab).toContain('mine.qcow2');
    expect(inLab.filter((name) => name.startsWith('.holdfast-export-'))).toEqual([]);
    expect((await remove(template.id)).status).toBe(204);
    await expectNoExports(rig, [FOREIGN, 'taken.conf']);
  });

  it('a file of somebody else with the name of the export stays, and the export is refused', async () => {
    const made = await publish(rig.daemon, { pointId: point });
    expect((await remove(made.id)).status).toBe(204);
    await rig.exportd.write(confOf(made), definition(made.name, rig.lab.file('foreign.qcow2')));
    const { status, body } = await post();
    expect([status, body]).toMatchObject([409, { code: 'CONFLICT' }]);
    expect(fileOf(await rig.exportd.reload(), confOf(made)).sizeBytes).toBe(MIB);
    await expectNoExports(rig, [FOREIGN, confOf(made)]);
  });

  /** Puts rows into the database of the daemon that was killed, as it would have left them; answers ids by name. */
  async function rememberCrash(
    make: (row: ExportRow) => Promise<ExportRow[]>,
  ): Promise<Record<string, string>> {
    const file = path.join(rig.daemon.stateDirectory, 'holdfast.db');
    await using db = await openDatabase(
      { kind: 'sqlite', file },
      { logger: silentLogger(), clock: systemClock },
    );
    const [template] = await db.exports.listAll({ pointId: point as PointId });
    const ids: Record<string, string> = {};
    for (const row of await make(template!)) {
      const id = newId<ExportId>();
      ids[row.name] = id;
      await db.exports.insert({ ...row, id, createdAt: toTimestamp(Date.now() - 1000) });
    }
    return ids;
  }
});
