import { mkdir, readdir, writeFile } from 'node:fs/promises';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';
import { CleanupStack } from '../../src/lib/cleanup.js';
import { cancelled } from '../../src/lib/deadline.js';
import { runTool } from '../../src/lib/process.js';
import { bitmapNameFor } from '../../src/source/bitmap-name.js';
import { listCheckpoints, removeCheckpoint } from '../../src/source/libvirt/checkpoints.js';
import { cleanUpDomain } from '../../src/source/libvirt/clean-up.js';
import type { LiveDomain } from '../../src/source/libvirt/live-snapshot.js';
import { startLibvirt } from '../lab/libvirt.js';
import {
  codeOf,
  complete,
  lostCode,
  startLiveLab,
  type LiveLab,
  type RigDisk,
  type RigDomain,
} from './libvirt-live-rig.js';

const K64 = 65_536;
const THREE: RigDisk[] = [
  { target: 'vda', format: 'qcow2' },
  { target: 'vdb', format: 'qcow2' },
  { target: 'vdc', format: 'raw' },
];
const stack = new CleanupStack();
let lab: LiveLab;

beforeAll(async () => {
  lab = stack.use(await startLiveLab());
});
afterEach(() => lab.endAll());
afterAll(() => stack.run());

async function qemuImg(...args: string[]): Promise<string> {
  return (await runTool('qemu-img', args, { timeoutMs: 10_000 })).stdout;
}

async function storedBitmaps(image: string): Promise<string[]> {
  const info = JSON.parse(await qemuImg('info', '-f', 'qcow2', '--output=json', '--', image)) as {
    'format-specific': { data: { bitmaps?: { name: string }[] } };
  };
  return (info['format-specific'].data.bitmaps ?? []).map(({ name }) => name);
}

/** As somebody else's tool would: a checkpoint of its own, made with a backup that ends at once. */
async function foreignCheckpoint(domain: RigDomain, name: string): Promise<void> {
  const disks = domain.disks.map(({ target }) => `<disk name='${target}' checkpoint='bitmap'/>`).join('');
  const file = lab.directory.file('foreign-checkpoint');
  await writeFile(file, `<domaincheckpoint><name>${name}</name><disks>${disks}</disks></domaincheckpoint>`);
  await domain.run('checkpoint-create', '--xmlfile', file);
}

async function foreignBackup(domain: RigDomain): Promise<void> {
  await mkdir(lab.directory.file('foreign'), { recursive: true });
  const disks = domain.disks.map(
    ({ target }) =>
      `<disk name='${target}' type='file'><scratch file='${lab.directory.file('foreign', target)}'/></disk>`,
  );
  const server = `<server transport='unix' socket='${lab.directory.file('foreign', 'nbd')}'/>`;
  const file = lab.directory.file('foreign-backup');
  await writeFile(file, `<domainbackup mode='pull'>${server}<disks>${disks.join('')}</disks></domainbackup>`);
  await domain.run('backup-begin', '--backupxml', file);
}

async function brokenNames(live: LiveDomain): Promise<string[]> {
  const all = await listCheckpoints(live.link, () => true, {});
  return all.filter(({ disks }) => disks.some(({ isBroken }) => isBroken === true)).map(({ name }) => name);
}

