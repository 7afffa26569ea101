import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { CleanupStack } from '../../src/lib/cleanup.js';
import { MIB } from '../../src/lib/units.js';
import { openTarget } from '../../src/target/open-target.js';
import type { Target } from '../../src/target/target.js';
import { makeRaw } from '../lab/disk-image.js';
import { makeLabDirectory, type LabDirectory } from '../lab/directory.js';
import { connectLoop, type LoopDevice } from '../lab/loop-device.js';
import { startQemuNbd } from '../lab/nbd-server.js';
import { startQemuGuest } from '../lab/qemu-guest.js';

const REQUEST = { sizeBytes: MIB, overwrite: true, signal: new AbortController().signal };

/** A raw disk is shared by qemu with whoever does not ask: the lock must be asked for. */
describe('a device that a qemu has open', () => {
  const undo = new CleanupStack();
  let lab: LabDirectory;
  let device: LoopDevice;
  let target: Target;

  beforeAll(async () => {
    lab = undo.use(await makeLabDirectory());
    await makeRaw({ path: lab.file('disk.raw'), sizeBytes: 16 * MIB });
    device = undo.use(await connectLoop(lab.file('disk.raw')));
    target = openTarget(
      { kind: 'device', path: device.path },
      {
        place: { runtimeDirectory: lab.path, owner: 'test' },
        limits: { connections: 1, connectTimeoutMs: 1000, requestTimeoutMs: 1000 },
        forbiddenDirectories: [],
      },
    );
  });
  afterAll(() => undo.run());

  const refusal = { code: 'TARGET_IN_USE', message: expect.stringContaining('open in a qemu') as string };

  it('as the disk of a guest is not restored to', async () => {
    {
      await using _guest = await startQemuGuest(lab, {
        disks: [{ path: device.path, format: 'raw', isDevice: true }],
        isPaused: true,
      });
      await expect(target.check(REQUEST)).rejects.toMatchObject(refusal);
    }
    await target.check(REQUEST);
  });

  it('to serve it for writing is not restored to', async () => {
    {
      await using _server = await startQemuNbd({
        image: device.path,
        format: 'raw',
        socketPath: lab.file('writer.sock'),
      });
      await expect(target.check(REQUEST)).rejects.toMatchObject(refusal);
    }
    await target.check(REQUEST);
  });
});
