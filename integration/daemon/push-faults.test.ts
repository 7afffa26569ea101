import { readFile } from 'node:fs/promises';
import path from 'node:path';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import type { RunView } from '../../src/engine/types.js';
import { pollUntil } from '../../src/lib/deadline.js';
import { KIB, MIB } from '../../src/lib/units.js';
import { connect } from '../exportd/rig.js';
import { makeRaw, seededBytes } from '../lab/disk-image.js';
import { mountTmpfs, type LabTmpfs } from '../lab/tmpfs.js';
import { killDaemon } from './crash.js';
import { setUp, type Setup } from './daemon.js';
import {
  hashLayers,
  isServed,
  restartExportd,
  restartHoldfastd,
  startExportRig,
  stopExportRig,
  waitForNoExports,
  type ExportRig,
} from './export-rig.js';
import {
  complete,
  expectPushFailed,
  expectPushGone,
  expectSoundRepository,
  finish,
  nbdcopy,
  pushDisk,
  report,
  requestPush,
  startPush,
  tryComplete,
  uriOf,
  writeAt,
} from './push-rig.js';
import { expectNothingLeft, expectReadsBack, listPoints } from './rig.js';

const SIZE = 8 * MIB;
const SILENCE_MS = 3000;
const POLL = { timeoutMs: 20_000, intervalMs: 50 };

let rig: ExportRig;
let setup: Setup;
let file: string;
let machines = 0;
beforeAll(async () => {
  rig = await startExportRig({
    settings: {
      push: { silenceMs: SILENCE_MS },
      runs: { stalledAfterMs: 1000, failStalledAfterMs: 2000, attempts: 1 },
    },
  });
  file = rig.lab.file('disk.raw');
  await makeRaw({ path: file, sizeBytes: SIZE, regions: [{ offset: 64 * KIB, length: 2 * MIB }] });
});
afterAll(async () => {
  await stopExportRig(rig);
});
beforeEach(async () => {
  machines += 1;
  setup = await setUp(rig.daemon, {
    root: rig.lab.file(`repository-${machines}`),
    vmName: `machine-${machines}`,
    disks: [{ name: 'root', source: pushDisk(SIZE) }],
  });
});

const getRun = (id: string): Promise<RunView> => rig.daemon.expect<RunView>(200, 'GET', `/runs/${id}`);

