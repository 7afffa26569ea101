import { readdir } from 'node:fs/promises';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { RunView } from '../../src/engine/types.js';
import { pause, pollUntil } from '../../src/lib/deadline.js';
import { KIB } from '../../src/lib/units.js';
import { SeededRandom } from '../lab/disk-image.js';
import { backUp, startBackup, type Setup } from './daemon.js';
import {
  expectNoTrace,
  HYPERVISORS,
  makeDomain,
  recordOf,
  setUpDomain,
  startLiveRig,
  stopLiveRig,
  waitPastInstant,
  type LiveDomain,
  type LiveRig,
} from './live-rig.js';
import {
  expectFailed,
  expectGoodBackup,
  expectReadsBack,
  listPoints,
  methodsOf,
  waitUntilCopying,
} from './rig.js';

const SLOW = { bytesPerSecond: 256 * KIB };
const BITMAP = ['bitmap BITMAP', 'bitmap BITMAP'];
const BROKEN = ['full BITMAP_INCONSISTENT', 'full BITMAP_INCONSISTENT'];
/** A libvirtd that is away is waited for this long. */
const COMMAND_TIMEOUT_MS = 4000;

let rig: LiveRig;
beforeAll(async () => {
  rig = await startLiveRig({ snapshot: { commandTimeoutMs: COMMAND_TIMEOUT_MS } });
});
afterAll(() => stopLiveRig(rig));

/** The next run is right, and leaves its record alone. */
async function expectMethods(
  { machine, setup }: { machine: LiveDomain; setup: Setup },
  methods: string[],
): Promise<RunView> {
  const run = await expectGoodBackup(rig, setup, { truths: machine.truths });
  expect(methodsOf(run)).toEqual(methods);
  await expectNoTrace(rig, machine, [recordOf(run)]);
  return run;
}

/** QEMU writes a record into its image when it ends, and marks it as in use from the next start on. */
async function store(machine: LiveDomain): Promise<void> {
  await machine.stop();
  await machine.start();
}

describe.each(HYPERVISORS)('kill -9 of QEMU under $kind', { timeout: 60_000 }, ({ kind, make }) => {
  it('during the copy fails the run; the next one is full, and the one after that counts on', async () => {
    const random = new SeededRandom(7);
    const machine = await make(rig, { name: `copy-${kind}` });
    const setup = await setUpDomain(rig, machine, `copy-${kind}`);
    await backUp(rig.daemon, setup);
    await store(machine);
    await machine.work(random, 8);
    const run = await startBackup(rig.daemon, setup, { type: 'full', ...SLOW });
    await waitUntilCopying(rig.daemon, run.id);
    await machine.work(random, 3);
    await machine.kill();
    await expectFailed(rig, setup, { run, code: 'SNAPSHOT_LOST' });
    await machine.start();
    await expectMethods({ machine, setup }, BROKEN);
    await machine.work(random, 3);
    await expectMethods({ machine, setup }, BITMAP);
    await machine.stop();
  });

  it('between two runs makes the next one full by itself, and the one after that counts on', async () => {
    const random = new SeededRandom(8);
    const machine = await make(rig, { name: `between-${kind}` });
    const setup = await setUpDomain(rig, machine, `between-${kind}`);
    await backUp(rig.daemon, setup);
    await store(machine);
    await machine.work(random, 4);
    await machine.kill();
    await machine.start();
    await machine.work(random, 4);
    await expectMethods({ machine, setup }, BROKEN);
    await machine.work(random, 3);
    await expectMethods({ machine, setup }, BITMAP);
    await machine.stop();
  });
});

describe('kill -9 of libvirtd during the copy', { timeout: 60_000 }, () => {
  const random = new SeededRandom(9);
  let machine: LiveDomain;
  let setup: Setup;

  beforeAll(async () => {
    machine = await makeDomain(rig, { name: 'orphan' });
    setup = await setUpDomain(rig, machine);
    await backUp(rig.daemon, setup);
  });

  const killDuringCopy = async (): Promise<{ run: RunView; truths: Record<string, string> }> => {
    await machine.work(random, 8);
    const truths = await machine.remember();
    const run = await startBackup(rig.daemon, setup, { type: 'full', bytesPerSecond: 1024 * KIB });
    await waitPastInstant(rig.daemon, run.id);
    await waitUntilCopying(rig.daemon, run.id);
    await machine.work(random, 3);
    await rig.libvirt.kill();
    return { run, truths };
  };

  it('does not matter when it is back in time', async () => {
    const { run, truths } = await killDuringCopy();
    await pause(500);
    await rig.libvirt.restart();
    const ended = await rig.daemon.waitForRun(run.id);
    expect(ended.error).toBeNull();
    await expectReadsBack(rig, run.pointId, truths);
    await expectNoTrace(rig, machine, [recordOf(run)]);
    await machine.work(random, 3);
    await expectMethods({ machine, setup }, BITMAP);
  });

  it('fails the run when it stays away; what was left goes when it is back, and the next run counts on', async () => {
    const points = await listPoints(rig.daemon, setup);
    const { run } = await killDuringCopy();
    const ended = await rig.daemon.waitForRun(run.id);
    expect([ended.state, ended.error?.code]).toEqual(['failed', 'SOURCE_UNREACHABLE']);
    expect(await listPoints(rig.daemon, setup)).toEqual(points);
    expect(await readdir(rig.scratch)).not.toEqual([]);
    await rig.libvirt.restart();
    await pollUntil(async () => ((await readdir(rig.scratch)).length === 0 ? true : undefined), {
      timeoutMs: 25_000,
      intervalMs: 500,
      what: 'what the failed run left to go',
    });
    await expectMethods({ machine, setup }, BITMAP);
  });
});
