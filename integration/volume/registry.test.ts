import { spawn } from 'node:child_process';
import { randomUUID } from 'node:crypto';
import { mkdir, readlink } from 'node:fs/promises';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';
import type { FoundDeviceView, OperationView, VolumeView } from '../../src/engine/types.js';
import { CleanupStack } from '../../src/lib/cleanup.js';
import { pause } from '../../src/lib/deadline.js';
import { runTool } from '../../src/lib/process.js';
import { MIB } from '../../src/lib/units.js';
import { killDaemon, restart } from '../daemon/crash.js';
import { startRig, stopRig, type Rig } from '../daemon/rig.js';
import { makeRaw } from '../lab/disk-image.js';
import { connectLoop, makeFilesystem, type LoopDevice } from '../lab/loop-device.js';
import { startQemuNbd } from '../lab/nbd-server.js';
import {
  addVolume,
  attach,
  detach,
  endOf,
  expectFailing,
  expectRefused,
  operate,
  showVolume,
  tool,
} from './volume-rig.js';

describe('the registry of volumes', () => {
  let rig: Rig;
  let undo: CleanupStack;
  let files = 0;

  beforeAll(async () => {
    rig = await startRig();
  });
  afterAll(() => stopRig(rig));
  afterEach(() => undo.run());

  const newFile = (): string => rig.lab.file(`disk-${(files += 1)}.raw`);

  /** A device with a filesystem; what a test connects it disconnects. */
  async function connect(
    options: { uuid?: string; sizeBytes?: number } = {},
  ): Promise<LoopDevice & { identity: string }> {
    const path = newFile();
    const uuid = await makeFilesystem({ path, ...options });
    const device = undo.use(await connectLoop(path));
    return { ...device, identity: `fs-uuid:${uuid}` };
  }

  async function register(
    options: Parameters<typeof connect>[0] = {},
  ): Promise<{ device: LoopDevice; volume: VolumeView }> {
    const device = await connect(options);
    const volume = await addVolume(rig.daemon, device.path, `v${files}`);
    undo.defer(() => forget(volume));
    return { device, volume };
  }

  async function forget(volume: VolumeView): Promise<void> {
    if ((await showVolume(rig.daemon, volume)).mapping !== null) await detach(rig.daemon, volume);
    await rig.daemon.expect(204, 'DELETE', `/volumes/${volume.id}`);
  }

  const deviceOf = (volume: VolumeView): [string, string] => ['GET', `/volumes/${volume.id}/device`];
  const linkOf = (volume: VolumeView): string => rig.lab.file('daemon', 'run', 'volumes', volume.id);

  async function found(path: string): Promise<FoundDeviceView | undefined> {
    const { items } = await rig.daemon.expect<{ items: FoundDeviceView[] }>(200, 'GET', '/volumes/devices');
    return items.find(({ devicePath }) => devicePath === path);
  }

  beforeAll(() => {
    undo = new CleanupStack();
  });

  it('a device is found, registered, attached, detached and removed', async () => {
    const device = await connect();
    expect(await found(device.path)).toMatchObject({
      type: 'loop',
      sizeBytes: 16 * MIB,
      identities: [device.identity],
      inUseBy: [],
      volumeId: null,
    });
    const volume = await addVolume(rig.daemon, device.identity, 'archive');
    expect(volume).toMatchObject({
      name: 'archive',
      provider: 'host',
      identity: device.identity,
      sizeBytes: 16 * MIB,
      mapping: null,
      devicePath: device.path,
      problem: null,
    });
    expect(await found(device.path)).toMatchObject({ volumeId: volume.id, inUseBy: [] });
    await expectRefused(rig.daemon, deviceOf(volume), 'CONFLICT');

    const attached = await attach(rig.daemon, volume);
    const deviceNumber = attached.mapping?.deviceNumber;
    expect(attached.mapping).toMatchObject({ devicePath: device.path });
    expect(deviceNumber).toMatch(/^7:\d+$/);
    expect(await rig.daemon.expect(200, ...deviceOf(volume))).toEqual({
      devicePath: device.path,
      deviceNumber,
      sizeBytes: 16 * MIB,
    });
    expect((await found(device.path))?.inUseBy).toEqual(['attached as volume archive']);
    expect(await readlink(linkOf(volume))).toBe(device.path);
    await expectRefused(rig.daemon, ['POST', `/volumes/${volume.id}/attach`], 'CONFLICT');
    await expectRefused(rig.daemon, ['DELETE', `/volumes/${volume.id}`], 'CONFLICT');

    await detach(rig.daemon, volume);
    expect((await showVolume(rig.daemon, volume)).mapping).toBeNull();
    await expect(readlink(linkOf(volume))).rejects.toThrow('ENOENT');
    await expectRefused(rig.daemon, ['POST', `/volumes/${volume.id}/detach`], 'CONFLICT');
    await rig.daemon.expect(204, 'DELETE', `/volumes/${volume.id}`);
    await expectRefused(rig.daemon, ['GET', `/volumes/${volume.id}`], 'NOT_FOUND');
  });

  it('a device is one volume, however it is named', async () => {
    const { device, volume } = await register();
    await expectRefused(
      rig.daemon,
      ['POST', '/volumes', { name: 'again', devicePath: device.path }],
      'CONFLICT',
    );
    const other = await connect();
    await expectRefused(
      rig.daemon,
      ['POST', '/volumes', { name: volume.name, devicePath: other.path }],
      'CONFLICT',
    );
    await expectRefused(
      rig.daemon,
      ['POST', '/volumes', { name: 'nothing', identity: `fs-uuid:${randomUUID()}` }],
      'VOLUME_GONE',
    );
    await expectRefused(
      rig.daemon,
      ['POST', '/volumes', { name: 'file', devicePath: device.file }],
      'INVALID_INPUT',
    );
  });

  it('a blank device has nothing to be known by, and is refused', async () => {
    const file = newFile();
    await makeRaw({ path: file, sizeBytes: MIB });
    const device = undo.use(await connectLoop(file));
    expect((await found(device.path))?.identities).toEqual([]);
    const detail = await expectRefused(
      rig.daemon,
      ['POST', '/volumes', { name: 'blank', devicePath: device.path }],
      'INVALID_INPUT',
    );
    expect(detail).toContain('nothing tells this device from another');
  });

  it('of two attaches at once one wins', async () => {
    const { device, volume } = await register();
    const route = `/volumes/${volume.id}/attach`;
    const answers = await Promise.all([rig.daemon.request('POST', route), rig.daemon.request('POST', route)]);
    const begun = answers.filter(({ status }) => status === 202).map(({ body }) => body as OperationView);
    const ended = await Promise.all(begun.map((operation) => endOf(rig.daemon, operation)));
    expect(ended.filter(({ state }) => state === 'completed')).toHaveLength(1);
    const losers = ended.filter(({ state }) => state !== 'completed');
    expect(losers.map(({ error }) => error?.code)).toEqual(losers.map(() => 'CONFLICT'));
    expect((await showVolume(rig.daemon, volume)).mapping?.devicePath).toBe(device.path);
  });

  it('two devices of one identity are an error that names both, until one of them is attached', async () => {
    const { device, volume } = await register();
    const copy = await connect({ uuid: volume.identity.slice('fs-uuid:'.length) });
    const both = new RegExp(`${device.path} and ${copy.path}`);
    expect((await found(device.path))?.identities).toEqual([]);
    expect(await expectFailing(rig.daemon, volume, { action: 'attach', code: 'VOLUME_MISMATCH' })).toMatch(
      both,
    );
    expect((await showVolume(rig.daemon, volume)).problem?.message).toMatch(both);
    const detail = await expectRefused(
      rig.daemon,
      ['POST', '/volumes', { name: 'copy', devicePath: copy.path }],
      'CONFLICT',
    );
    expect(detail).toMatch(both);

    await copy.disconnect();
    await attach(rig.daemon, volume);
    const again = undo.use(await connectLoop(copy.file));
    // The kernel proves that this is the device that was attached.
    expect(await showVolume(rig.daemon, volume)).toMatchObject({ devicePath: device.path, problem: null });
    expect((await found(again.path))?.volumeId).toBeNull();
    await device.disconnect();
    await again.disconnect();
  });

  it('a device that is in use is not attached', async () => {
    const { device, volume } = await register();
    const refused = (): Promise<string> =>
      expectFailing(rig.daemon, volume, { action: 'attach', code: 'VOLUME_IN_USE' });

    const mountPoint = rig.lab.file(`mnt-${files}`);
    await mkdir(mountPoint);
    await tool('mount', device.path, mountPoint);
    undo.defer(() => tool('umount', mountPoint).catch(() => undefined));
    expect(await refused()).toContain(`mounted at ${mountPoint}`);
    expect((await found(device.path))?.inUseBy).toEqual([`mounted at ${mountPoint}`]);
    await tool('umount', mountPoint);

    const loop = undo.use(await connectLoop(device.path));
    expect(await refused()).toContain(`held by ${loop.path.slice('/dev/'.length)}`);
    await loop.disconnect();

    {
      await using _server = await startQemuNbd({
        image: device.path,
        format: 'raw',
        socketPath: rig.lab.file('writer.sock'),
      });
      expect(await refused()).toContain('open in a qemu process');
    }
    await attach(rig.daemon, volume);
  });

  it('a mount in a namespace of another process is seen too', async () => {
    const { device, volume } = await register();
    const mountPoint = rig.lab.file(`mnt-${files}`);
    await mkdir(mountPoint);
    const child = spawn(
      'unshare',
      ['-m', 'sh', '-c', `mount ${device.path} ${mountPoint} && echo ready && read _`],
      {
        stdio: ['pipe', 'pipe', 'inherit'],
      },
    );
    undo.defer(() => {
      child.stdin.end();
      return new Promise((resolve) => child.once('close', resolve));
    });
    await new Promise((resolve) => child.stdout.once('data', resolve));
    const message = await expectFailing(rig.daemon, volume, { action: 'attach', code: 'VOLUME_IN_USE' });
    expect(message).toContain(`mounted at ${mountPoint}`);
  });

  it('partitions are volumes of their own, and hold their disk', async () => {
    const file = newFile();
    await makeRaw({ path: file, sizeBytes: 16 * MIB });
    const [table, entry] = [randomUUID(), randomUUID()];
    await runTool('sfdisk', ['-q', file], {
      timeoutMs: 10_000,
      input: `label: gpt\nlabel-id: ${table}\nstart=2048, size=8192, uuid=${entry}\n`,
    });
    const disk = undo.use(await connectLoop(file));
    await tool('partx', '-a', disk.path);
    undo.defer(() => tool('partx', '-d', disk.path));
    expect((await found(disk.path))?.identities).toEqual([`pt-uuid:${table}`]);
    const partition = await found(`${disk.path}p1`);
    expect(partition).toMatchObject({ type: 'part', sizeBytes: 4 * MIB, identities: [`part-uuid:${entry}`] });
    const volume = await addVolume(rig.daemon, `${disk.path}p1`, 'partition');
    undo.defer(() => forget(volume));
    expect((await attach(rig.daemon, volume)).mapping?.devicePath).toBe(`${disk.path}p1`);
    await tool('mkfs.ext4', '-q', '-F', disk.path + 'p1');
    // A filesystem on it does not change by what it is known.
    expect((await showVolume(rig.daemon, volume)).problem).toBeNull();

    const mountPoint = rig.lab.file(`mnt-${files}`);
    await mkdir(mountPoint);
    await tool('mount', `${disk.path}p1`, mountPoint);
    undo.defer(() => tool('umount', mountPoint));
    const whole = await addVolume(rig.daemon, disk.path, 'whole');
    undo.defer(() => forget(whole));
    expect(await expectFailing(rig.daemon, whole, { action: 'attach', code: 'VOLUME_IN_USE' })).toContain(
      mountPoint,
    );
  });

  it('a device that is gone is said to be gone, attached or not', async () => {
    const { device, volume } = await register();
    await device.disconnect();
    await expectFailing(rig.daemon, volume, { action: 'attach', code: 'VOLUME_GONE' });
    expect(await showVolume(rig.daemon, volume)).toMatchObject({
      devicePath: null,
      mapping: null,
      problem: { code: 'VOLUME_GONE' },
    });

    const { device: other, volume: attached } = await register();
    await attach(rig.daemon, attached);
    await other.disconnect();
    await expectRefused(rig.daemon, deviceOf(attached), 'VOLUME_GONE');
    expect(await showVolume(rig.daemon, attached)).toMatchObject({
      devicePath: null,
      mapping: { devicePath: other.path },
      problem: { code: 'VOLUME_GONE' },
    });
    await expect(readlink(linkOf(attached))).rejects.toThrow('ENOENT');
  });

  it('another device, or another size, at the path is a mismatch', async () => {
    const { device, volume } = await register();
    await attach(rig.daemon, volume);
    await device.disconnect();
    const stranger = newFile();
    await makeFilesystem({ path: stranger });
    const taken = await connectLoop(stranger, device.path);
    expect(await expectRefused(rig.daemon, deviceOf(volume), 'VOLUME_MISMATCH')).toContain(device.path);
    expect((await showVolume(rig.daemon, volume)).problem?.code).toBe('VOLUME_MISMATCH');
    await taken.disconnect();

    await tool('truncate', '-s', '+1M', device.file);
    const larger = undo.use(await connectLoop(device.file));
    expect(await expectRefused(rig.daemon, deviceOf(volume), 'VOLUME_MISMATCH')).toContain('bytes');
    await detach(rig.daemon, volume);
    // Content can be copied to a larger device: nothing proves that this is the same.
    await expectFailing(rig.daemon, volume, { action: 'attach', code: 'VOLUME_MISMATCH' });
    await larger.disconnect();
  });

  it('a device that was formatted anew is no longer the volume', async () => {
    const { device, volume } = await register();
    await attach(rig.daemon, volume);
    await tool('mkfs.ext4', '-q', '-F', device.path);
    const detail = await expectRefused(rig.daemon, deviceOf(volume), 'VOLUME_MISMATCH');
    expect(detail).toMatch(/is the device of volume .*, but its identity .* is gone from it/);
  });

  it('a device that has another letter is followed, and two that changed places too', async () => {
    const one = await register();
    const two = await register();
    await attach(rig.daemon, one.volume);
    await attach(rig.daemon, two.volume);
    await one.device.disconnect();
    await two.device.disconnect();
    const [first, second] = [one.device.path, two.device.path];
    undo.use(await connectLoop(one.device.file, second));
    undo.use(await connectLoop(two.device.file, first));
    expect(await rig.daemon.expect(200, ...deviceOf(one.volume))).toMatchObject({ devicePath: second });
    expect(await rig.daemon.expect(200, ...deviceOf(two.volume))).toMatchObject({ devicePath: first });
    expect((await showVolume(rig.daemon, one.volume)).mapping?.devicePath).toBe(second);
    expect((await showVolume(rig.daemon, two.volume)).mapping?.devicePath).toBe(first);
    expect(await readlink(linkOf(one.volume))).toBe(second);
  });

  it('a place that another volume left behind can be taken', async () => {
    const one = await register();
    await attach(rig.daemon, one.volume);
    await one.device.disconnect();
    const file = newFile();
    await makeFilesystem({ path: file });
    const device = undo.use(await connectLoop(file, one.device.path));
    const volume = await addVolume(rig.daemon, device.path, 'successor');
    undo.defer(() => forget(volume));
    expect((await attach(rig.daemon, volume)).mapping?.devicePath).toBe(device.path);
    expect((await showVolume(rig.daemon, one.volume)).problem?.code).toBe('VOLUME_GONE');
  });

  it.each([0, 40, 120])(
    'a daemon that is killed %i ms after an attach began leaves no half of it',
    async (ms) => {
      const { device, volume } = await register();
      const begun = await rig.daemon.expect<OperationView>(202, 'POST', `/volumes/${volume.id}/attach`);
      await pause(ms);
      await killDaemon(rig);
      await restart(rig);
      const { state } = await endOf(rig.daemon, begun);
      expect(['completed', 'interrupted']).toContain(state);
      const { mapping } = await showVolume(rig.daemon, volume);
      expect(mapping?.devicePath ?? null).toBe(state === 'completed' ? device.path : null);
      if (mapping === null) await attach(rig.daemon, volume);
      expect(await readlink(linkOf(volume))).toBe(device.path);
    },
  );

  it('a detach of what is not attached any more, and operations that are none, are refused', async () => {
    const { volume } = await register();
    const ended = await operate(rig.daemon, volume, 'attach');
    expect(ended.result).toMatchObject({ kind: 'attach-volume', volumeId: volume.id });
    await expectRefused(rig.daemon, ['GET', `/operations/${volume.id}`], 'NOT_FOUND');
  });
});
