import { readdir, rm, statfs, writeFile } from 'node:fs/promises';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';
import { CleanupStack } from '../../src/lib/cleanup.js';
import { pollUntil } from '../../src/lib/deadline.js';
import { MIB } from '../../src/lib/units.js';
import type { LiveDomain } from '../../src/source/libvirt/live-snapshot.js';
import {
  codeOf,
  complete,
  liveSettings,
  lostCode,
  startLiveLab,
  type LiveLab,
  type RigDisk,
  type RigDomain,
} from './libvirt-live-rig.js';

const stack = new CleanupStack();
let lab: LiveLab;

beforeAll(async () => {
  lab = stack.use(await startLiveLab());
});
afterEach(() => lab.endAll());
afterAll(() => stack.run());

describe('the guest is never hurt', () => {
  const sizeBytes = 256 * MIB;

  /** A disk full of data, so that everything overwritten must be kept. */
  async function fullDisk(): Promise<RigDomain> {
    const { domain } = await lab.start([{ target: 'vda', format: 'qcow2', sizeBytes }]);
    for (let at = 0; at < sizeBytes; at += 32 * MIB) await domain.write('vda', 0x55, at, 32 * MIB);
    return domain;
  }

  /** Overwrites the disk as fast as QEMU takes it; answers what QEMU said of writes that failed. */
  async function overwrite(domain: RigDomain): Promise<string[]> {
    const failures: string[] = [];
    const [length, perBatch] = [4 * MIB, 4];
    for (let at = 0; at < sizeBytes; at += perBatch * length) {
      const offsets = Array.from({ length: perBatch }, (_, index) => at + index * length);
      const writes = offsets.map((offset) => ({ target: 'vda', value: 0x66, offset, length }));
      failures.push(...(await domain.writeAll(writes)));
    }
    return failures;
  }

  it('no write of it fails when it fills a scratch directory that is too small', async () => {
    const domain = await fullDisk();
    const live = await domain.live(liveSettings(lab.small.path), lab.directory.path);
    const snapshot = await lab.take(live, domain.request());
    expect(await overwrite(domain)).toEqual([]);
    expect(await lostCode(snapshot)).toBe('SCRATCH_FULL');
    expect(await domain.hasJob()).toBe(false);
    expect(await codeOf(snapshot.close())).toBe('SCRATCH_FULL');
    await snapshot[Symbol.asyncDispose]();
    expect(await domain.checkpoints()).toEqual([]);
    const free = await statfs(lab.small.path);
    expect(free.bavail).toBe(free.blocks);
  });

  it('without the watch they would fail', async () => {
    const domain = await fullDisk();
    const live = await domain.live(liveSettings(lab.small.path), lab.directory.path);
    const blind = {
      ...live,
      host: { ...live.host, capacity: () => Promise.resolve({ totalBytes: 2 ** 40, freeBytes: 2 ** 40 }) },
    };
    await using snapshot = await lab.take(blind, domain.request());
    expect(await overwrite(domain)).toContain('write failed: No space left on device');
    expect(snapshot.lost.aborted).toBe(false);
  });

  it('a place that has no room, or cannot tell, is refused before anything begins', async () => {
    const { domain } = await lab.start();
    await writeFile(`${lab.small.path}/ballast`, Buffer.alloc(160 * MIB));
    const live = await domain.live(liveSettings(lab.small.path), lab.directory.path);
    expect(await codeOf(lab.take(live, domain.request()))).toBe('SCRATCH_FULL');
    await rm(`${lab.small.path}/ballast`);
    const mute = { ...live, host: { ...live.host, capacity: () => Promise.resolve(null) } };
    expect(await codeOf(lab.take(mute, domain.request()))).toBe('SCRATCH_FULL');
    expect(await readdir(lab.small.path)).toEqual([]);
    expect(await domain.hasJob()).toBe(false);
  });

  it('a watch that goes blind ends the job', async () => {
    const { domain, live } = await lab.start();
    let looks = 0;
    const capacity: LiveDomain['host']['capacity'] = (directory, control) => {
      looks += 1;
      return looks > 3 ? Promise.reject(new Error('gone')) : live.host.capacity(directory, control);
    };
    const snapshot = await lab.take({ ...live, host: { ...live.host, capacity } }, domain.request());
    expect(await lostCode(snapshot)).toBe('SNAPSHOT_LOST');
    await pollUntil(async () => ((await domain.hasJob()) ? undefined : true), {
      timeoutMs: 5000,
      what: 'the end of the job by the watch alone',
    });
    await snapshot[Symbol.asyncDispose]();
    await lab.expectNothing(domain);
  });

  it('a disk with an iothread is refused where QEMU would die of it; without that disk it works', async () => {
    const disks: RigDisk[] = [
      { target: 'vda', format: 'qcow2' },
      { target: 'vdb', format: 'qcow2', driver: "iothread='1'" },
    ];
    const { domain, live } = await lab.start(disks, { extra: '<iothreads>1</iothreads>' });
    expect(await codeOf(lab.take(live, domain.request()))).toBe('SOURCE_REFUSED');
    await complete(await lab.take(live, domain.request({ targets: ['vda'] })));
    expect(await domain.checkpoints()).toHaveLength(1);
    await lab.expectNothing(domain);
  });
});