describe('a snapshot of a running domain', () => {
  it('shows all disks, qcow2 and raw, as they were at one instant while the guest writes on', async () => {
    const { domain, live } = await lab.start(THREE);
    for (const { target } of domain.disks) await domain.write(target, 0xaa, 0, 1024 * 1024);
    const request = domain.request();
    const expected = domain.disks.map(({ target }) => domain.now(target));
    const snapshot = await lab.take(live, request);
    expect(snapshot.consistency).toBe('crash');
    for (const [index, { target }] of domain.disks.entries())
      await domain.write(target, index + 1, K64, 5 * K64);
    for (const [index, { target }] of domain.disks.entries()) {
      expect((await domain.read(snapshot, target)).equals(expected[index] ?? Buffer.of())).toBe(true);
    }
    expect(snapshot.lost.aborted).toBe(false);
    const own = bitmapNameFor(request.pointId);
    expect([...snapshot.disks.values()].map(({ changeIdTo }) => changeIdTo)).toEqual([own, own, own]);
    const [checkpoint] = await listCheckpoints(live.link, () => true, {});
    expect(checkpoint?.disks).toEqual([
      { target: 'vda', bitmap: own, isBroken: false, dirtyBytes: 5 * K64 },
      { target: 'vdb', bitmap: own, isBroken: false, dirtyBytes: 5 * K64 },
    ]);
    await complete(snapshot);
    expect(await domain.checkpoints()).toEqual([own]);
    await lab.expectNothing(domain);
  });

  it('disposal without a point leaves no job, checkpoint, file or socket', async () => {
    const { domain, live } = await lab.start();
    const snapshot = await lab.take(live, domain.request());
    expect(await domain.checkpoints()).toHaveLength(1);
    await snapshot[Symbol.asyncDispose]();
    await snapshot[Symbol.asyncDispose]();
    expect(await domain.checkpoints()).toEqual([]);
    await lab.expectNothing(domain);
  });

  it.each([0, 10, 30, null])(
    'given up %s ms into its beginning, or right after, leaves nothing',
    async (delayMs) => {
      const { domain, live } = await lab.start();
      const giveUp = new AbortController();
      const stop = (): void => {
        giveUp.abort(cancelled());
      };
      const guest: ReturnType<LiveDomain['openGuest']> = {
        ping: () => Promise.resolve(),
        freeze: () => {
          if (delayMs !== null) setTimeout(stop, delayMs);
          return Promise.resolve(1);
        },
        thaw: () => {
          stop();
          return Promise.resolve(1);
        },
        guard: () => Promise.resolve({ kind: 'process', reason: null, disarm: () => Promise.resolve() }),
      };
      const request = { ...domain.request(), consistency: 'prefer' as const, signal: giveUp.signal };
      expect(await codeOf(lab.take({ ...live, openGuest: () => guest }, request))).toBe('CANCELLED');
      expect(await domain.checkpoints()).toEqual([]);
      await lab.expectNothing(domain);
    },
  );
});

describe('changes', () => {
  it('two repositories and a stranger count for themselves; removing one in the middle changes no other', async () => {
    const { domain, live } = await lab.start();
    const one = domain.request();
    await complete(await lab.take(live, one));
    await domain.write('vda', 1, 0, K64);
    await foreignCheckpoint(domain, 'stranger');
    await domain.write('vda', 2, 4 * K64, 1);
    const other = domain.request();
    await complete(await lab.take(live, other));
    await domain.write('vda', 3, 8 * K64 - 1, 2);
    await domain.write('vdb', 3, 9 * K64, K64);
    const [first, second] = [bitmapNameFor(one.pointId), bitmapNameFor(other.pointId)];
    const next = domain.request({ since: { vda: second } });
    const snapshot = await lab.take(live, next);
    await domain.write('vda', 4, 20 * K64, K64);
    expect(await domain.dirtyBlocks(snapshot, 'vda')).toEqual([7, 8]);
    expect(domain.endpoint(snapshot, 'vdb').dirtyContext).toBeNull();
    await complete(snapshot, [second]);
    expect(domain.notes).toEqual([]);
    const third = bitmapNameFor(next.pointId);
    expect((await domain.checkpoints()).sort()).toEqual([first, third, 'stranger'].sort());
    const last = await lab.take(live, domain.request({ since: { vda: first, vdb: third } }));
    expect(await domain.dirtyBlocks(last, 'vda')).toEqual([0, 4, 7, 8, 20]);
    expect(await domain.dirtyBlocks(last, 'vdb')).toEqual([]);
    await last[Symbol.asyncDispose]();
    expect(await brokenNames(live)).toEqual([]);
    expect(await domain.checkpoints()).toHaveLength(3);
    await lab.expectNothing(domain);
  });

  it('a record that is not there, or a disk that grew, is refused and leaves nothing', async () => {
    const { domain, live } = await lab.start();
    const gone = domain.request({ since: { vda: 'holdfast-gone' } });
    expect(await codeOf(lab.take(live, gone))).toBe('BITMAP_MISSING');
    const request = domain.request();
    const grown = request.disks.map((wanted) => ({
      ...wanted,
      probe: { ...wanted.probe, sizeBytes: wanted.probe.sizeBytes - K64 },
    }));
    expect(await codeOf(lab.take(live, { ...request, disks: grown }))).toBe('SOURCE_SIZE_MISMATCH');
    expect(await domain.checkpoints()).toEqual([]);
    await lab.expectNothing(domain);
  });
});

