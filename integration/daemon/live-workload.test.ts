import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { RunView } from '../../src/engine/types.js';
import { MIB } from '../../src/lib/units.js';
import { SeededRandom } from '../lab/disk-image.js';
import { startBackup } from './daemon.js';
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
import { expectReadsBack, methodsOf } from './rig.js';

const SEEDS = [11, 22, 33, 44, 55, 66];
const POINTS = 3;

describe.each(HYPERVISORS)('a random workload under $kind', { timeout: 60_000 }, ({ make }) => {
  let rig: LiveRig;

  beforeAll(async () => {
    rig = await startLiveRig();
  });
  afterAll(() => stopLiveRig(rig));

  it.each(SEEDS)('is at every point what it was at that instant (seed %i)', async (seed) => {
    const random = new SeededRandom(seed);
    const machine = await make(rig, { name: `m${seed}` });
    const setup = await setUpDomain(rig, machine);
    const points: { run: RunView; truths: Record<string, string> }[] = [];
    for (let round = 0; round < POINTS; round += 1) {
      const truths = await machine.remember();
      // Slow enough that the writes come while the copy is under way.
      const bytesPerSecond = round === 0 ? 2 * MIB : MIB;
      const run = await startBackup(rig.daemon, setup, { bytesPerSecond });
      await waitPastInstant(rig.daemon, run.id);
      await machine.work(random, random.between(4, 14));
      points.push({ run: await rig.daemon.waitForRun(run.id), truths });
      await machine.work(random, random.between(0, 6));
    }
    expect(points.map(({ run }) => methodsOf(run).join(', '))).toEqual([
      'full FIRST_POINT, full FIRST_POINT',
      'bitmap BITMAP, bitmap BITMAP',
      'bitmap BITMAP, bitmap BITMAP',
    ]);
    for (const { run, truths } of points) await expectReadsBack(rig, run.pointId, truths);
    const last = points.at(-1)?.run;
    if (last !== undefined) await expectNoTrace(rig, machine, [recordOf(last)]);
    await machine.stop();
  });
});
