import { rm, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { RunView } from '../../src/engine/types.js';
import { MIB } from '../../src/lib/units.js';
import { backUp, startBackup } from './daemon.js';
import {
  expectNoTrace,
  HYPERVISORS,
  recordOf,
  setUpDomain,
  startLiveRig,
  stopLiveRig,
  waitPastInstant,
  type LiveRig,
} from './live-rig.js';
import { expectFailed, expectGoodBackup, methodsOf } from './rig.js';

const SCRATCH_BYTES = 64 * MIB;
const DISK_BYTES = 96 * MIB;
const STEP_BYTES = 2 * MIB;

describe.each(HYPERVISORS)('a small scratch directory under $kind', { timeout: 90_000 }, ({ make }) => {
  let rig: LiveRig;

  beforeAll(async () => {
    const snapshot = { scratchKeepFreePercent: 20, scratchKeepFreeBytes: 8 * MIB };
    rig = await startLiveRig({ snapshot }, { scratchBytes: SCRATCH_BYTES });
  });
  afterAll(() => stopLiveRig(rig));

  it('ends the backup of a guest that writes a lot, and no write of the guest fails', async () => {
    const machine = await make(rig, {
      name: 'busy',
      sizeBytes: DISK_BYTES,
      regions: [{ offset: 0, length: DISK_BYTES }],
    });
    const setup = await setUpDomain(rig, machine);
    const first = await backUp(rig.daemon, setup);

    // The copy would take minutes; the guest overwrites both disks as fast as it can.
    const run = await startBackup(rig.daemon, setup, { type: 'full', bytesPerSecond: 2 * MIB });
    await waitPastInstant(rig.daemon, run.id);
    let written = 0;
    for (let offset = 0; offset < DISK_BYTES && (await isRunning(rig, run)); offset += STEP_BYTES) {
      for (const target of ['vda', 'vdb']) {
        await machine.write(target, `write -P ${1 + (offset % 200)} ${offset} ${STEP_BYTES}`);
        written += STEP_BYTES;
      }
    }
    const ended = await expectFailed(rig, setup, { run, code: 'SCRATCH_FULL' });
    expect(ended.error?.details).toMatchObject({ totalBytes: SCRATCH_BYTES });
    // It was not given up at the first write, and not too late.
    expect(written).toBeGreaterThan(2 * STEP_BYTES);
    expect(ended.error?.details['freeBytes']).toBeGreaterThan(0);
    await expectNoTrace(rig, machine, [recordOf(first)]);

    for (const target of ['vda', 'vdb']) await machine.write(target, `write -P 9 0 ${STEP_BYTES}`);
    const good = await expectGoodBackup(rig, setup, { truths: machine.truths });
    expect(methodsOf(good)).toEqual(['bitmap BITMAP', 'bitmap BITMAP']);
    await machine.stop();
  });

  it('is refused when it is full before the backup begins', async () => {
    const machine = await make(rig, { name: 'late' });
    const setup = await setUpDomain(rig, machine);
    const filler = path.join(rig.scratch, 'somebody-elses');
    await writeFile(filler, Buffer.alloc(SCRATCH_BYTES - 9 * MIB, 1));
    const run = await startBackup(rig.daemon, setup);
    const ended = await rig.daemon.waitForRun(run.id);
    expect([ended.state, ended.error?.code]).toEqual(['failed', 'SCRATCH_FULL']);
    await rm(filler);
    await expectNoTrace(rig, machine, []);
    const good = await expectGoodBackup(rig, setup, { truths: machine.truths });
    await expectNoTrace(rig, machine, [recordOf(good)]);
    await machine.stop();
  });
});

async function isRunning(rig: LiveRig, { id }: RunView): Promise<boolean> {
  return (await rig.daemon.expect<RunView>(200, 'GET', `/runs/${id}`)).endedAt === null;
}
