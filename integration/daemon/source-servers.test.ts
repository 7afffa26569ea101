import { truncate } from 'node:fs/promises';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { KIB, MIB } from '../../src/lib/units.js';
import { exportRaw, makeQcow2, makeRaw, qemuIo, writeRegions } from '../lab/disk-image.js';
import { startNbdkit, startQemuNbd } from '../lab/nbd-server.js';
import { startStorageDaemon } from '../lab/storage-daemon.js';
import { backUp, setUp, startBackup, type Setup } from './daemon.js';
import { expectGoodBackup, expectReadsBack, methodsOf, nbdDisk, startRig, stopRig, type Rig } from './rig.js';

const DISK_BYTES = 8 * MIB + 20 * KIB;

describe('servers that are odd, but right', () => {
  let rig: Rig;

  beforeAll(async () => {
    rig = await startRig({ nbd: { connections: 4 } });
  });

  afterAll(() => stopRig(rig));

  const setUpWith = (name: string, uri: string): Promise<Setup> =>
    setUp(rig.daemon, {
      root: rig.lab.file(`repository-${name}`),
      vmName: name,
      disks: [{ name: 'vda', source: nbdDisk(uri) }],
    });

  const makeDisk = async (name: string): Promise<string> => {
    const file = rig.lab.file(`${name}.raw`);
    await makeRaw({
      path: file,
      sizeBytes: DISK_BYTES,
      regions: [
        { offset: 0, length: MIB },
        { offset: 3 * MIB + 4 * KIB, length: 4 * KIB },
        { offset: 5 * MIB, length: 2 * MIB + 512 },
        { offset: DISK_BYTES - 512, length: 512 },
      ],
    });
    return file;
  };

  it.each([
    { filter: 'delay', parameters: ['delay-read=2ms', 'delay-extents=20ms', 'delay-open=100ms'] },
    { filter: 'blocksize', parameters: ['minblock=4096', 'maxdata=65536', 'maxlen=65536'] },
    {
      filter: 'blocksize-policy',
      parameters: [
        'blocksize-error-policy=error',
        'blocksize-minimum=4096',
        'blocksize-preferred=64K',
        'blocksize-maximum=128K',
      ],
    },
    { filter: 'noextents', parameters: [] },
    { filter: 'nozero', parameters: [] },
    { filter: 'rate', parameters: ['rate=200M'] },
    { filter: 'multi-conn', parameters: ['multi-conn-mode=disable'] },
    { filter: 'noparallel', parameters: ['serialize=connections'] },
  ])('reads right through the filter $filter, and compares right', async ({ filter, parameters }) => {
    const truth = await makeDisk(filter);
    await using server = await startNbdkit({
      socketPath: rig.lab.file(`${filter}.sock`),
      plugin: ['file', truth],
      filters: [filter],
      parameters,
      isReadOnly: true,
    });
    const setup = await setUpWith(filter, server.uri);
    await expectGoodBackup(rig, setup, { truths: { vda: truth } });
    await writeRegions(truth, [
      { offset: 2 * MIB, length: 64 * KIB, seed: 1 },
      { offset: 5 * MIB + 1024, length: 512, seed: 2 },
    ]);
    const second = await expectGoodBackup(rig, setup, { truths: { vda: truth } });
    expect(methodsOf(second)).toEqual(['compare NO_CHANGE_RECORD']);
    expect(second.progress.disks[0]?.bytesWritten).toBe(128 * KIB);
  });

  it('never waits for ever on a server that takes one client at a time (a qemu-nbd by default)', async () => {
    const truth = await makeDisk('single');
    await using server = await startQemuNbd({
      image: truth,
      format: 'raw',
      socketPath: rig.lab.file('single.sock'),
      isReadOnly: true,
      shared: 1,
    });
    const setup = await setUpWith('single', server.uri);
    await expectGoodBackup(rig, setup, { truths: { vda: truth } });
    await writeRegions(truth, [{ offset: 2 * MIB, length: 64 * KIB, seed: 1 }]);
    await expectGoodBackup(rig, setup, { truths: { vda: truth } });
  });

  it('takes a full of a disk that shrank, says why, and keeps the larger point', async () => {
    const truth = await makeDisk('shrinking');
    const before = await makeDisk('shrinking-before');
    const options = {
      image: truth,
      format: 'raw' as const,
      socketPath: rig.lab.file('shrinking.sock'),
      isReadOnly: true,
    };
    const large = await startQemuNbd(options);
    const setup = await setUpWith('shrinking', large.uri);
    const first = await backUp(rig.daemon, setup);
    await large.stop();
    await truncate(truth, 6 * MIB);
    await using _small = await startQemuNbd(options);
    const refused = await startBackup(rig.daemon, setup, { type: 'incremental' });
    expect((await rig.daemon.waitForRun(refused.id)).error?.code).toBe('INCREMENTAL_IMPOSSIBLE');
    const second = await expectGoodBackup(rig, setup, { truths: { vda: truth } });
    expect(methodsOf(second)).toEqual(['full DISK_SHRANK']);
    await expectReadsBack(rig, first.pointId, { vda: before });
  });

  it.each([
    { method: 'bitmap', oldBytes: 3 * MIB + 5 * 512 },
    { method: 'bitmap', oldBytes: 3 * MIB },
    { method: 'compare', oldBytes: 3 * MIB + 5 * 512 },
  ])('follows a disk that grew from $oldBytes bytes: $method', async ({ method, oldBytes }) => {
    const name = `grown-${method}-${oldBytes}`;
    const image = rig.lab.file(`${name}.qcow2`);
    await makeQcow2({
      path: image,
      sizeBytes: oldBytes,
      regions: [
        { offset: 0, length: MIB },
        { offset: oldBytes - 512, length: 512 },
      ],
    });
    await using source = await startStorageDaemon({ image, socketPath: rig.lab.file(`${name}.sock`) });
    const setup = await setUpWith(name, source.uri);
    const truths = ['0', '1', '2'].map((step) => rig.lab.file(`${name}-${step}.raw`));
    const [before = '', grown = '', after = ''] = truths;
    await exportRaw(source.uri, 'raw', before);
    const first = await backUp(rig.daemon, setup);
    if (method === 'bitmap') await source.addBitmap(`holdfast-${first.pointId ?? ''}`);

    await source.resizeDisk(6 * MIB);
    await qemuIo({
      path: source.uri,
      format: 'raw',
      commands: [
        'write -P 7 512k 4k',
        `write -P 9 ${oldBytes} 512`,
        'write -P 8 5M 4k',
        `write -P 3 ${6 * MIB - 512} 512`,
      ],
    });
    await exportRaw(source.uri, 'raw', grown);
    const second = await expectGoodBackup(rig, setup, { type: 'incremental', truths: { vda: grown } });
    expect(second.progress.disks[0]?.method).toBe(method);

    if (method === 'bitmap') await source.addBitmap(`holdfast-${second.pointId ?? ''}`);
    await qemuIo({ path: source.uri, format: 'raw', commands: ['write -P 5 4M 4k', 'write -z 5M 64k'] });
    await exportRaw(source.uri, 'raw', after);
    await expectGoodBackup(rig, setup, { type: 'incremental', truths: { vda: after } });
    await expectReadsBack(rig, second.pointId, { vda: grown });
    await expectReadsBack(rig, first.pointId, { vda: before });
  });

  it('reads a block that is said to be a hole, not a zero, and holds 0xAA', async () => {
    const truth = rig.lab.file('hole.raw');
    await makeRaw({ path: truth, sizeBytes: 4 * MIB, regions: [{ offset: 3 * MIB, length: 64 * KIB }] });
    await qemuIo({ path: truth, format: 'raw', commands: ['write -P 0xAA 1M 1M'] });
    const sizeBytes = 4 * MIB;
    await using server = await startNbdkit({
      socketPath: rig.lab.file('hole.sock'),
      plugin: ['eval'],
      parameters: [
        `get_size=echo ${sizeBytes}`,
        `pread=dd if=${truth} skip=$4 count=$3 iflag=count_bytes,skip_bytes bs=1M status=none`,
        'can_extents=exit 0',
        'extents=echo "$4 $3 hole"',
      ],
      isReadOnly: true,
    });
    const setup = await setUpWith('hole', server.uri);
    const first = await expectGoodBackup(rig, setup, { truths: { vda: truth } });
    expect(first.progress.disks[0]?.bytesRead).toBe(sizeBytes);
    await qemuIo({ path: truth, format: 'raw', commands: ['write -P 0xAA 2M 64k', 'write -P 0 1M 64k'] });
    await expectGoodBackup(rig, setup, { type: 'incremental', truths: { vda: truth } });
  });

  it.each(['bitmap', 'compare'])(
    'never shows old data where zeroes were written or blocks discarded: %s',
    async (method) => {
      const name = `zeroed-${method}`;
      const image = rig.lab.file(`${name}.qcow2`);
      await makeQcow2({ path: image, sizeBytes: 4 * MIB });
      await using source = await startStorageDaemon({ image, socketPath: rig.lab.file(`${name}.sock`) });
      await qemuIo({ path: source.uri, format: 'raw', commands: ['write -P 0xAA 0 4M'] });
      const setup = await setUpWith(name, source.uri);
      const first = await backUp(rig.daemon, setup);
      if (method === 'bitmap') await source.addBitmap(`holdfast-${first.pointId ?? ''}`);
      await qemuIo({
        path: source.uri,
        format: 'raw',
        commands: [
          'write -z -u 1M 256k',
          'discard 2M 256k',
          'write -z 3M 128k',
          'write -P 0 3584k 64k',
          'write -z 5k 3k',
        ],
      });
      const truth = rig.lab.file(`${name}.raw`);
      await exportRaw(source.uri, 'raw', truth);
      const second = await expectGoodBackup(rig, setup, { truths: { vda: truth } });
      expect(second.progress.disks[0]).toMatchObject({ method, bytesZeroed: (256 + 256 + 128 + 64) * KIB });
    },
  );
});
