import { randomUUID } from 'node:crypto';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';
import { CleanupStack } from '../../src/lib/cleanup.js';
import { pollUntil } from '../../src/lib/deadline.js';
import { armGuestTimer } from '../../src/source/guest-timer.js';
import { takeFrozen, type FreezableGuest } from '../../src/source/guest-freeze.js';
import { libvirtAgent, openLibvirtGuest } from '../../src/source/libvirt/libvirt-guest.js';
import { makeLabDirectory, type LabDirectory } from '../lab/directory.js';
import { domainXml } from '../lab/domain-xml.js';
import { makeGuestDisk, startGuest, type LabGuest } from '../lab/guest.js';
import { startLibvirt, type LabLibvirt } from '../lab/libvirt.js';
import {
  dieFrozen,
  frozenMs,
  makeOptions,
  median,
  recordsWritten,
  signal,
  sleep,
  writesGoOn,
} from './freeze-rig.js';

const MIB = 1024 * 1024;
const AGENT_TIMEOUT_MS = 2000;
const ROUNDS = 11;

const cleanup = new CleanupStack();
const uuid = randomUUID();
let lab: LabDirectory;
let libvirt: LabLibvirt;
let lived: LabGuest;
let guest: FreezableGuest;

beforeAll(async () => {
  lab = cleanup.use(await makeLabDirectory());
  libvirt = cleanup.use(await startLibvirt(lab));
  const disks = ['vda', 'vdb'].map((target) => ({ target, path: lab.file(`${target}.qcow2`) }));
  for (const { path } of disks) await makeGuestDisk({ path, sizeBytes: 64 * MIB });
  const domain = { name: 'lived', uuid, disks, serialFile: lab.file('serial') };
  lived = await startGuest(libvirt, { ...domain, mode: 'writer' });
  guest = openLibvirtGuest({ uri: libvirt.uri, uuid, isLocal: true, agentTimeoutMs: AGENT_TIMEOUT_MS });
}, 240_000);

afterAll(() => cleanup.run());

const status = () => lived.agent('guest-fsfreeze-status');