describe('an agent of a pushed backup', () => {
  it('that is silent fails the run, and nothing of it is left', async () => {
    const pushed = await startPush(rig.daemon, setup);
    await nbdcopy(file, uriOf(pushed, 'root'));
    await using client = await connect(uriOf(pushed, 'root'));
    const run = await expectPushFailed(rig, setup, { run: pushed.run, code: 'PUSH_SILENT' });
    expect(run.error?.details).toEqual({ silenceMs: SILENCE_MS });
    await expect(client.pwrite(0, seededBytes(1, 4096))).rejects.toThrow();
    expect((await report(rig.daemon, pushed, { root: {} })).body).toMatchObject({ code: 'RUN_NOT_ACTIVE' });
    expect((await tryComplete(rig.daemon, pushed, 'root', { changeId: 'a' })).body).toMatchObject({
      code: 'RUN_NOT_ACTIVE',
    });
  });

  it('that says the same for long is shown as stalled and waited for', async () => {
    const pushed = await startPush(rig.daemon, setup);
    const endMs = Date.now() + 2 * SILENCE_MS;
    let stalled = false;
    while (Date.now() < endMs) {
      const answer = await report(rig.daemon, pushed, { root: { totalBytes: SIZE, bytesRead: 4096 } });
      expect(answer.status, JSON.stringify(answer.body)).toBe(200);
      stalled ||= (await getRun(pushed.run.id)).isStalled;
      await new Promise((resolve) => setTimeout(resolve, 200));
    }
    expect(stalled).toBe(true);
    await nbdcopy(file, uriOf(pushed, 'root'));
    await finish(rig.daemon, pushed, 'late');
    await expectReadsBack(rig, pushed.pointId, { root: file });
  });

  it('learns that the run was cancelled, and cannot write any more', async () => {
    const pushed = await startPush(rig.daemon, setup);
    await using client = await connect(uriOf(pushed, 'root'));
    await client.pwrite(0, seededBytes(1, 4096));
    const askedMs = Date.now();
    await rig.daemon.expect(202, 'POST', `/runs/${pushed.run.id}/cancel`);
    const said = await report(rig.daemon, pushed, { root: {} });
    expect(
      said.status === 200 ? (said.body as RunView).isCancelRequested : (said.body as { code: string }).code,
    ).toSatisfy((word: unknown) => word === true || word === 'RUN_NOT_ACTIVE');
    await expectPushFailed(rig, setup, { run: pushed.run, state: 'cancelled', code: 'CANCELLED' });
    expect(Date.now() - askedMs).toBeLessThan(5000);
    await expect(client.pwrite(0, seededBytes(2, 4096))).rejects.toThrow();
    expect(await isServed(uriOf(pushed, 'root'))).toBe(false);
    expect((await report(rig.daemon, pushed, { root: {} })).body).toMatchObject({ code: 'RUN_NOT_ACTIVE' });
  });

  it('that writes on after it completed reaches nothing: the point is what was complete', async () => {
    const pushed = await startPush(rig.daemon, setup);
    const uri = uriOf(pushed, 'root');
    await nbdcopy(file, uri);
    await using client = await connect(uri);
    let written = 0;
    let refused = false;
    // Bytes that the disk has there anyway: what gets through before the end is allowed to.
    const data = (await readFile(file)).subarray(64 * KIB, 128 * KIB);
    const writing = (async () => {
      while (!refused) {
        try {
          await client.pwrite(64 * KIB, data);
          written += 1;
        } catch {
          refused = true;
        }
      }
    })();
    await complete(rig.daemon, pushed, 'root', { changeId: 'a' });
    await writing;
    expect(written).toBeGreaterThan(0);
    await expect(client.pwrite(0, seededBytes(9, 4096))).rejects.toThrow();
    expect(await rig.daemon.waitForRun(pushed.run.id)).toMatchObject({ state: 'completed' });
    const committed = await hashLayers(rig.daemon, pushed.pointId);
    expect(await isServed(uri)).toBe(false);
    await expectPushGone(rig, setup);
    await expectReadsBack(rig, pushed.pointId, { root: file });
    await expectSoundRepository(rig.daemon, setup);
    expect(await hashLayers(rig.daemon, pushed.pointId)).toBe(committed);
  });
});

describe('a pushed backup without its export daemon', () => {
  it('fails, and leaves nothing', async () => {
    await rig.exportd.stop();
    const run = await requestPush(rig.daemon, setup);
    expect(run).toMatchObject({ state: 'failed', error: { code: 'EXPORT_DAEMON_UNAVAILABLE' } });
    await expectNothingLeft(rig, setup.repository.root);
    await restartExportd(rig);
    await expectPushGone(rig, setup);
    const pushed = await startPush(rig.daemon, setup);
    await nbdcopy(file, uriOf(pushed, 'root'));
    await finish(rig.daemon, pushed, 'then');
  });

  it('goes on when that was killed and is back: its layers are there again', async () => {
    const pushed = await startPush(rig.daemon, setup);
    await writeAt(uriOf(pushed, 'root'), 4 * MIB, seededBytes(1, 64 * KIB));
    await rig.exportd.kill();
    expect(await isServed(uriOf(pushed, 'root'))).toBe(false);
    expect((await report(rig.daemon, pushed, { root: {} })).status).toBe(200);
    await restartExportd(rig);
    await nbdcopy(file, uriOf(pushed, 'root'));
    await finish(rig.daemon, pushed, 'again');
    await expectPushGone(rig, setup);
    await expectReadsBack(rig, pushed.pointId, { root: file });
    await expectSoundRepository(rig.daemon, setup);
  });

  it('goes on when the storage daemon is killed under the agent', async () => {
    const pushed = await startPush(rig.daemon, setup);
    const uri = uriOf(pushed, 'root');
    await writeAt(uri, 4 * MIB, seededBytes(1, 64 * KIB));
    for (const { pid } of (await rig.exportd.status()).listeners)
      if (pid !== null) process.kill(pid, 'SIGKILL');
    await pollUntil(async () => ((await isServed(uri)) ? true : undefined), {
      ...POLL,
      what: 'the layer being offered again',
    });
    await nbdcopy(file, uri);
    await finish(rig.daemon, pushed, 'again');
    await expectReadsBack(rig, pushed.pointId, { root: file });
    await expectSoundRepository(rig.daemon, setup);
  });

  it('commits when the agent was done before the export daemon was killed', async () => {
    const pushed = await startPush(rig.daemon, setup);
    await nbdcopy(file, uriOf(pushed, 'root'));
    await rig.exportd.kill();
    await finish(rig.daemon, pushed, 'done');
    await restartExportd(rig);
    await expectPushGone(rig, setup);
    await expectReadsBack(rig, pushed.pointId, { root: file });
  });
});

