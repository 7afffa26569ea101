import { rename, rm } from 'node:fs/promises';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';
import type { ExportView, OperationView, RunView } from '../../src/engine/types.js';
import { readExportFile } from '../../src/exports/index.js';
import { pollUntil } from '../../src/lib/deadline.js';
import { MIB } from '../../src/lib/units.js';
import { connect, fileOf } from '../exportd/rig.js';
import { expectCleanImage, exportRaw, firstDifference, makeRaw, qemuImg, qemuIo } from '../lab/disk-image.js';
import { startSlowFile } from '../lab/slow-file.js';
import { killDaemon } from './crash.js';
import { backUp, setUp, type Setup } from './daemon.js';
import {
  exportFiles,
  hashLayers,
  isServed,
  listed,
  publish,
  restartExportd,
  restartHoldfastd,
  show,
  startExportRig,
  stopExportRig,
  topLayer,
  type ExportRig,
} from './export-rig.js';
import { imageDisk } from './rig.js';

/** Not whole sectors. */
const DISK_BYTES = 16 * MIB + 100;
const REGION = { offset: MIB, length: 15 * MIB };

describe('a writable export that is made to stand alone', () => {
  let rig: ExportRig;
  let setup: Setup;
  let point: string;

  beforeAll(async () => {
    rig = await startExportRig();
    const { lab, daemon } = rig;
    await makeRaw({ path: lab.file('disk.raw'), sizeBytes: DISK_BYTES, regions: [REGION] });
    const disks = [{ name: 'disk', source: imageDisk(lab.file('disk.raw')) }];
    setup = await setUp(daemon, { root: lab.file('repository'), disks });
    point = (await backUp(daemon, setup)).pointId ?? '';
  });
  afterEach(async () => {
    for (const { id } of await listed(rig.daemon)) await rig.daemon.request('DELETE', `/exports/${id}`);
  });
  afterAll(async () => {
    await stopExportRig(rig);
  });

  const writable = (more: Record<string, unknown> = {}) =>
    publish(rig.daemon, { pointId: point, isReadOnly: false, ...more });
  const materialize = ({ id }: ExportView) =>
    rig.daemon.expect<OperationView>(202, 'POST', `/exports/${id}/materialize`);
  const operation = ({ id }: OperationView) =>
    rig.daemon.expect<OperationView>(200, 'GET', `/operations/${id}`);
  const cancel = ({ id }: OperationView) => rig.daemon.expect(202, 'POST', `/runs/${id}/cancel`);
  const inFile = async ({ name }: ExportView) =>
    (await readExportFile(rig.exportd.exportsDirectory, name))?.materialize;
  const inStatus = async ({ name }: ExportView) =>
    fileOf(await rig.exportd.status(), `${name}.conf`).materialize?.state ?? null;

  function until(wanted: OperationView, isThere: (now: OperationView) => boolean): Promise<OperationView> {
    return pollUntil(
      async () => {
        const now = await operation(wanted);
        if (isThere(now)) return now;
        if (now.endedAt !== null) throw new Error(`it ended as ${JSON.stringify(now)}`);
        return undefined;
      },
      { timeoutMs: 25_000, intervalMs: 50, what: `operation ${wanted.id}` },
    );
  }
  const untilEnded = (wanted: OperationView) => until(wanted, ({ endedAt }) => endedAt !== null);
  const untilBegun = (wanted: OperationView) => until(wanted, ({ share }) => (share ?? 0) > 0.1);

  /** The point's layer takes `seconds` to be read, until this is disposed of. */
  async function slowDown(seconds: number): Promise<AsyncDisposable> {
    const layer = await topLayer(rig.daemon, point);
    const content = rig.lab.file('layer.qcow2');
    await rename(layer, content);
    const bytesPerSecond = Math.round(REGION.length / seconds);
    const slow = await startSlowFile({ content, file: layer, bytesPerSecond });
    return {
      [Symbol.asyncDispose]: async () => {
        await slow[Symbol.asyncDispose]();
        await rename(content, layer);
      },
    };
  }

  async function backingOf(image: string): Promise<string | undefined> {
    const info = await qemuImg(['info', '-U', '-f', 'qcow2', '--output=json', image]);
    return (JSON.parse(info) as { 'backing-filename'?: string })['backing-filename'];
  }

  /** The point, with these commands of qemu-io on top, is what the image or URI holds. */
  async function expectContent(
    from: { path: string; format: 'raw' | 'qcow2' },
    commands: readonly string[],
  ): Promise<void> {
    const [expected, copy] = [rig.lab.file('expected.raw'), rig.lab.file('copy.raw')];
    // Whole sectors, as a disk has.
    await exportRaw(rig.lab.file('disk.raw'), 'raw', expected);
    await qemuIo({ path: expected, format: 'raw', commands });
    await exportRaw(from.path, from.format, copy);
    expect(await firstDifference(copy, expected)).toBeNull();
    await rm(copy);
    await rm(expected);
  }

  it('holds the point and all that was written before, meanwhile and after; then it needs the point no more', async () => {
    const before = await hashLayers(rig.daemon, point);
    const made = await writable({ ttlSeconds: 3600 });
    const [uri] = made.uris as [string];
    const written = ['write -P 0x11 2M 64k', 'write -z 4M 1M', 'write -P 0x12 16M 512'];
    await qemuIo({ path: uri, format: 'raw', commands: written });
    await using client = await connect(made.uris[1]!);
    let asked: OperationView;
    {
      await using _slow = await slowDown(3);
      await rig.exportd.stop();
      await restartExportd(rig);
      await using writer = await connect(uri);
      asked = await materialize(made);
      expect(asked).toMatchObject({ kind: 'materialize', subjectId: made.id, endedAt: null, error: null });
      await untilBegun(asked);
      const again = await rig.daemon.request('POST', `/exports/${made.id}/materialize`);
      expect([again.status, again.body]).toMatchObject([
        409,
        { code: 'CONFLICT', details: { runId: asked.id } },
      ]);
      const removal = await rig.daemon.request('DELETE', `/exports/${made.id}`);
      expect([removal.status, removal.body]).toMatchObject([409, { details: { runId: asked.id } }]);
      const refused = await rig.daemon.request('DELETE', `/backups/${point}`);
      expect(refused.body).toMatchObject({ code: 'POINT_IN_USE' });
      let round = 0;
      const shares: number[] = [];
      for (let now = asked; now.endedAt === null; now = await operation(asked)) {
        const at = 5 * MIB + (round % 64) * 65_536;
        await writer.pwrite(at, Buffer.alloc(512, (round % 200) + 1));
        written.push(`write -P ${(round % 200) + 1} ${at} 512`);
        shares.push(now.share ?? 0);
        round += 1;
      }
      expect(round).toBeGreaterThan(10);
      expect(shares.filter((share) => share > 0.1 && share < 0.95).length).toBeGreaterThan(2);
    }
    expect(await untilEnded(asked)).toMatchObject({
      ...{ state: 'completed', share: 1, error: null },
      result: { kind: 'materialize', exportId: made.id, imagePath: made.imagePath },
    });
    expect(await show(rig.daemon, made.id)).toMatchObject({
      ...{ expiresAt: null, problem: null, materialization: { state: 'completed', runId: asked.id } },
    });
    await qemuIo({ path: uri, format: 'raw', commands: ['write -P 0x33 0 64k'] });
    written.push('write -P 0x33 0 64k');
    expect(await hashLayers(rig.daemon, point)).toBe(before);
    const { id } = await rig.daemon.expect<RunView>(202, 'DELETE', `/backups/${point}`);
    expect((await rig.daemon.waitForRun(id)).state).toBe('completed');
    await expectContent({ path: uri, format: 'raw' }, written);
    await rig.daemon.expect(204, 'DELETE', `/exports/${made.id}`);
    expect([await exportFiles(rig), await isServed(uri)]).toEqual([[], false]);
    expect(await backingOf(made.imagePath)).toBeUndefined();
    await expectCleanImage(made.imagePath);
    await expectContent({ path: made.imagePath, format: 'qcow2' }, written);
    await rm(made.imagePath);
    await expect(client.pread(0, 512)).rejects.toThrow();
    point = (await backUp(rig.daemon, setup)).pointId ?? '';
  });

  it('is refused where there is no overlay, and where it is done', async () => {
    const reader = await publish(rig.daemon, { pointId: point });
    await rig.daemon.expect(409, 'POST', `/exports/${reader.id}/materialize`);
    const made = await writable({ overlayPath: rig.lab.file('mine.qcow2') });
    expect((await untilEnded(await materialize(made))).state).toBe('completed');
    await rig.daemon.expect(409, 'POST', `/exports/${made.id}/materialize`);
    await rig.daemon.expect(404, 'GET', `/operations/${point}`);
    const { items } = await rig.daemon.expect<{ items: RunView[] }>(200, 'GET', '/runs?kind=backup');
    await rig.daemon.expect(404, 'GET', `/operations/${items[0]!.id}`);
    await rig.daemon.expect(204, 'DELETE', `/exports/${made.id}`);
    await expectContent({ path: made.imagePath, format: 'qcow2' }, []);
    await rm(made.imagePath);
  });

  it('when it is cancelled the export goes on as it was, and can be removed with its overlay', async () => {
    await using _slow = await slowDown(60);
    const made = await writable();
    await using client = await connect(made.uris[0]!);
    await client.pwrite(0, Buffer.alloc(65_536, 0x21));
    const asked = await materialize(made);
    await pollUntil(async () => ((await inStatus(made)) === 'running' ? true : undefined), {
      timeoutMs: 10_000,
      what: 'the export daemon beginning',
    });
    expect(await inFile(made)).toBe(true);
    await cancel(asked);
    expect(await untilEnded(asked)).toMatchObject({ state: 'cancelled', error: { code: 'CANCELLED' } });
    expect([await inFile(made), await inStatus(made)]).toEqual([false, null]);
    expect(await show(rig.daemon, made.id)).toMatchObject({
      ...{ problem: null, materialization: { state: 'failed', runId: asked.id } },
    });
    expect(await backingOf(made.imagePath)).toBe(await topLayer(rig.daemon, point));
    expect((await client.pread(0, 4096)).equals(Buffer.alloc(4096, 0x21))).toBe(true);
    await rig.daemon.expect(204, 'DELETE', `/exports/${made.id}`);
    await expect(qemuImg(['info', '-f', 'qcow2', made.imagePath])).rejects.toThrow();
  });

  it('storage that fails under it fails the operation, with the reason', async () => {
    const made = await writable();
    let asked: OperationView;
    {
      await using _slow = await slowDown(30);
      await rig.exportd.stop();
      await restartExportd(rig);
      asked = await materialize(made);
      await pollUntil(async () => ((await inStatus(made)) === 'running' ? true : undefined), {
        timeoutMs: 10_000,
        what: 'the export daemon beginning',
      });
    }
    expect(await untilEnded(asked)).toMatchObject({ state: 'failed', error: { code: 'EXPORT_REFUSED' } });
    expect([await inFile(made), await inStatus(made)]).toEqual([false, null]);
    await rig.exportd.stop();
    await restartExportd(rig);
    expect((await untilEnded(await materialize(made))).state).toBe('completed');
    await rig.daemon.expect(204, 'DELETE', `/exports/${made.id}`);
    await expectContent({ path: made.imagePath, format: 'qcow2' }, []);
    await rm(made.imagePath);
  });

  it('goes on when the export daemon comes back from being killed', async () => {
    await using _slow = await slowDown(3);
    const made = await writable();
    const asked = await materialize(made);
    await untilBegun(asked);
    await rig.exportd.kill();
    expect((await operation(asked)).state).toBe('running');
    await restartExportd(rig);
    expect((await untilEnded(asked)).state).toBe('completed');
    await rig.daemon.expect(204, 'DELETE', `/exports/${made.id}`);
    await expectContent({ path: made.imagePath, format: 'qcow2' }, []);
    await rm(made.imagePath);
  });

  it('holdfastd killed meanwhile: the export daemon finishes, and the next start says so', async () => {
    await using _slow = await slowDown(3);
    const made = await writable();
    const asked = await materialize(made);
    await untilBegun(asked);
    await killDaemon(rig);
    await pollUntil(async () => ((await inStatus(made)) === 'completed' ? true : undefined), {
      timeoutMs: 15_000,
      what: 'the image standing alone',
    });
    await restartHoldfastd(rig);
    expect(await operation(asked)).toMatchObject({
      state: 'completed',
      result: { imagePath: made.imagePath },
    });
    expect((await show(rig.daemon, made.id)).materialization?.state).toBe('completed');
    await rig.daemon.expect(204, 'DELETE', `/exports/${made.id}`);
    await expectContent({ path: made.imagePath, format: 'qcow2' }, []);
    await rm(made.imagePath);
  });

  it('holdfastd killed long before the end: the operation is interrupted, the export stays as it was', async () => {
    await using _slow = await slowDown(120);
    const made = await writable();
    await using client = await connect(made.uris[0]!);
    await client.pwrite(0, Buffer.alloc(65_536, 0x31));
    const asked = await materialize(made);
    await pollUntil(async () => ((await inStatus(made)) === 'running' ? true : undefined), {
      timeoutMs: 10_000,
      what: 'the export daemon beginning',
    });
    await killDaemon(rig);
    await restartHoldfastd(rig);
    expect(await operation(asked)).toMatchObject({ state: 'interrupted', error: { code: 'INTERRUPTED' } });
    expect([await inFile(made), await inStatus(made)]).toEqual([false, null]);
    expect((await client.pread(0, 4096)).equals(Buffer.alloc(4096, 0x31))).toBe(true);
    const again = await materialize(made);
    await pollUntil(async () => ((await inStatus(made)) === 'running' ? true : undefined), {
      timeoutMs: 10_000,
      what: 'the export daemon beginning again',
    });
    await cancel(again);
    expect((await untilEnded(again)).state).toBe('cancelled');
  });
});
