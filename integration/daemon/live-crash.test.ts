import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { RunStage, RunView } from '../../src/engine/types.js';
import { pause, pollUntil } from '../../src/lib/deadline.js';
import { KIB } from '../../src/lib/units.js';
import { SeededRandom } from '../lab/disk-image.js';
import { expectSettled, killDaemon } from './crash.js';
import { backUp, startBackup, type Setup } from './daemon.js';
import {
  expectNoTrace,
  HYPERVISORS,
  recordOf,
  setUpDomain,
  startLiveRig,
  stopLiveRig,
  traces,
  type LiveDomain,
  type LiveRig,
} from './live-rig.js';
import { expectGoodBackup, methodsOf } from './rig.js';

const STAGES: RunStage[] = ['discover', 'snapshot', 'transfer', 'finalize'];
/** Somebody else's record, and one of another appliance that protects the machine too. */
const FOREIGN = ['somebody-else', 'holdfast-01ARZ3NDEKTSV4RRFFQ69G5FAV'];

describe.each(HYPERVISORS)('kill -9 of the daemon, under $kind', { timeout: 60_000 }, ({ make }) => {
  const random = new SeededRandom(20261121);
  let rig: LiveRig;
  let machine: LiveDomain;
  let setup: Setup;
  let last: RunView;
  let others: string[];

  beforeAll(async () => {
    rig = await startLiveRig();
    machine = await make(rig, { name: 'victim' });
    for (const record of FOREIGN) await machine.addRecord(record);
    const elsewhere = await backUp(rig.daemon, await setUpDomain(rig, machine, 'elsewhere'));
    others = [...FOREIGN, recordOf(elsewhere)];
    setup = await setUpDomain(rig, machine);
    last = await backUp(rig.daemon, setup);
  }, 60_000);
  afterAll(() => stopLiveRig(rig));

  it.each<[RunStage, number]>([
    ['discover', 0],
    ['discover', 150],
    ['snapshot', 0],
    ['snapshot', 80],
    ['snapshot', 160],
    ['snapshot', 320],
    ['transfer', 400],
    ['finalize', 0],
    ['finalize', 60],
  ])('after %s for %i ms', async (stage, delayMs) => {
    await machine.work(random, 6);
    const truths = await machine.remember();
    // In finalize nothing is left to be slow.
    const pace = stage === 'finalize' ? {} : { bytesPerSecond: 128 * KIB };
    const run = await startBackup(rig.daemon, setup, pace);
    await reach(rig, run, stage);
    await pause(delayMs);
    await killDaemon(rig);
    if (stage === 'transfer') expect(await traces(machine)).not.toEqual([]);
    await rig.restart();

    const settled = await expectSettled(rig, setup, { run, truths });
    if (settled.state === 'completed') {
      // The older record goes with the next run.
      const records = await machine.records();
      expect(records).toContain(recordOf(run));
      const both = [...others, recordOf(run), recordOf(last)];
      await expectNoTrace(
        rig,
        machine,
        records.filter((name) => both.includes(name)),
      );
    } else {
      await expectNoTrace(rig, machine, [...others, recordOf(last)]);
    }
    expect(await machine.qmp('query-status')).toMatchObject({ running: false });
    await machine.work(random, 2);
    last = await expectGoodBackup(rig, setup, { truths: machine.truths });
    expect(methodsOf(last)).toEqual(['bitmap BITMAP', 'bitmap BITMAP']);
    await expectNoTrace(rig, machine, [...others, recordOf(last)]);
  });
});

/** Waits until the run is in this stage, or a later one when that was shorter than a look. */
async function reach(rig: LiveRig, { id }: RunView, stage: RunStage): Promise<void> {
  await pollUntil(
    async () => {
      const run = await rig.daemon.expect<RunView>(200, 'GET', `/runs/${id}`);
      if (run.endedAt !== null) return true;
      return run.stage !== null && STAGES.indexOf(run.stage) >= STAGES.indexOf(stage) ? true : undefined;
    },
    { timeoutMs: 20_000, intervalMs: 5, what: `run ${id} reaching ${stage}` },
  );
}
