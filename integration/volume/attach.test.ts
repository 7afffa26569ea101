import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { ActiveRun } from '../../src/engine/active-run.js';
import type { EngineContext } from '../../src/engine/context.js';
import type { RunResult } from '../../src/engine/types.js';
import type { VolumeFacts } from '../../src/engine/volume-device.js';
import { executeAttachVolume } from '../../src/engine/volume-runs.js';
import { holdDevice, holdVolume } from '../../src/engine/volume-use.js';
import { CleanupStack } from '../../src/lib/cleanup.js';
import type { VolumeId } from '../../src/lib/id.js';
import { MIB } from '../../src/lib/units.js';
import { hostProvider, type BlockDevice } from '../../src/volume/index.js';
import { openEngineContext } from '../../test/engine/engine-context.js';
import { runRow, volumeRow } from '../../test/contract/database-fixture.js';
import { makeLabDirectory, type LabDirectory } from '../lab/directory.js';
import { connectLoop, makeFilesystem, type LoopDevice } from '../lab/loop-device.js';
import { tool } from './volume-rig.js';

const WWN = 'wwn:0x5000c500a1b2c3d4';
const never = new AbortController().signal;

/** A device in the engine's hands, with what a loop device lacks. */
describe('taking a device', () => {
  let undo: CleanupStack;
  let lab: LabDirectory;
  let context: EngineContext;
  let loop: LoopDevice;
  let identity: string;
  /** Called when the devices were listed and before anything is done with them. */
  let whenListed: () => Promise<void>;

  beforeEach(async () => {
    undo = new CleanupStack();
    lab = undo.use(await makeLabDirectory());
    const file = lab.file('disk.raw');
    identity = `fs-uuid:${await makeFilesystem({ path: file })}`;
    loop = undo.use(await connectLoop(file));
    whenListed = () => Promise.resolve();
    context = await openEngineContext(lab.path, {
      volumeProvider: {
        name: 'host',
        async list(control) {
          const devices = (await hostProvider.list(control)).map((device) =>
            device.devicePath === loop.path ? { ...device, identities: [WWN, ...device.identities] } : device,
          );
          await whenListed();
          return devices;
        },
      },
    });
    undo.use(context.db);
  });
  afterEach(() => undo.run());

  async function register(by: string): Promise<VolumeId> {
    const facts: VolumeFacts = { type: 'loop', model: null, identities: [], instance: null, goneSince: null };
    const { mapping, ...row } = volumeRow({ identity: by, sizeBytes: 16 * MIB, facts });
    expect(mapping).toBeNull();
    await context.db.volumes.insert(row);
    return row.id;
  }

  async function attach(volumeId: VolumeId): Promise<RunResult> {
    const row = runRow({
      kind: 'attach-volume',
      state: 'running',
      workerId: context.workerId,
      request: { kind: 'attach-volume', volumeId },
    });
    await context.db.runs.insert(row, { turn: 'none' });
    await using run = new ActiveRun(context, row, never);
    return await executeAttachVolume(context, run);
  }

  async function grow(): Promise<void> {
    await tool('truncate', '-s', '24M', loop.file);
    await tool('losetup', '-c', loop.path);
  }

  it('a device that grew is still the volume where its identity is its own, not where that can be copied', async () => {
    const byDevice = await register(WWN);
    await grow();
    expect(await attach(byDevice)).toMatchObject({ devicePath: loop.path });
    expect((await context.db.volumes.get(byDevice))?.sizeBytes).toBe(24 * MIB);
    await context.db.volumes.detach(byDevice);

    const byContent = await register(identity);
    await expect(attach(byContent)).rejects.toMatchObject({ code: 'VOLUME_MISMATCH' });
    expect((await context.db.volumes.get(byContent))?.mapping).toBeNull();
  });

  it('a device that grows while it is attached is a mismatch until it is attached anew', async () => {
    const id = await register(WWN);
    await attach(id);
    await grow();
    const use = { use: 'read', self: 'test', signal: never } as const;
    await expect(holdVolume(context, id, use)).rejects.toMatchObject({ code: 'VOLUME_MISMATCH' });
    await context.db.volumes.detach(id);
    await attach(id);
    await using held = await holdVolume(context, id, use);
    expect(held.device.sizeBytes).toBe(24 * MIB);
  });

  it('a device that becomes another after it was looked at is not taken', async () => {
    const id = await register(WWN);
    await attach(id);
    const stranger = lab.file('stranger.raw');
    await makeFilesystem({ path: stranger });
    whenListed = async () => {
      whenListed = () => Promise.resolve();
      await loop.disconnect();
      undo.use(await connectLoop(stranger, loop.path));
    };
    const use = { use: 'write', self: 'test', signal: never } as const;
    await expect(holdVolume(context, id, use)).rejects.toMatchObject({
      code: 'VOLUME_MISMATCH',
      message: expect.stringContaining('changed while it was looked at') as string,
    });
  });

  it('a device that is held keeps its path from others', async () => {
    const find = async (): Promise<BlockDevice | undefined> =>
      (await hostProvider.list({ signal: never })).find(({ devicePath }) => devicePath === loop.path);
    const device = await find();
    expect(device?.identities).toEqual([identity]);
    const held = await holdDevice(device!);
    await loop.disconnect();
    const other = lab.file('other.raw');
    await makeFilesystem({ path: other });
    await expect(connectLoop(other, loop.path)).rejects.toThrow(/busy/);
    expect((await find())?.instance).toBe(device?.instance);
    await held[Symbol.asyncDispose]();
    const taken = undo.use(await connectLoop(other, loop.path));
    expect(taken.path).toBe(loop.path);
    expect((await find())?.instance).not.toBe(device?.instance);
  });
});
