import { afterAll, beforeAll, expect, it } from 'vitest';
import type { RepositoryView } from '../../src/engine/types.js';
import { VirshSession } from '../../src/libvirt/virsh-session.js';
import { median } from '../source/freeze-rig.js';
import { backUp, type Setup } from './daemon.js';
import { expectWritesOn, pointOf, startWriter } from './guest-rig.js';
import { discoverOne, startLiveRig, stopLiveRig, type LiveRig } from './live-rig.js';
import type { LabGuest } from '../lab/guest.js';

const ROUNDS = 9;
const LIMIT_MS = 200;

let rig: LiveRig;
let guest: LabGuest;
let setup: Setup;

beforeAll(async () => {
  rig = await startLiveRig();
  guest = await startWriter(rig, 'frozen');
  const repository = await rig.daemon.expect<RepositoryView>(201, 'POST', '/repositories', {
    name: 'figures',
    root: rig.lab.file('repository'),
  });
  setup = { repository, vm: await discoverOne(rig.daemon, rig.libvirt.uri, 'frozen') };
  await backUp(rig.daemon, setup);
}, 240_000);

afterAll(() => stopLiveRig(rig));

/** What the agent needs for itself: freeze and thaw with nothing in between. */
async function measureFloor(): Promise<number> {
  const options = { uri: rig.libvirt.uri, timeoutMs: 30_000 };
  await using virsh = await VirshSession.open(options);
  const startMs = performance.now();
  await virsh.run(['domfsfreeze', '--domain', 'frozen'], options);
  await virsh.run(['domfsthaw', '--domain', 'frozen'], options);
  return performance.now() - startMs;
}

it('a backup freezes a writing guest for hardly longer than its agent needs', async () => {
  const floors: number[] = [];
  const frozen: number[] = [];
  for (let round = 0; round < ROUNDS; round += 1) {
    floors.push(await measureFloor());
    const run = await backUp(rig.daemon, setup, { consistency: 'require' });
    const { log } = await pointOf(rig.daemon, run);
    const frozenMs = log.find(({ code }) => code === 'GUEST_FROZEN')?.details['frozenMs'];
    frozen.push(Number(frozenMs));
    await expectWritesOn(guest.console);
  }
  const [floor, window] = [median(floors), median(frozen)];
  process.stdout.write(`frozen for ${window.toFixed(0)} ms, freeze and thaw alone ${floor.toFixed(0)} ms\n`);
  expect(window - floor).toBeLessThanOrEqual(LIMIT_MS);
}, 180_000);
