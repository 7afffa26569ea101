import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { KIB, MIB } from '../../src/lib/units.js';
import type { ChangeTracking } from '../../src/source/source.js';
import { addBitmap, exportRaw, makeQcow2, qemuImg, qemuIo } from '../lab/disk-image.js';
import { startStorageDaemon, type LabStorageDaemon } from '../lab/storage-daemon.js';
import type { RepositoryView } from '../../src/engine/types.js';
import { backUp, setUp, type Setup } from './daemon.js';
import {
  expectFailure,
  expectGoodBackup,
  expectReadsBack,
  imageDisk,
  methodsOf,
  nbdDisk,
  startRig,
  stopRig,
  type Rig,
} from './rig.js';

const DISK_BYTES = 4 * MIB;

/** A machine whose disk is written over NBD while it is backed up over NBD. */
interface Machine extends AsyncDisposable {
  source: LabStorageDaemon;
  setup: Setup;
  write(...commands: string[]): Promise<void>;
  /** What the disk holds now, as a file. */
  truth(): Promise<{ vda: string }>;
}

describe('a record of changes', () => {
  let rig: Rig;

  beforeAll(async () => {
    rig = await startRig();
  });

  afterAll(() => stopRig(rig));

  const makeImage = async (name: string): Promise<string> => {
    const image = rig.lab.file(`${name}.qcow2`);
    await makeQcow2({ path: image, sizeBytes: DISK_BYTES, regions: [{ offset: 0, length: 2 * MIB }] });
    return image;
  };

  const startMachine = async (name: string, tracking: ChangeTracking = 'auto'): Promise<Machine> => {
    const image = await makeImage(name);
    const source = await startStorageDaemon({ image, socketPath: rig.lab.file(`${name}.sock`) });
    const setup = await setUp(rig.daemon, {
      root: rig.lab.file(`repository-${name}`),
      vmName: name,
      disks: [{ name: 'vda', source: nbdDisk(source.uri, tracking) }],
    });
    let step = 0;
    return {
      source,
      setup,
      write: (...commands) => qemuIo({ path: source.uri, format: 'raw', commands }),
      truth: async () => {
        const vda = rig.lab.file(`${name}-${(step += 1)}.raw`);
        await exportRaw(source.uri, 'raw', vda);
        return { vda };
      },
      [Symbol.asyncDispose]: () => source[Symbol.asyncDispose](),
    };
  };

  it('that is expected and missing makes the run a full with the reason, or an error when one insisted', async () => {
    await using machine = await startMachine('missing', 'bitmap');
    await backUp(rig.daemon, machine.setup);
    await machine.write('write -P 1 1M 4k');
    await expectFailure(rig, machine.setup, { type: 'incremental', code: 'BITMAP_MISSING' });
    const run = await expectGoodBackup(rig, machine.setup, { truths: await machine.truth() });
    expect(methodsOf(run)).toEqual(['full BITMAP_MISSING']);
  });

  it('left inconsistent by a killed qemu makes the run a full, or an error when one insisted', async () => {
    const image = await makeImage('inconsistent');
    const setup = await setUp(rig.daemon, {
      root: rig.lab.file('repository-inconsistent'),
      vmName: 'inconsistent',
      disks: [{ name: 'vda', source: imageDisk(image, 'qcow2') }],
    });
    const first = await backUp(rig.daemon, setup);
    await addBitmap(image, `holdfast-${first.pointId ?? ''}`);
    const guest = await startStorageDaemon({ image, socketPath: rig.lab.file('inconsistent.sock') });
    await qemuIo({ path: guest.uri, format: 'raw', commands: ['write -P 1 1M 4k', 'flush'] });
    await expectFailure(rig, setup, { code: 'SOURCE_BUSY' });
    await guest.kill();
    expect(await qemuImg(['info', '-f', 'qcow2', image])).toContain('in-use');

    await expectFailure(rig, setup, { type: 'incremental', code: 'BITMAP_INCONSISTENT' });
    const truth = rig.lab.file('inconsistent.raw');
    await exportRaw(image, 'qcow2', truth);
    const run = await expectGoodBackup(rig, setup, { truths: { vda: truth } });
    expect(methodsOf(run)).toEqual(['full BITMAP_INCONSISTENT']);
  });

  it('that another tool may have cleared is not believed', async () => {
    await using machine = await startMachine('cleared');
    await machine.source.addBitmap('nightly');
    await backUp(rig.daemon, machine.setup);
    await machine.write('write -P 1 1M 4k');
    await machine.source.clearBitmap('nightly');
    await machine.write('write -P 2 3M 4k');
    const run = await expectGoodBackup(rig, machine.setup, {
      type: 'incremental',
      truths: await machine.truth(),
    });
    expect(methodsOf(run)).toEqual(['compare BITMAP_UNPROVEN']);
    expect(run.progress.disks[0]?.bytesWritten).toBe(128 * KIB);
  });

  it('that the user vouches for is used for that run, and only with a point of this chain', async () => {
    await using machine = await startMachine('stated');
    const first = await backUp(rig.daemon, machine.setup);
    await machine.source.addBitmap('mine');
    await machine.write('write -P 1 1M 4k');
    const diskId = machine.setup.vm.disks[0]?.id ?? '';
    const state = (
      sincePointId: string,
    ): { bitmaps: { diskId: string; name: string; sincePointId: string }[] } => ({
      bitmaps: [{ diskId, name: 'mine', sincePointId }],
    });
    const run = await expectGoodBackup(rig, machine.setup, {
      ...state(first.pointId ?? ''),
      truths: await machine.truth(),
    });
    expect(methodsOf(run)).toEqual(['bitmap BITMAP']);

    // Stated with a point of nobody, it proves nothing; and another name is not there.
    await machine.write('write -P 3 2M 4k');
    const unproven = await expectGoodBackup(rig, machine.setup, {
      ...state(run.id),
      truths: await machine.truth(),
    });
    expect(methodsOf(unproven)).toEqual(['compare BITMAP_UNPROVEN']);
    const missing = { bitmaps: [{ diskId, name: 'other', sincePointId: unproven.pointId ?? '' }] };
    await expectFailure(rig, machine.setup, { ...missing, type: 'incremental', code: 'BITMAP_MISSING' });
  });

  it('that counts from an ancestor of the last point is a superset, and used', async () => {
    await using machine = await startMachine('ancestor');
    const first = await backUp(rig.daemon, machine.setup);
    await machine.source.addBitmap(`holdfast-${first.pointId ?? ''}`);
    await machine.write('write -P 1 1M 4k');
    const middle = await machine.truth();
    const second = await backUp(rig.daemon, machine.setup);
    await machine.write('write -P 2 3M 4k', 'write -z 1M 4k');
    const third = await expectGoodBackup(rig, machine.setup, {
      type: 'incremental',
      truths: await machine.truth(),
    });
    expect(methodsOf(third)).toEqual(['bitmap BITMAP']);
    expect(third.progress.disks[0]?.bytesRead).toBe(128 * KIB);
    await expectReadsBack(rig, second.pointId, middle);
  });

  it('in a QCOW2 image file serves an image source', async () => {
    const image = await makeImage('persistent');
    const setup = await setUp(rig.daemon, {
      root: rig.lab.file('repository-persistent'),
      vmName: 'persistent',
      disks: [{ name: 'vda', source: imageDisk(image, 'qcow2') }],
    });
    const first = await backUp(rig.daemon, setup);
    await addBitmap(image, `holdfast-${first.pointId ?? ''}`);
    const writes = ['write -P 1 1M 4k', 'write -z -u 512k 64k', 'discard 256k 64k'];
    await qemuIo({ path: image, format: 'qcow2', commands: writes });
    const truth = rig.lab.file('persistent.raw');
    await exportRaw(image, 'qcow2', truth);
    const run = await expectGoodBackup(rig, setup, { type: 'incremental', truths: { vda: truth } });
    expect(methodsOf(run)).toEqual(['bitmap BITMAP']);
    expect(run.progress.disks[0]).toMatchObject({ bytesWritten: 64 * KIB, bytesZeroed: 128 * KIB });
  });

  it('of another machine is never used', async () => {
    await using one = await startMachine('one');
    await using other = await startMachine('other');
    const foreign = await backUp(rig.daemon, other.setup);
    await backUp(rig.daemon, one.setup);
    await one.write('write -P 1 1M 4k');
    await one.source.addBitmap(`holdfast-${foreign.pointId ?? ''}`);
    const run = await expectGoodBackup(rig, one.setup, { truths: await one.truth() });
    expect(methodsOf(run)).toEqual(['compare BITMAP_UNPROVEN']);
  });

  it('of one repository is never used for another: two protect one machine, each with its own', async () => {
    await using machine = await startMachine('twice');
    const second = await rig.daemon.expect<RepositoryView>(201, 'POST', '/repositories', {
      name: 'repository-twice-b',
      root: rig.lab.file('repository-twice-b'),
    });
    const setups = [machine.setup, { vm: machine.setup.vm, repository: second }];
    for (const setup of setups) {
      const first = await backUp(rig.daemon, setup);
      expect(methodsOf(first)).toEqual(['full FIRST_POINT']);
      await machine.source.addBitmap(`holdfast-${first.pointId ?? ''}`);
      await machine.write(`write -P ${setup === machine.setup ? 1 : 2} 1M 4k`);
    }
    await machine.write('write -P 9 3M 4k');
    // Bytes that only the first repository's bitmap has: 1 MiB was written before the second's began.
    const truths = await machine.truth();
    for (const setup of setups) {
      const run = await expectGoodBackup(rig, setup, { type: 'incremental', truths });
      expect(methodsOf(run)).toEqual(['bitmap BITMAP']);
      const point = run.pointId ?? '';
      await machine.source.addBitmap(`holdfast-${point}`);
    }
    await machine.write('write -P 4 2M 4k');
    const later = await machine.truth();
    for (const setup of setups) await expectGoodBackup(rig, setup, { truths: later });
  });
});
