import { mkdir, readdir, stat } from 'node:fs/promises';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { RepositoryView } from '../../src/engine/types.js';
import { pollUntil } from '../../src/lib/deadline.js';
import { runTool } from '../../src/lib/process.js';
import { KIB, MIB } from '../../src/lib/units.js';
import { makeRaw, writeRegions } from '../lab/disk-image.js';
import { startNbdkit } from '../lab/nbd-server.js';
import { mountTmpfs } from '../lab/tmpfs.js';
import { backUp, setUp, startBackup, type Setup } from './daemon.js';
import {
  expectFailed,
  expectFailure,
  expectGoodBackup,
  expectNothingLeft,
  imageDisk,
  nbdDisk,
  startRig,
  stopRig,
  waitUntilCopying,
  type Rig,
} from './rig.js';

const DISK_BYTES = 48 * MIB;

const mount = async (...args: string[]): Promise<void> => {
  await runTool('mount', args, { timeoutMs: 10_000 });
};
const unmount = async (...args: string[]): Promise<void> => {
  await runTool('umount', args, { timeoutMs: 10_000 });
};

describe('the storage under a repository', () => {
  let rig: Rig;

  beforeAll(async () => {
    rig = await startRig();
  });

  afterAll(() => stopRig(rig));

  const setUpWith = (
    name: string,
    source: Parameters<typeof setUp>[1]['disks'][number]['source'],
  ): Promise<Setup> =>
    setUp(rig.daemon, {
      root: rig.lab.file(`repository-${name}`),
      vmName: name,
      disks: [{ name: 'vda', source }],
    });

  const makeDisk = async (name: string, dataBytes: number): Promise<string> => {
    const file = rig.lab.file(`${name}.raw`);
    await makeRaw({ path: file, sizeBytes: DISK_BYTES, regions: [{ offset: 0, length: dataBytes }] });
    return file;
  };

  const usedBytes = async (directory: string): Promise<number> => {
    const { stdout } = await runTool('df', ['--output=used', '-B1', directory], { timeoutMs: 5000 });
    return Number(stdout.trim().split('\n').at(-1));
  };

  it('too small for what is known to come: the run is refused before anything is written', async () => {
    const truth = await makeDisk('known', 40 * MIB);
    const root = rig.lab.file('repository-known');
    await using disk = await mountTmpfs({ path: root, sizeBytes: 32 * MIB });
    const setup = await setUpWith('known', imageDisk(truth));
    const run = await expectFailure(rig, setup, { code: 'REPOSITORY_FULL' });
    expect(run.stage).toBe('snapshot');
    expect(run.progress.disks[0]).toMatchObject({ bytesRead: 0, bytesWritten: 0 });
    expect(run.error?.details).toMatchObject({ neededBytes: 40 * MIB });
    expect(await usedBytes(root)).toBeLessThan(MIB);
    await disk.remount('rw', 96 * MIB);
    await expectGoodBackup(rig, setup, { truths: { vda: truth } });
  });

  it('too small for what nobody knew would come: the run ends cleanly in the middle, compared', async () => {
    const truth = await makeDisk('unknown', 4 * MIB);
    const root = rig.lab.file('repository-unknown');
    await using disk = await mountTmpfs({ path: root, sizeBytes: 32 * MIB });
    const setup = await setUpWith('unknown', imageDisk(truth, 'raw', 'compare'));
    await backUp(rig.daemon, setup);
    const usedBefore = await usedBytes(root);
    await writeRegions(truth, [{ offset: 0, length: 40 * MIB, seed: 5 }]);
    const run = await expectFailure(rig, setup, { code: 'REPOSITORY_FULL' });
    expect(run.stage).toBe('transfer');
    expect(await usedBytes(root)).toBeLessThan(usedBefore + 256 * KIB);
    await disk.remount('rw', 96 * MIB);
    await expectGoodBackup(rig, setup, { type: 'incremental', truths: { vda: truth } });
  });

  it('of a source that says nothing about what is zero: a sparse disk fits, a full one ends cleanly', async () => {
    const truth = await makeDisk('silent', 2 * MIB);
    const root = rig.lab.file('repository-silent');
    await using _disk = await mountTmpfs({ path: root, sizeBytes: 32 * MIB });
    await using server = await startNbdkit({
      socketPath: rig.lab.file('silent.sock'),
      plugin: ['file', truth],
      filters: ['noextents'],
      isReadOnly: true,
    });
    const setup = await setUpWith('silent', nbdDisk(server.uri));
    await expectGoodBackup(rig, setup, { truths: { vda: truth } });
    await writeRegions(truth, [{ offset: 0, length: 44 * MIB, seed: 5 }]);
    const run = await expectFailure(rig, setup, { type: 'full', code: 'REPOSITORY_FULL' });
    expect(run.stage).toBe('transfer');
  });

  it('read-only: nothing is written, and the next backup after it is writable again is good', async () => {
    const truth = await makeDisk('read-only', MIB);
    const root = rig.lab.file('repository-read-only');
    await using disk = await mountTmpfs({ path: root, sizeBytes: 32 * MIB });
    const setup = await setUpWith('read-only', imageDisk(truth));
    await backUp(rig.daemon, setup);
    await disk.remount('ro');
    await expectFailure(rig, setup, { code: 'REPOSITORY_READ_ONLY' });
    await disk.remount('rw');
    await writeRegions(truth, [{ offset: 2 * MIB, length: 4096, seed: 5 }]);
    await expectGoodBackup(rig, setup, { truths: { vda: truth } });
  });

  it('that is not mounted is never written to, before a run and in the middle of one', async () => {
    const truth = await makeDisk('vanished', 16 * MIB);
    const root = rig.lab.file('repository-vanished');
    const real = rig.lab.file('real-vanished');
    await mkdir(root);
    await mkdir(real);
    await mount('--bind', real, root);
    let isMounted = true;
    try {
      const setup = await setUpWith('vanished', imageDisk(truth));
      const good = await backUp(rig.daemon, setup);

      await unmount(root);
      isMounted = false;
      await expectFailure(rig, setup, { code: 'REPOSITORY_OFFLINE' });
      expect(await readdir(root)).toEqual([]);
      const view = await rig.daemon.expect<RepositoryView>(
        200,
        'GET',
        `/repositories/${setup.repository.id}`,
      );
      expect([view.isOnline, view.problem?.code]).toEqual([false, 'REPOSITORY_OFFLINE']);
      const restore = await rig.daemon.request('GET', `/backups/${good.pointId ?? ''}/chain`);
      expect([restore.status, restore.body]).toMatchObject([503, { code: 'REPOSITORY_OFFLINE' }]);

      await mount('--bind', real, root);
      isMounted = true;
      const run = await startBackup(rig.daemon, setup, { type: 'full', bytesPerSecond: 6 * MIB });
      await waitUntilCopying(rig.daemon, run.id);
      await unmount('--lazy', root);
      isMounted = false;
      await expectFailed(rig, setup, { run, code: 'REPOSITORY_OFFLINE' });
      expect(await readdir(root)).toEqual([]);

      await mount('--bind', real, root);
      isMounted = true;
      await expectGoodBackup(rig, setup, { truths: { vda: truth } });
    } finally {
      if (isMounted) await unmount('--lazy', root);
    }
  });

  it('that hangs does not stall runs into another repository', async () => {
    const image = rig.lab.file('frozen.ext4');
    const mountPoint = rig.lab.file('frozen');
    await makeRaw({ path: image, sizeBytes: 64 * MIB });
    await runTool('mkfs.ext4', ['-q', image], { timeoutMs: 20_000 });
    await mkdir(mountPoint);
    await mount('-o', 'loop', image, mountPoint);
    try {
      const truth = await makeDisk('frozen', MIB);
      const frozen = await setUp(rig.daemon, {
        root: `${mountPoint}/repository`,
        vmName: 'frozen',
        disks: [{ name: 'vda', source: imageDisk(truth) }],
      });
      const alive = await setUpWith('alive', imageDisk(truth));
      await runTool('fsfreeze', ['--freeze', mountPoint], { timeoutMs: 10_000 });
      let stuck: Awaited<ReturnType<typeof startBackup>>;
      try {
        stuck = await startBackup(rig.daemon, frozen);
        await pollUntil(
          async () => {
            const { body } = await rig.daemon.request('GET', `/runs/${stuck.id}`);
            return (body as { state: string }).state === 'running' ? true : undefined;
          },
          { timeoutMs: 5000, what: 'the run into the frozen repository starting' },
        );
        await expectGoodBackup(rig, alive, { truths: { vda: truth } });
        const run = await rig.daemon.request('GET', `/runs/${stuck.id}`);
        expect(run.body).toMatchObject({ state: 'running' });
      } finally {
        await runTool('fsfreeze', ['--unfreeze', mountPoint], { timeoutMs: 10_000 });
      }
      expect((await rig.daemon.waitForRun(stuck.id)).state).toBe('completed');
      await expectNothingLeft(rig, frozen.repository.root);
      await expectGoodBackup(rig, frozen, { truths: { vda: truth } });
    } finally {
      await unmount(mountPoint);
    }
    expect((await stat(image)).size).toBe(64 * MIB);
  });
});
