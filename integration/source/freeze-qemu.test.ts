import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { CleanupStack } from '../../src/lib/cleanup.js';
import { takeFrozen } from '../../src/source/guest-freeze.js';
import { openQemuGuest } from '../../src/source/qemu/guest-agent.js';
import { makeLabDirectory, type LabDirectory } from '../lab/directory.js';
import { GuestConsole, makeGuestDisk } from '../lab/guest.js';
import { startQemuGuest, type LabQemu } from '../lab/qemu-guest.js';
import {
  dieFrozen,
  frozenMs,
  makeOptions,
  median,
  recordsWritten,
  signal,
  writesGoOn,
} from './freeze-rig.js';

const MIB = 1024 * 1024;
const ROUNDS = 11;
const options = { agentTimeoutMs: 5000 };

const cleanup = new CleanupStack();
let lab: LabDirectory;
let qemu: LabQemu;
let console: GuestConsole;

beforeAll(async () => {
  lab = cleanup.use(await makeLabDirectory());
  const disks = ['a', 'b'].map((name) => ({ path: lab.file(`${name}.qcow2`), format: 'qcow2' as const }));
  for (const { path } of disks) await makeGuestDisk({ path, sizeBytes: 64 * MIB });
  qemu = cleanup.use(await startQemuGuest(lab, { disks, mode: 'writer' }));
  console = new GuestConsole(qemu.serialFile);
  await console.waitFor(/^hf: record/m);
}, 240_000);

afterAll(() => cleanup.run());

describe('a bare QEMU with a guest agent', () => {
  it('stands still between freeze and thaw, and only then', async () => {
    await using guest = openQemuGuest(qemu.agentSocket, options);
    const wish = makeOptions('require');
    const result = await takeFrozen(guest, wish, () => recordsWritten(console));
    expect(result).toEqual({ value: 0, consistency: 'application' });
    expect(wish.codes()).toEqual(['GUEST_FROZEN']);
    await writesGoOn(console);
  });

  it('is thawed within seconds when whoever froze it is killed', async () => {
    await dieFrozen(['qemu', qemu.agentSocket], async () => {
      expect(await recordsWritten(console)).toBe(0);
    });
    await writesGoOn(console, 5000);
    await using guest = openQemuGuest(qemu.agentSocket, options);
    expect(await guest.thaw({ timeoutMs: 5000 })).toBe(0);
  });

  it('is thawed at the limit, while the instant is still being taken', async () => {
    await using guest = openQemuGuest(qemu.agentSocket, options);
    const wish = makeOptions('prefer', 2000);
    const result = await takeFrozen(guest, wish, () => writesGoOn(console));
    expect(result.consistency).toBe('crash');
    expect(wish.codes()).toEqual(['FREEZE_UNDONE']);
  });

  it('is frozen for hardly longer than the agent itself needs', async () => {
    await using guest = openQemuGuest(qemu.agentSocket, options);
    const floors: number[] = [];
    const windows: number[] = [];
    for (let round = 0; round < ROUNDS; round += 1) {
      const started = performance.now();
      await guest.freeze({ timeoutMs: 10_000, signal });
      await guest.thaw({ timeoutMs: 10_000 });
      floors.push(performance.now() - started);
      windows.push(await frozenMs(guest));
    }
    const [floor, window] = [median(floors), median(windows)];
    process.stdout.write(
      `frozen for ${window.toFixed(0)} ms; freeze and thaw alone ${floor.toFixed(0)} ms\n`,
    );
    expect(window - floor).toBeLessThanOrEqual(200);
  }, 60_000);
});