describe('holdfastd going away during a pushed backup', () => {
  it.each([
    ['killed', (): Promise<void> => killDaemon(rig)],
    ['stopped', (): Promise<void> => rig.daemon.stop()],
  ])(
    '%s: the run is interrupted, exports and layers are gone, and the next push is the first',
    async (how, end) => {
      const pushed = await startPush(rig.daemon, setup);
      const uri = uriOf(pushed, 'root');
      await using client = await connect(uri);
      await client.pwrite(0, seededBytes(1, 4096));
      await end();
      // The export daemon does not need it.
      expect(await isServed(uri)).toBe(how === 'killed');
      await restartHoldfastd(rig);
      await expectPushFailed(rig, setup, { run: pushed.run, state: 'interrupted', code: 'INTERRUPTED' });
      await expect(client.pwrite(0, seededBytes(2, 4096))).rejects.toThrow();
      expect((await report(rig.daemon, pushed, { root: {} })).body).toMatchObject({ code: 'RUN_NOT_ACTIVE' });
      const next = await startPush(rig.daemon, setup);
      expect(next.push.disks).toMatchObject([{ method: 'full', reason: { code: 'FIRST_POINT' } }]);
      await nbdcopy(file, uriOf(next, 'root'));
      await finish(rig.daemon, next, 'next');
      await expectReadsBack(rig, next.pointId, { root: file });
    },
  );

  it('killed together with the export daemon: nothing of the push comes back', async () => {
    const pushed = await startPush(rig.daemon, setup);
    await killDaemon(rig);
    await rig.exportd.kill();
    await restartHoldfastd(rig);
    await restartExportd(rig);
    await waitForNoExports(rig);
    await expectPushFailed(rig, setup, { run: pushed.run, state: 'interrupted', code: 'INTERRUPTED' });
  });
});

describe('a repository that fills up during a pushed backup', () => {
  let storage: LabTmpfs;
  afterEach(async () => {
    await storage[Symbol.asyncDispose]();
  });

  it('fails the run and gives the space back', async () => {
    const { daemon, lab } = rig;
    storage = await mountTmpfs({ path: lab.file('small'), sizeBytes: 64 * MIB });
    const root = path.join(storage.path, 'small');
    const small = await setUp(daemon, {
      root,
      vmName: 'small',
      disks: [{ name: 'root', source: pushDisk(256 * MIB) }],
    });
    const pushed = await startPush(daemon, small);
    await using client = await connect(uriOf(pushed, 'root'));
    let offset = 0;
    const data = seededBytes(1, MIB);
    const fill = async (): Promise<void> => {
      for (; offset < 256 * MIB; offset += MIB) await client.pwrite(offset, data);
    };
    await expect(fill()).rejects.toThrow();
    await expectPushFailed(rig, small, { run: pushed.run, code: 'REPOSITORY_FULL' });
    expect(await listPoints(daemon, small)).toEqual([]);
    const { capacity } = await daemon.expect<{ capacity: { freeBytes: number } }>(
      200,
      'GET',
      `/repositories/${small.repository.id}`,
    );
    expect(capacity.freeBytes).toBeGreaterThan(60 * MIB);
    await daemon.expect(204, 'DELETE', `/vms/${small.vm.id}`);
  });
});
