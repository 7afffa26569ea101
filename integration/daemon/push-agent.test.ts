import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { RunView } from '../../src/engine/types.js';
import { CLUSTER_BYTES, MIB } from '../../src/lib/units.js';
import { connect } from '../exportd/rig.js';
import { seededBytes } from '../lab/disk-image.js';
import { startExportRig, stopExportRig, type ExportRig } from './export-rig.js';
import {
  complete,
  digestOf,
  diskOf,
  expectPushFailed,
  nbdcopy,
  newMachine,
  startPush,
  tryComplete,
  uriOf,
  writeAt,
} from './push-rig.js';

/** Not whole sectors, and not whole clusters. */
const ROOT_BYTES = 8 * MIB + 1000;
const ALL = Array.from({ length: Math.ceil(ROOT_BYTES / CLUSTER_BYTES) }, (_value, cluster) => cluster);

let rig: ExportRig;
beforeAll(async () => {
  rig = await startExportRig();
});
afterAll(async () => {
  await stopExportRig(rig);
});

describe('what an agent says', () => {
  it('is held to the contract', async () => {
    const { setup, files } = await newMachine(rig, 'contract', { root: ROOT_BYTES });
    const { daemon } = rig;
    const pushed = await startPush(daemon, setup);
    const { diskId } = diskOf(pushed, 'root');
    await nbdcopy(files['root'] ?? '', uriOf(pushed, 'root'));
    const progress = (disk: Record<string, unknown>): ReturnType<typeof daemon.request> =>
      daemon.request('POST', `/backups/${pushed.pointId}/progress`, {
        disks: [
          { diskId, totalBytes: 0, bytesRead: 0, bytesWritten: 0, bytesZeroed: 0, bytesSkipped: 0, ...disk },
        ],
      });
    for (const wrong of [
      { bytesRead: -1 },
      { bytesRead: 1.5 },
      { bytesRead: 2 ** 60 },
      { bytesRead: '7' },
      { more: 1 },
    ]) {
      expect((await progress(wrong)).body, JSON.stringify(wrong)).toMatchObject({ code: 'INVALID_INPUT' });
    }
    const stranger = setup.vm.id;
    expect((await progress({ diskId: stranger })).body).toMatchObject({ code: 'NOT_FOUND' });
    // More than there is: an agent that wrote some of it twice.
    expect((await progress({ totalBytes: 2 ** 50, bytesRead: 2 ** 50 })).status).toBe(200);

    const zeroes = { bytesRead: 0, bytesWritten: 0, bytesZeroed: 0, bytesSkipped: 0 };
    expect((await tryComplete(daemon, pushed, 'root', {})).body).toMatchObject({ code: 'INVALID_INPUT' });
    expect((await tryComplete(daemon, pushed, 'root', { changeId: '' })).body).toMatchObject({
      code: 'INVALID_INPUT',
    });
    expect(
      (await tryComplete(daemon, pushed, 'root', { changeId: 'a', sumsDigest: 'x' })).body,
    ).toMatchObject({ code: 'INVALID_INPUT' });
    const wrongDisk = `/backups/${pushed.pointId}/disks/${stranger}/complete`;
    expect((await daemon.request('POST', wrongDisk, { changeId: 'a', ...zeroes })).body).toMatchObject({
      code: 'NOT_FOUND',
    });
    const wrongPoint = `/backups/${stranger}/disks/${diskId}/complete`;
    expect((await daemon.request('POST', wrongPoint, { changeId: 'a', ...zeroes })).body).toMatchObject({
      code: 'RUN_NOT_ACTIVE',
    });

    const answer = await complete(daemon, pushed, 'root', { changeId: 'a' });
    expect(await complete(daemon, pushed, 'root', { changeId: 'a' })).toEqual(answer);
    expect((await tryComplete(daemon, pushed, 'root', { changeId: 'b' })).body).toMatchObject({
      code: 'CONFLICT',
    });
    expect((await tryComplete(daemon, pushed, 'root', { changeId: 'a', bytesRead: 1 })).body).toMatchObject({
      code: 'CONFLICT',
    });
    const run = await daemon.waitForRun(pushed.run.id);
    expect([run.state, run.error]).toEqual(['completed', null]);
    expect(run.progress.disks).toMatchObject([{ bytesRead: 0, totalBytes: ROOT_BYTES }]);
    // An agent that lost the answer asks once more.
    expect(await complete(daemon, pushed, 'root', { changeId: 'a' })).toEqual(answer);
    expect((await tryComplete(daemon, pushed, 'root', { changeId: 'b' })).body).toMatchObject({
      code: 'CONFLICT',
    });
    expect((await progress({})).body).toMatchObject({ code: 'RUN_NOT_ACTIVE' });
  });

  it('is not believed when the layer holds something else', async () => {
    const { setup, files } = await newMachine(rig, 'mismatch', { root: ROOT_BYTES });
    const file = files['root'] ?? '';
    const { daemon } = rig;
    const pushed = await startPush(daemon, setup);
    await nbdcopy(file, uriOf(pushed, 'root'));
    await writeAt(uriOf(pushed, 'root'), 5 * MIB, seededBytes(1, 512));
    const sumsDigest = await digestOf(file, ALL, { sizeBytes: ROOT_BYTES, keepZeroes: false });
    await complete(daemon, pushed, 'root', { changeId: 'a', sumsDigest });
    const run = await expectPushFailed(rig, setup, { run: pushed.run, code: 'PUSH_MISMATCH' });
    expect(run.error?.details).toMatchObject({ statedDigest: sumsDigest });
    expect((await tryComplete(daemon, pushed, 'root', { changeId: 'a', sumsDigest })).body).toMatchObject({
      code: 'RUN_NOT_ACTIVE',
    });
  });

  it('cannot make a disk larger than it is', async () => {
    const { setup } = await newMachine(rig, 'larger', { root: ROOT_BYTES });
    const { daemon } = rig;
    const pushed = await startPush(daemon, setup);
    {
      await using client = await connect(uriOf(pushed, 'root'));
      await expect(client.pwrite(client.info.sizeBytes, seededBytes(1, 512))).rejects.toThrow();
    }
    // Between the end of the disk and that of its last sector.
    await writeAt(uriOf(pushed, 'root'), ROOT_BYTES, seededBytes(1, 24));
    await complete(daemon, pushed, 'root', { changeId: 'a' });
    await expectPushFailed(rig, setup, { run: pushed.run, code: 'LAYER_CORRUPT' });
  });

  it.each([
    ['a disk there is not', { disks: [{ disk: 'nowhere' }] }],
    ['a disk twice', { disks: [{ disk: 'root' }, { disk: 'root' }] }],
    ['a size of nothing', { disks: [{ disk: 'root', sizeBytes: 0 }] }],
    ['a change id of nothing', { disks: [{ disk: 'root', changeIds: [''] }] }],
  ])('is refused before a run begins: %s', async (title, push) => {
    const { daemon } = rig;
    const { setup } = await newMachine(rig, `refused ${title}`, { root: ROOT_BYTES });
    const answer = await daemon.request('POST', '/backups', {
      vmId: setup.vm.id,
      repositoryId: setup.repository.id,
      source: 'push',
      push,
    });
    expect(answer.body).toMatchObject({ code: 'INVALID_INPUT' });
    expect(
      (await daemon.expect<{ items: RunView[] }>(200, 'GET', `/runs?vmId=${setup.vm.id}`)).items,
    ).toEqual([]);
  });
});