describe('a domain whose agent answers', () => {
  afterEach(async () => {
    expect(await status()).toBe('thawed');
  });

  it('stands still between freeze and thaw, and only then', async () => {
    const options = makeOptions('require');
    const result = await takeFrozen(guest, options, async () => {
      return { frozen: await status(), written: await recordsWritten(lived.console) };
    });
    expect(result).toEqual({ value: { frozen: 'frozen', written: 0 }, consistency: 'application' });
    expect(options.codes()).toEqual(['GUEST_FROZEN']);
    await writesGoOn(lived.console);
  });

  it('is thawed within seconds when whoever froze it is killed', async () => {
    await dieFrozen(['libvirt', libvirt.uri, uuid], async () => {
      expect(await status()).toBe('frozen');
    });
    await pollUntil(async () => ((await status()) === 'thawed' ? true : undefined), {
      ...{ timeoutMs: 5000, intervalMs: 100, what: 'the watchdog thawing' },
    });
    await writesGoOn(lived.console);
  });

  it('is thawed at the limit, while the instant is still being taken', async () => {
    const options = makeOptions('prefer', 2000);
    const result = await takeFrozen(guest, options, async () => {
      const first = await status();
      await pollUntil(async () => ((await status()) === 'thawed' ? true : undefined), {
        ...{ timeoutMs: 5000, intervalMs: 100, what: 'the limit' },
      });
      return first;
    });
    expect(result).toEqual({ value: 'frozen', consistency: 'crash' });
    expect(options.codes()).toEqual(['FREEZE_UNDONE']);
  });

  it('is not called frozen when somebody thawed it in between', async () => {
    const options = makeOptions('require');
    await expect(takeFrozen(guest, options, () => libvirt.virsh('domfsthaw', uuid))).rejects.toMatchObject({
      code: 'FREEZE_FAILED',
      message: expect.stringContaining('somebody thawed') as string,
    });
  });

  it('stays as it is when somebody else holds it frozen', async () => {
    await libvirt.virsh('domfsfreeze', uuid);
    const options = makeOptions('prefer');
    expect((await takeFrozen(guest, options, status)).value).toBe('frozen');
    expect(options.codes()).toEqual(['FREEZE_UNAVAILABLE']);
    expect(await status()).toBe('frozen');
    expect(await guest.thaw({ timeoutMs: 5000 })).toBe(2);
    expect(await guest.thaw({ timeoutMs: 5000 })).toBe(0);
  });

  it('thaws by itself when a timer was armed in it and nobody comes', async () => {
    const agent = libvirtAgent({ uri: libvirt.uri, uuid });
    const timer = await armGuestTimer(agent, { limitMs: 3000, callTimeoutMs: 10_000 });
    expect(timer).toMatchObject({ kind: 'guest', reason: null });
    expect(await guest.freeze({ timeoutMs: 10_000, signal })).toBe(2);
    await writesGoOn(lived.console);
    expect(await guest.thaw({ timeoutMs: 5000 })).toBe(0);
  });

  it('stays frozen beyond the time of a timer that was disarmed', async () => {
    const agent = libvirtAgent({ uri: libvirt.uri, uuid });
    const timer = await armGuestTimer(agent, { limitMs: 3000, callTimeoutMs: 10_000 });
    await timer.disarm();
    await guest.freeze({ timeoutMs: 10_000, signal });
    await sleep(4000);
    expect(await guest.thaw({ timeoutMs: 5000 })).toBe(2);
  });

  it('is frozen for hardly longer than the agent itself needs', async () => {
    const floors: number[] = [];
    const windows: number[] = [];
    for (let round = 0; round < ROUNDS; round += 1) {
      const started = performance.now();
      await libvirt.virsh('domfsfreeze', uuid);
      await libvirt.virsh('domfsthaw', uuid);
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

it('is guarded from within when its libvirt is on another host', async () => {
  const afar = openLibvirtGuest({
    uri: libvirt.uri,
    uuid,
    isLocal: false,
    agentTimeoutMs: AGENT_TIMEOUT_MS,
  });
  const guard = await afar.guard(3000);
  expect([guard.kind, guard.reason]).toEqual(['guest', null]);
  await guard.disarm();
});

describe('a domain whose agent does not answer', () => {
  async function expectNoFreeze(without: FreezableGuest, withinMs: number): Promise<void> {
    const options = makeOptions('prefer');
    const started = performance.now();
    expect(await takeFrozen(without, options, async () => 5)).toEqual({ value: 5, consistency: 'crash' });
    expect(performance.now() - started).toBeLessThan(withinMs);
    expect(options.codes()).toEqual(['FREEZE_UNAVAILABLE']);
    await expect(takeFrozen(without, makeOptions('require'), async () => 5)).rejects.toMatchObject({
      code: 'FREEZE_FAILED',
    });
  }

  it.each([false, true])(
    'because it has none (channel: %s) is backed up without at once',
    async (agentChannel) => {
      const bare = { name: `bare-${agentChannel}`, uuid: randomUUID() };
      await libvirt.define(domainXml({ ...bare, agentChannel }));
      await libvirt.virsh('start', '--paused', bare.name);
      const without = openLibvirtGuest({
        uri: libvirt.uri,
        uuid: bare.uuid,
        isLocal: true,
        agentTimeoutMs: AGENT_TIMEOUT_MS,
      });
      await expectNoFreeze(without, 1500);
      await libvirt.virsh('destroy', bare.name);
    },
  );

  it('because it hangs is waited for no longer than it may take', async () => {
    await lived.agent('guest-exec', { path: '/bin/sh', arg: ['-c', 'sleep 1; kill -STOP $(pidof qemu-ga)'] });
    await sleep(4000);
    await expectNoFreeze(guest, AGENT_TIMEOUT_MS + 1000);
    await writesGoOn(lived.console);
    // What is left waiting in libvirtd holds up nothing but the agent.
    const started = performance.now();
    await libvirt.virsh('suspend', uuid);
    await libvirt.virsh('resume', uuid);
    expect(performance.now() - started).toBeLessThan(5000);
  });
});
