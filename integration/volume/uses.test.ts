import { rm } from 'node:fs/promises';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';
import type { BackupView, RunEvent, RunView, VmView, VolumeView } from '../../src/engine/types.js';
import { CleanupStack } from '../../src/lib/cleanup.js';
import { pollUntil } from '../../src/lib/deadline.js';
import { MIB } from '../../src/lib/units.js';
import type { DiskSource } from '../../src/source/source.js';
import { backUp, startBackup, type Setup } from '../daemon/daemon.js';
import {
  isServed,
  publish,
  restartExportd,
  restartHoldfastd,
  show as showExport,
  startExportRig,
  stopExportRig,
  type ExportRig,
} from '../daemon/export-rig.js';
import { expectFailure, expectNothingLeft, imageDisk, methodsOf, waitUntilCopying } from '../daemon/rig.js';
import { firstDifference, makeRaw, writeRegions } from '../lab/disk-image.js';
import { connectLoop, makeFilesystem, type LoopDevice } from '../lab/loop-device.js';
import { addVolume, attach, detach, expectRefused, showVolume, tool } from './volume-rig.js';

describe('the uses of a volume', () => {
  let rig: ExportRig;
  let undo: CleanupStack;
  let repositoryId: string;
  let files = 0;

  beforeAll(async () => {
    rig = await startExportRig();
    undo = new CleanupStack();
    const root = rig.lab.file('repository');
    const made = await rig.daemon.expect<{ id: string }>(201, 'POST', '/repositories', {
      name: 'main',
      root,
    });
    repositoryId = made.id;
  });
  afterAll(() => stopExportRig(rig));
  afterEach(() => undo.run());

  interface Attached {
    device: LoopDevice;
    volume: VolumeView;
  }

  /** A volume with a filesystem and some other bytes, attached. */
  async function attachNew(seed = files): Promise<Attached> {
    const path = rig.lab.file(`disk-${(files += 1)}.raw`);
    await makeFilesystem({ path, regions: [{ offset: 12 * MIB, length: MIB, seed }] });
    const device = undo.use(await connectLoop(path));
    const { id } = await addVolume(rig.daemon, device.path, `v${files}`);
    undo.defer(async () => {
      if ((await showVolume(rig.daemon, { id })).mapping !== null) await detach(rig.daemon, { id });
      await rig.daemon.expect(204, 'DELETE', `/volumes/${id}`);
    });
    return { device, volume: await attach(rig.daemon, { id }) };
  }

  /** A machine with one disk, and the repository. */
  async function machine(source: DiskSource | { kind: 'volume'; volumeId: string }): Promise<Setup> {
    const disks = [{ name: 'vda', source: { changeTracking: 'auto', ...source } }];
    const vm = await rig.daemon.expect<VmView>(201, 'POST', '/vms', { name: `vm${files}`, disks });
    const { items } = await rig.daemon.expect<{ items: Setup['repository'][] }>(200, 'GET', '/repositories');
    return { vm, repository: items.find(({ id }) => id === repositoryId)! };
  }

  const ofVolume = ({ id }: VolumeView): { kind: 'volume'; volumeId: string } => ({
    kind: 'volume',
    volumeId: id,
  });

  /** A machine whose points are gone leaves its volume free to be removed. */
  async function forget({ vm }: Setup): Promise<void> {
    const { items } = await rig.daemon.expect<{ items: BackupView[] }>(200, 'GET', `/backups?vmId=${vm.id}`);
    for (const { id } of items) {
      const run = await rig.daemon.expect<RunView>(202, 'DELETE', `/backups/${id}`);
      expect((await rig.daemon.waitForRun(run.id)).state).toBe('completed');
    }
    await rig.daemon.expect(204, 'DELETE', `/vms/${vm.id}`);
  }

  async function backedUp(attached: Attached): Promise<{ setup: Setup; run: RunView }> {
    const setup = await machine(ofVolume(attached.volume));
    undo.defer(() => forget(setup));
    return { setup, run: await backUp(rig.daemon, setup) };
  }

  async function restore(setup: Setup, pointId: string | null, target: unknown): Promise<RunView> {
    const diskId = setup.vm.disks[0]!.id;
    const body = { pointId, disks: [{ diskId, target }], overwrite: true };
    const run = await rig.daemon.expect<RunView>(202, 'POST', '/restore/images', body);
    const ended = await rig.daemon.waitForRun(run.id);
    await expectNothingLeft(rig, setup.repository.root);
    return ended;
  }

  const logOf = async ({ id }: RunView): Promise<RunEvent[]> =>
    (await rig.daemon.expect<{ items: RunEvent[] }>(200, 'GET', `/runs/${id}/log?limit=100`)).items;

  it('a volume is backed up by what changed, wherever its device is by then', async () => {
    const attached = await attachNew();
    const { device, volume } = attached;
    const { setup, run } = await backedUp(attached);
    expect(methodsOf(run)).toEqual(['full FIRST_POINT']);

    await device.disconnect();
    await writeRegions(device.file, [{ offset: 13 * MIB, length: MIB, seed: 99 }]);
    const stranger = rig.lab.file('stranger.raw');
    await makeFilesystem({ path: stranger });
    undo.use(await connectLoop(stranger, device.path));
    const moved = undo.use(await connectLoop(device.file));
    expect(moved.path).not.toBe(device.path);
    const second = await backUp(rig.daemon, setup, { type: 'incremental' });
    expect(methodsOf(second)[0]).toMatch(/^compare /);
    expect((await showVolume(rig.daemon, volume)).mapping?.devicePath).toBe(moved.path);

    const out = rig.lab.file('out.raw');
    const restored = await restore(setup, second.pointId, { kind: 'file', path: out, format: 'raw' });
    expect(restored.error).toBeNull();
    expect(await firstDifference(out, device.file)).toBeNull();
    await rm(out);
  });

  it('a volume is restored into another, which has lost by what it was known', async () => {
    const [one, two] = [await attachNew(1), await attachNew(2)];
    const { setup, run } = await backedUp(one);
    const restored = await restore(setup, run.pointId, ofVolume(two.volume));
    expect([restored.state, restored.error], JSON.stringify(restored.error)).toEqual(['completed', null]);
    expect(restored.result).toMatchObject({ disks: [{ target: ofVolume(two.volume) }] });
    await tool('sync', '-f', two.device.file);
    expect(await firstDifference(two.device.path, one.device.path)).toBeNull();

    const said = (await logOf(restored)).find(({ code }) => code === 'VOLUME_IDENTITY_CHANGED');
    expect(said?.details).toMatchObject({ was: two.volume.identity, is: null });
    expect((await showVolume(rig.daemon, two.volume)).problem?.code).toBe('VOLUME_MISMATCH');
    // Now both carry the same, and the first is still the one that was attached.
    expect(await showVolume(rig.daemon, one.volume)).toMatchObject({
      devicePath: one.device.path,
      problem: null,
    });
  });

  it('a volume is known by what a restore wrote on it, where that is its own', async () => {
    const disk = rig.lab.file('image.raw');
    const uuid = await makeFilesystem({ path: disk });
    const setup = await machine(imageDisk(disk));
    undo.defer(() => forget(setup));
    const { pointId } = await backUp(rig.daemon, setup);
    const { volume, device } = await attachNew();
    const restored = await restore(setup, pointId, ofVolume(volume));
    expect(restored.error).toBeNull();
    const now = await showVolume(rig.daemon, volume);
    expect(now).toMatchObject({ identity: `fs-uuid:${uuid}`, devicePath: device.path, problem: null });
    expect((await logOf(restored)).map(({ code }) => code)).toContain('VOLUME_IDENTITY_CHANGED');
    await detach(rig.daemon, volume);
    expect((await attach(rig.daemon, volume)).devicePath).toBe(device.path);
  });

  it('a volume is exported under its name, and is not detached while it is', async () => {
    const { device, volume } = await attachNew();
    const made = await publish(rig.daemon, { volumeId: volume.id });
    expect(made).toMatchObject({ name: `migration-vol-${volume.id.toLowerCase()}`, isReadOnly: true });
    expect([made.kind, made.volumeId, made.sizeBytes]).toEqual(['volume', volume.id, 16 * MIB]);
    const uri = made.uris[0]!;
    expect(await tool('nbdinfo', '--size', uri)).toBe(String(16 * MIB));
    expect(await tool('nbdinfo', '--is', 'read-only', uri)).toBe('');
    const copy = rig.lab.file('copy.raw');
    await tool('nbdcopy', uri, copy);
    expect(await firstDifference(copy, device.file)).toBeNull();
    await rm(copy);

    await expectRefused(rig.daemon, ['POST', '/exports', { volumeId: volume.id }], 'CONFLICT');
    const message = await expectRefused(
      rig.daemon,
      ['POST', `/volumes/${volume.id}/detach`],
      'VOLUME_IN_USE',
    );
    expect(message).toContain(`export ${made.id}`);
    await rig.daemon.expect(204, 'DELETE', `/exports/${made.id}`);
    await detach(rig.daemon, volume);
    await expectRefused(rig.daemon, ['POST', '/exports', { volumeId: volume.id }], 'CONFLICT');
  });

  it('a writable export writes the device, and nothing else does meanwhile', async () => {
    const attached = await attachNew();
    const { device, volume } = attached;
    const { setup, run } = await backedUp(attached);
    const made = await publish(rig.daemon, { volumeId: volume.id, isReadOnly: false });
    const uri = made.uris[0]!;
    await tool('qemu-io', '-f', 'raw', '-c', 'write -q -P 0x5a 14M 1M', '-c', 'flush', uri);
    expect(await tool('qemu-io', '-r', '-f', 'raw', '-c', 'read -P 0x5a 14M 1M', device.path)).toContain(
      'read 1048576',
    );
    const busy = await restore(setup, run.pointId, ofVolume(volume));
    expect([busy.error?.code, busy.error?.details]).toMatchObject([
      'VOLUME_IN_USE',
      { exportIds: [made.id] },
    ]);
    await expectFailure(rig, setup, { code: 'SOURCE_BUSY' });
    await rig.daemon.expect(204, 'DELETE', `/exports/${made.id}`);
    expect((await backUp(rig.daemon, setup)).state).toBe('completed');
  });

  it('an export of a volume leads nowhere while its device is away, and to it when it is back', async () => {
    const { device, volume } = await attachNew();
    const made = await publish(rig.daemon, { volumeId: volume.id });
    undo.defer(() => rig.daemon.expect(204, 'DELETE', `/exports/${made.id}`));
    // The daemon of the exports keeps a device that it has open.
    await rig.exportd.stop();
    await device.disconnect();
    expect((await showVolume(rig.daemon, volume)).problem?.code).toBe('VOLUME_GONE');
    const stranger = rig.lab.file('other.raw');
    await makeRaw({ path: stranger, sizeBytes: 16 * MIB });
    const taken = undo.use(await connectLoop(stranger, device.path));
    await restartExportd(rig);
    expect(await isServed(made.uris[0]!)).toBe(false);

    const back = undo.use(await connectLoop(device.file));
    expect((await showVolume(rig.daemon, volume)).mapping?.devicePath).toBe(back.path);
    const again = await showExport(rig.daemon, made.id);
    expect([again.problem, again.uris.length > 0]).toEqual([null, true]);
    const copy = rig.lab.file('copy.raw');
    await tool('nbdcopy', again.uris[0]!, copy);
    expect(await firstDifference(copy, device.file)).toBeNull();
    await rm(copy);
    await taken.disconnect();
  });

  it('after a start of the host the daemon finds the devices of its volumes by itself', async () => {
    const { device, volume } = await attachNew();
    const made = await publish(rig.daemon, { volumeId: volume.id });
    undo.defer(() => rig.daemon.expect(204, 'DELETE', `/exports/${made.id}`));
    await rig.daemon.stop();
    await rig.exportd.stop();
    await device.disconnect();
    await rm(rig.lab.file('daemon', 'run', 'volumes'), { recursive: true });
    const filler = rig.lab.file('filler.raw');
    await makeRaw({ path: filler, sizeBytes: 16 * MIB });
    undo.use(await connectLoop(filler, device.path));
    const back = undo.use(await connectLoop(device.file));
    await restartExportd(rig);
    expect(await isServed(made.uris[0]!)).toBe(false);

    await restartHoldfastd(rig);
    await pollUntil(async () => ((await isServed(made.uris[0]!)) ? true : undefined), {
      timeoutMs: 20_000,
      intervalMs: 100,
      what: 'the export being served again',
    });
    const items = await rig.daemon.expect<{ items: VolumeView[] }>(200, 'GET', '/volumes');
    expect(items.items.find(({ id }) => id === volume.id)?.mapping?.devicePath).toBe(back.path);
  });

  it('a device that is gone fails what would use it', async () => {
    const attached = await attachNew();
    const { device, volume } = attached;
    const { setup, run } = await backedUp(attached);
    await device.disconnect();
    await expectFailure(rig, setup, { code: 'VOLUME_GONE' });
    await expectRefused(rig.daemon, ['POST', '/exports', { volumeId: volume.id }], 'VOLUME_GONE');
    const restored = await restore(setup, run.pointId, ofVolume(volume));
    expect(restored.error?.code).toBe('VOLUME_GONE');
    const before = await tool('sha256sum', device.file);
    const stranger = rig.lab.file('stranger2.raw');
    await makeFilesystem({ path: stranger });
    undo.use(await connectLoop(stranger, device.path));
    const untouched = await tool('sha256sum', stranger);
    expect((await restore(setup, run.pointId, ofVolume(volume))).error?.code).toBe('VOLUME_MISMATCH');
    expect(await tool('sha256sum', stranger)).toBe(untouched);
    expect(await tool('sha256sum', device.file)).toBe(before);
    expect((await backUp(rig.daemon, setup, { expectState: 'failed' })).error?.code).toBe('VOLUME_MISMATCH');
  });

  it('a volume is neither detached, written nor lost under a backup', async () => {
    const attached = await attachNew();
    const { device, volume } = attached;
    const setup = await machine(ofVolume(volume));
    undo.defer(() => forget(setup));
    const run = await startBackup(rig.daemon, setup, { bytesPerSecond: 2 * MIB });
    await waitUntilCopying(rig.daemon, run.id);
    const detail = await expectRefused(rig.daemon, ['POST', `/volumes/${volume.id}/detach`], 'VOLUME_IN_USE');
    expect(detail).toContain(`run ${run.id}`);
    // The kernel keeps a device that is open, whatever its owner does.
    await device.disconnect();
    const ended = await rig.daemon.waitForRun(run.id);
    expect([ended.state, ended.error]).toEqual(['completed', null]);
    const out = rig.lab.file('out.raw');
    expect((await restore(setup, run.pointId, { kind: 'file', path: out, format: 'raw' })).error).toBeNull();
    expect(await firstDifference(out, device.file)).toBeNull();
    await rm(out);
    await expectFailure(rig, setup, { code: 'VOLUME_GONE' });
  });

  it('a device that is mounted since it was attached is not read', async () => {
    const attached = await attachNew();
    const { setup } = await backedUp(attached);
    const mountPoint = rig.lab.file('mnt');
    await tool('mkdir', mountPoint);
    await tool('mount', attached.device.path, mountPoint);
    try {
      const run = await expectFailure(rig, setup, { code: 'VOLUME_IN_USE' });
      expect(run.error?.message).toContain(mountPoint);
    } finally {
      await tool('umount', mountPoint);
    }
  });

  it('what is not attached is no source and no target, and what is attached is written as the volume only', async () => {
    const attached = await attachNew();
    const { setup, run } = await backedUp(attached);
    const { device, volume } = attached;
    const bare = await restore(setup, run.pointId, { kind: 'device', path: device.path });
    expect(bare.error?.code).toBe('TARGET_IN_USE');
    await detach(rig.daemon, volume);
    await expectFailure(rig, setup, { code: 'CONFLICT' });
    expect((await restore(setup, run.pointId, ofVolume(volume))).error?.code).toBe('CONFLICT');
    const detail = await expectRefused(rig.daemon, ['DELETE', `/volumes/${volume.id}`], 'CONFLICT');
    expect(detail).toContain('source of a disk');
  });
});