describe('checkpoints that broke', () => {
  it('a QEMU that was killed leaves broken ones: ours go on request, the stranger keeps its own', async () => {
    const { domain, live } = await lab.start();
    const request = domain.request();
    await complete(await lab.take(live, request));
    await foreignCheckpoint(domain, 'stranger');
    const own = bitmapNameFor(request.pointId);
    await domain.run('destroy');
    await domain.start();
    expect(await brokenNames(live)).toEqual([]);
    await lab.libvirt.killQemu(domain.name);
    await domain.start();
    expect((await brokenNames(live)).sort()).toEqual([own, 'stranger'].sort());
    const since = domain.request({ since: { vda: own } });
    expect(await codeOf(lab.take(live, since))).toBe('BITMAP_INCONSISTENT');
    const next = domain.request({ brokenRecords: [own] });
    await complete(await lab.take(live, next));
    expect((await domain.checkpoints()).sort()).toEqual([bitmapNameFor(next.pointId), 'stranger'].sort());
    expect(await brokenNames(live)).toEqual(['stranger']);
    await lab.expectNothing(domain);
  });

  it('one that lost a bitmap, or that libvirt forgot, goes with all that is left of it', async () => {
    const { domain, live } = await lab.start();
    for (const name of ['half', 'forgotten', 'kept']) await foreignCheckpoint(domain, name);
    await domain.run('destroy');
    await qemuImg('bitmap', '--remove', '-f', 'qcow2', '--', domain.image('vda'), 'half');
    await domain.run('checkpoint-delete', '--metadata', '--checkpointname', 'forgotten');
    await domain.start();
    expect(await brokenNames(live)).toEqual(['half']);
    await removeCheckpoint(live, 'half');
    await removeCheckpoint(live, 'forgotten');
    await removeCheckpoint(live, 'never-there');
    expect(await domain.checkpoints()).toEqual(['kept']);
    expect(await brokenNames(live)).toEqual([]);
    await domain.run('destroy');
    expect(await storedBitmaps(domain.image('vda'))).toEqual(['kept']);
    expect(await storedBitmaps(domain.image('vdb'))).toEqual(['kept']);
  });

  it('one of a machine that is off goes, image and all, and one of a machine that is gone is no error', async () => {
    const { domain, live } = await lab.start();
    for (const name of ['one', 'two']) await foreignCheckpoint(domain, name);
    await domain.run('destroy');
    await removeCheckpoint(live, 'one');
    await removeCheckpoint(live, 'one');
    expect(await domain.checkpoints()).toEqual(['two']);
    expect(await storedBitmaps(domain.image('vdb'))).toEqual(['two']);
    await removeCheckpoint(live, 'two');
    await domain.run('undefine');
    await removeCheckpoint(live, 'two');
  });

  it('a machine that was migrated has none any more, and the next snapshot there is right', async () => {
    await using other = await startLibvirt(lab.directory, { name: 'lv2' });
    const { domain, live } = await lab.start();
    const [before, after] = [domain.request(), domain.request()];
    await complete(await lab.take(live, before));
    await domain.write('vda', 1, 0, K64);
    await lab.libvirt.migrate(domain.name, other);
    const there = { ...live, link: { ...live.link, uri: other.uri } };
    expect(await listCheckpoints(there.link, () => true, {})).toEqual([]);
    const snapshot = await lab.take(there, after);
    expect((await domain.read(snapshot, 'vda')).equals(domain.now('vda'))).toBe(true);
    await complete(snapshot, [bitmapNameFor(before.pointId)]);
    expect(domain.notes).toEqual([]);
    expect((await other.virsh('checkpoint-list', domain.name, '--name')).trim()).toBe(
      bitmapNameFor(after.pointId),
    );
  });
});

