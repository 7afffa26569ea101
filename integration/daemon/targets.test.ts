import { mkdir, readdir, stat, symlink, writeFile } from 'node:fs/promises';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { RunView } from '../../src/engine/types.js';
import type { ErrorCode } from '../../src/lib/errors.js';
import { runTool } from '../../src/lib/process.js';
import { KIB, MIB } from '../../src/lib/units.js';
import type { TargetSpec } from '../../src/target/target.js';
import { makeLabDirectory } from '../lab/directory.js';
import { expectCleanImage, exportRaw, firstDifference, makeQcow2, makeRaw } from '../lab/disk-image.js';
import { startQemuNbd } from '../lab/nbd-server.js';
import { mountTmpfs } from '../lab/tmpfs.js';
import { backUp, setUp, type Setup } from './daemon.js';
import { expectNothingLeft, imageDisk, startRig, stopRig, type Rig } from './rig.js';

const DISK_BYTES = 16 * MIB + 4 * KIB;

const tool = async (name: string, ...args: string[]): Promise<string> =>
  (await runTool(name, args, { timeoutMs: 20_000 })).stdout.trim();

describe('the target of a restore', () => {
  let rig: Rig;
  let setup: Setup;
  let pointId: string;
  let truth: string;
  let smallTruth: string;

  beforeAll(async () => {
    rig = await startRig();
    truth = rig.lab.file('disk.raw');
    smallTruth = rig.lab.file('small.raw');
    await makeRaw({
      path: truth,
      sizeBytes: DISK_BYTES,
      regions: [
        { offset: MIB, length: 2 * MIB },
        { offset: 9 * MIB + 4 * KIB, length: 4 * KIB },
      ],
    });
    await makeRaw({ path: smallTruth, sizeBytes: MIB, regions: [{ offset: 0, length: MIB }] });
    setup = await setUp(rig.daemon, {
      root: rig.lab.file('repository'),
      disks: [
        { name: 'vda', source: imageDisk(truth) },
        { name: 'vdb', source: imageDisk(smallTruth) },
      ],
    });
    pointId = (await backUp(rig.daemon, setup)).pointId ?? '';
  });

  afterAll(() => stopRig(rig));

  const diskId = (index: number): string => setup.vm.disks[index]?.id ?? '';

  const restoreTo = async (
    targets: TargetSpec[],
    options: { overwrite?: boolean } = {},
  ): Promise<RunView> => {
    const run = await rig.daemon.expect<RunView>(202, 'POST', '/restore/images', {
      pointId,
      disks: targets.map((target, index) => ({ diskId: diskId(index), target })),
      ...options,
    });
    const ended = await rig.daemon.waitForRun(run.id);
    await expectNothingLeft(rig, setup.repository.root);
    const names = await readdir(rig.lab.path, { recursive: true });
    expect(names.filter((name) => name.includes('.holdfast-restore-'))).toEqual([]);
    return ended;
  };

  const expectRestored = async (
    targets: TargetSpec[],
    options: { overwrite?: boolean } = {},
  ): Promise<void> => {
    const run = await restoreTo(targets, options);
    expect([run.state, run.error], JSON.stringify(run.error)).toEqual(['completed', null]);
  };

  const expectRefused = async (
    code: ErrorCode,
    targets: TargetSpec[],
    options: { overwrite?: boolean } = {},
  ): Promise<void> => {
    const run = await restoreTo(targets, options);
    expect([run.state, run.error?.code], JSON.stringify(run.error)).toEqual(['failed', code]);
  };

  const file = (path: string, format: 'raw' | 'qcow2' = 'raw'): TargetSpec => ({
    kind: 'file',
    path,
    format,
  });

  it('a raw file stays sparse and has the exact size', async () => {
    const path = rig.lab.file('out.raw');
    await expectRestored([file(path)]);
    expect(await firstDifference(path, truth)).toBeNull();
    const facts = await stat(path);
    expect(facts.size).toBe(DISK_BYTES);
    expect(facts.blocks * 512).toBeLessThanOrEqual(2 * MIB + 256 * KIB);
  });

  it('a QCOW2 file is clean, holds what the disk held, and no more', async () => {
    const path = rig.lab.file('out.qcow2');
    await expectRestored([file(path, 'qcow2'), file(rig.lab.file('out-b.qcow2'), 'qcow2')]);
    await expectCleanImage(path);
    await exportRaw(path, 'qcow2', `${path}.raw`);
    expect(await firstDifference(`${path}.raw`, truth)).toBeNull();
    expect((await stat(path)).size).toBeLessThan(3 * MIB);
  });

  it('a file that is there is kept, unless it may be overwritten; then old bytes are gone', async () => {
    const path = rig.lab.file('there.raw');
    await writeFile(path, 'precious'.repeat(1000));
    await expectRefused('TARGET_EXISTS', [file(path)]);
    expect((await stat(path)).size).toBe(8000);
    await expectRestored([file(path)], { overwrite: true });
    expect(await firstDifference(path, truth)).toBeNull();
    await expectRefused('TARGET_EXISTS', [file(rig.lab.file('daemon', '..', 'repository'))], {
      overwrite: true,
    });
  });

  it('all targets are checked before the first is written', async () => {
    const second = rig.lab.file('second.raw');
    await writeFile(second, 'precious');
    await expectRefused('TARGET_EXISTS', [file(rig.lab.file('first.raw')), file(second)]);
    await expect(stat(rig.lab.file('first.raw'))).rejects.toMatchObject({ code: 'ENOENT' });
  });

  it('never lies inside a repository or the state of the daemon, also not through a link', async () => {
    await symlink(setup.repository.root, rig.lab.file('innocent'));
    await mkdir(rig.lab.file('plain'), { recursive: true });
    for (const path of [
      `${setup.repository.root}/x.raw`,
      `${setup.repository.root}/vms/x.raw`,
      rig.lab.file('innocent', 'x.raw'),
      rig.lab.file('plain', '..', 'repository', 'x.raw'),
      `${rig.daemon.stateDirectory}/x.raw`,
      rig.lab.file('daemon', 'run', 'x.raw'),
    ]) {
      await expectRefused('TARGET_FORBIDDEN', [file(path)], { overwrite: true });
    }
    const device = { kind: 'device' as const, path: `${setup.repository.root}/holdfast.json` };
    await expectRefused('INVALID_INPUT', [device], { overwrite: true });
  });

  it('is never one for two disks, however it is spelled', async () => {
    const path = rig.lab.file('one.raw');
    // Not in the lab: later tests walk through it.
    await using elsewhere = await makeLabDirectory();
    await symlink(rig.lab.path, elsewhere.file('again'));
    for (const other of [
      path,
      rig.lab.file('.', 'one.raw'),
      `${rig.lab.path}/./one.raw`,
      elsewhere.file('again', 'one.raw'),
    ]) {
      const answer = await rig.daemon.request('POST', '/restore/images', {
        pointId,
        disks: [
          { diskId: diskId(0), target: file(path) },
          { diskId: diskId(1), target: file(other) },
        ],
        overwrite: true,
      });
      if (answer.status === 422) expect(answer.body).toMatchObject({ code: 'INVALID_INPUT' });
      else {
        const run = await rig.daemon.waitForRun((answer.body as RunView).id);
        expect([run.state, run.error?.code]).toEqual(['failed', 'INVALID_INPUT']);
      }
      await expect(stat(path)).rejects.toMatchObject({ code: 'ENOENT' });
    }
  });

  it('that fills up ends the restore cleanly, raw and QCOW2', async () => {
    await using small = await mountTmpfs({ path: rig.lab.file('small'), sizeBytes: MIB });
    for (const format of ['raw', 'qcow2'] as const) {
      await expectRefused('TARGET_FULL', [file(`${small.path}/x.${format}`, format)]);
      expect(await readdir(small.path)).toEqual([]);
    }
  });

  it('in a directory that is not there, or is read-only, is refused', async () => {
    await expectRefused('TARGET_IO', [file(rig.lab.file('nowhere', 'x.raw'))]);
    await using readOnly = await mountTmpfs({ path: rig.lab.file('read-only'), sizeBytes: 32 * MIB });
    await readOnly.remount('ro');
    await expectRefused('TARGET_IO', [file(`${readOnly.path}/x.raw`)]);
  });

  it('an NBD export is written when it is empty or may be overwritten, and large enough', async () => {
    const image = rig.lab.file('export.qcow2');
    await makeQcow2({ path: image, sizeBytes: DISK_BYTES });
    const small = rig.lab.file('export-small.raw');
    await makeRaw({ path: small, sizeBytes: MIB });
    await using tooSmall = await startQemuNbd({
      image: small,
      format: 'raw',
      socketPath: rig.lab.file('export-small.sock'),
    });
    await expectRefused('TARGET_TOO_SMALL', [{ kind: 'nbd', uri: tooSmall.uri }], { overwrite: true });

    const server = await startQemuNbd({
      image,
      format: 'qcow2',
      socketPath: rig.lab.file('export.sock'),
      extra: ['--discard=unmap'],
    });
    await expectRestored([{ kind: 'nbd', uri: server.uri }]);
    await expectRefused('TARGET_NOT_EMPTY', [{ kind: 'nbd', uri: server.uri }]);
    // Old bytes where the disk is zero must go.
    await tool('qemu-io', '-f', 'raw', '-c', 'write -P 0x55 6M 1M', server.uri);
    await expectRestored([{ kind: 'nbd', uri: server.uri }], { overwrite: true });
    await server.stop();
    await exportRaw(image, 'qcow2', `${image}.raw`);
    expect(await firstDifference(`${image}.raw`, truth)).toBeNull();

    await using readOnly = await startQemuNbd({
      image,
      format: 'qcow2',
      socketPath: rig.lab.file('export-ro.sock'),
      isReadOnly: true,
    });
    await expectRefused('TARGET_IO', [{ kind: 'nbd', uri: readOnly.uri }], { overwrite: true });
  });

  it('a block device is zeroed where the disk is zero, and refused when small, not blank, held or mounted', async () => {
    const backing = rig.lab.file('device.img');
    await makeRaw({ path: backing, sizeBytes: 24 * MIB });
    const device = await tool('losetup', '--find', '--show', backing);
    const target: TargetSpec = { kind: 'device', path: device };
    try {
      await tool('mkfs.ext4', '-q', '-F', device);
      await expectRefused('TARGET_NOT_EMPTY', [target]);

      await mkdir(rig.lab.file('mounted'));
      await tool('mount', device, rig.lab.file('mounted'));
      try {
        await expectRefused('TARGET_IN_USE', [target]);
        await expectRefused('TARGET_IN_USE', [target], { overwrite: true });
      } finally {
        await tool('umount', rig.lab.file('mounted'));
      }

      const over = await tool('losetup', '--find', '--show', device);
      try {
        await expectRefused('TARGET_IN_USE', [target], { overwrite: true });
      } finally {
        await tool('losetup', '--detach', over);
      }

      await tool('qemu-io', '-f', 'raw', '-c', `write -P 0x55 0 ${24 * MIB}`, device);
      await expectRestored([target], { overwrite: true });
      await exportRaw(device, 'raw', `${backing}.read`);
      await tool('truncate', '-s', String(DISK_BYTES), `${backing}.read`);
      expect(await firstDifference(`${backing}.read`, truth)).toBeNull();
    } finally {
      await tool('losetup', '--detach', device);
    }

    const small = rig.lab.file('device-small.img');
    await makeRaw({ path: small, sizeBytes: MIB });
    const smallDevice = await tool('losetup', '--find', '--show', small);
    try {
      await expectRefused('TARGET_TOO_SMALL', [{ kind: 'device', path: smallDevice }], { overwrite: true });
    } finally {
      await tool('losetup', '--detach', smallDevice);
    }
  });
});