describe('the job', () => {
  it("somebody else's is left alone and refused as busy", async () => {
    const { domain, live } = await lab.start();
    await foreignBackup(domain);
    const request = domain.request();
    expect(await codeOf(lab.take(live, request))).toBe('SOURCE_BUSY');
    await cleanUpDomain(
      { ...live, base: lab.settings.snapshot.scratchDirectory },
      { ...request, isCommitted: false },
    );
    expect(await domain.hasJob()).toBe(true);
    expect(await domain.checkpoints()).toEqual([]);
    await domain.run('domjobabort');
  });

  it('when somebody aborts it the snapshot is lost, and closing says so', async () => {
    const { domain, live } = await lab.start();
    const snapshot = await lab.take(live, domain.request());
    const unnoticed = await lab.start();
    const other = await lab.take(unnoticed.live, unnoticed.domain.request());
    await domain.run('domjobabort');
    await unnoticed.domain.run('domjobabort');
    // At once: the abort is still under way.
    expect(await codeOf(other.close())).toBe('SNAPSHOT_LOST');
    expect(await lostCode(snapshot)).toBe('SNAPSHOT_LOST');
    expect(await codeOf(snapshot.close())).toBe('SNAPSHOT_LOST');
    for (const one of [snapshot, other]) await one[Symbol.asyncDispose]();
    for (const one of [domain, unnoticed.domain]) {
      expect(await one.checkpoints()).toEqual([]);
      await lab.expectNothing(one);
    }
  });

  it('a QEMU killed in the middle: lost, nothing left, the next one is right', async () => {
    const { domain, live } = await lab.start();
    const snapshot = await lab.take(live, domain.request());
    await lab.libvirt.killQemu(domain.name);
    expect(await lostCode(snapshot)).toBe('SNAPSHOT_LOST');
    await snapshot[Symbol.asyncDispose]();
    expect(await domain.checkpoints()).toEqual([]);
    expect(await readdir(lab.settings.snapshot.scratchDirectory)).toEqual([]);
    await domain.start();
    await domain.write('vda', 7, 0, K64);
    const next = await lab.take(live, domain.request());
    expect((await domain.read(next, 'vda')).equals(domain.now('vda'))).toBe(true);
    await complete(next);
    await lab.expectNothing(domain);
  });

  it('a libvirtd killed and restarted in the middle costs nothing', async () => {
    const { domain, live } = await lab.start();
    const request = domain.request();
    const snapshot = await lab.take(live, request);
    await lab.libvirt.kill();
    const before = domain.now('vda');
    const read = await domain.read(snapshot, 'vda');
    const closing = snapshot.close();
    await lab.libvirt.restart();
    await closing;
    expect(read.equals(before)).toBe(true);
    await complete(snapshot);
    expect(await domain.checkpoints()).toEqual([bitmapNameFor(request.pointId)]);
    await lab.expectNothing(domain);
  });

  it('what a killed daemon left is ended by run and point, also when the machine is off by then', async () => {
    const base = lab.settings.snapshot.scratchDirectory;
    const { domain, live } = await lab.start();
    const request = domain.request();
    const snapshot = await lab.take(live, request);
    const stranger = domain.request();
    await cleanUpDomain({ ...live, base }, { ...stranger, isCommitted: false });
    expect(await domain.hasJob()).toBe(true);
    await cleanUpDomain({ ...live, base }, { ...request, isCommitted: true });
    expect(await domain.checkpoints()).toEqual([bitmapNameFor(request.pointId)]);
    await lab.expectNothing(domain);
    await cleanUpDomain({ ...live, base }, { ...request, isCommitted: false });
    expect(await domain.checkpoints()).toEqual([]);
    expect(await codeOf(snapshot.close())).toBe('SNAPSHOT_LOST');
    await snapshot[Symbol.asyncDispose]();
    const again = domain.request();
    const dying = await lab.take(live, again);
    await domain.run('destroy');
    await cleanUpDomain({ ...live, base }, { ...again, isCommitted: false });
    expect(await domain.checkpoints()).toEqual([]);
    expect(await storedBitmaps(domain.image('vda'))).toEqual([]);
    await dying[Symbol.asyncDispose]();
    expect(await readdir(base)).toEqual([]);
  });
});
