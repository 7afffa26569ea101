import { cp, truncate } from 'node:fs/promises';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { MIB } from '../../src/lib/units.js';
import { qemuImg } from '../lab/disk-image.js';
import { backUp, type Setup } from './daemon.js';
import {
  DISK_BYTES,
  expectNoTrace,
  HYPERVISORS,
  makeDisk,
  makeDomain,
  recordOf,
  setUpDomain,
  startLiveRig,
  stopLiveRig,
  type LiveDomain,
  type LiveRig,
} from './live-rig.js';
import { expectGoodBackup, expectReadsBack, methodsOf } from './rig.js';

const BITMAP = 'bitmap BITMAP';
const GROWN_BYTES = DISK_BYTES + MIB;

let rig: LiveRig;
beforeAll(async () => {
  rig = await startLiveRig();
});
afterAll(() => stopLiveRig(rig));

/** A backup of what the machine is now: reads back right, with these methods by disk, and leaves its record alone. */
async function expectBackup(domain: LiveDomain, setup: Setup, methods: string[]): Promise<void> {
  const run = await expectGoodBackup(rig, setup, { truths: domain.truths });
  expect(methodsOf(run)).toEqual(methods);
  await expectNoTrace(rig, domain, [recordOf(run)]);
}

const prepare = async (name: string): Promise<{ domain: LiveDomain; setup: Setup }> => {
  const domain = await makeDomain(rig, { name });
  const setup = await setUpDomain(rig, domain);
  await backUp(rig.daemon, setup);
  await domain.write('vda', 'write -P 1 0 64k');
  return { domain, setup };
};

describe('disks that change between two runs', { timeout: 60_000 }, () => {
  it('takes an added disk in full, and goes on with the others; one that is gone is left out', async () => {
    const { domain, setup } = await prepare('added');
    const { image } = await makeDisk(rig, domain, { target: 'vdc' });
    await rig.libvirt.virsh('attach-disk', 'added', image, 'vdc', '--subdriver', 'qcow2', '--persistent');
    await expectBackup(domain, setup, [BITMAP, BITMAP, 'full FIRST_POINT']);
    await domain.write('vdc', 'write -P 2 0 64k');
    await expectBackup(domain, setup, [BITMAP, BITMAP, BITMAP]);
    await domain.stop();
    await rig.libvirt.virsh('detach-disk', 'added', 'vdb', '--config');
    await domain.start();
    delete domain.truths['vdb'];
    await expectBackup(domain, setup, [BITMAP, BITMAP]);
    await domain.stop();
  });

  it('reads a disk that was resized while it ran, and one that grew while it was off', async () => {
    const { domain, setup } = await prepare('grown');
    await rig.libvirt.virsh('blockresize', 'grown', 'vda', `${GROWN_BYTES}B`);
    await truncate(domain.truths['vda'] ?? '', GROWN_BYTES);
    await domain.write('vda', `write -P 3 ${DISK_BYTES - 65536} 128k`);
    const live = await expectGoodBackup(rig, setup, { truths: domain.truths });
    expect(methodsOf(live)[1]).toBe(BITMAP);
    await domain.stop();
    await qemuImg(['resize', '-q', '-f', 'qcow2', domain.images['vdb'] ?? '', String(GROWN_BYTES)]);
    await truncate(domain.truths['vdb'] ?? '', GROWN_BYTES);
    await domain.start();
    await domain.write('vdb', `write -P 4 ${DISK_BYTES} 64k`);
    const off = await expectGoodBackup(rig, setup, { truths: domain.truths });
    expect(methodsOf(off)[0]).toBe(BITMAP);
    await expectNoTrace(rig, domain, [recordOf(off)]);
    await domain.write('vdb', 'write -P 5 0 64k');
    await expectBackup(domain, setup, [BITMAP, BITMAP]);
    await domain.stop();
  });

  it('takes a disk in full that has another file, and compares one that became raw', async () => {
    const { domain, setup } = await prepare('replaced');
    await domain.stop();
    const vdb = await makeDisk(rig, domain, { target: 'vdb', regions: [{ offset: MIB, length: MIB }] });
    await redefine('replaced', (xml) => xml.replace(/[^']*replaced-vdb[^']*\.qcow2/, vdb.image));
    await domain.start();
    await expectBackup(domain, setup, [BITMAP, 'full DISK_REPLACED']);
    await domain.stop();

    // The same file by its name, of another format.
    const image = domain.images['vdb'] ?? '';
    await cp(domain.truths['vdb'] ?? '', image);
    await redefine('replaced', (xml) =>
      xml.replace(
        /(<disk (?:(?!<\/disk>)[^])*?)type='qcow2'((?:(?!<\/disk>)[^])*?target dev='vdb')/,
        "$1type='raw'$2",
      ),
    );
    await domain.start();
    await domain.write('vdb', 'write -P 9 0 64k');
    await expectBackup(domain, setup, [BITMAP, 'compare NO_CHANGE_RECORD']);
    await domain.stop();
  });

  const redefine = async (name: string, change: (xml: string) => string): Promise<void> => {
    const before = await rig.libvirt.virsh('dumpxml', '--inactive', name);
    const after = change(before);
    expect(after).not.toBe(before);
    await rig.libvirt.define(after);
  };
});

describe.each(HYPERVISORS)('an older image put back, under $kind', { timeout: 60_000 }, ({ kind, make }) => {
  it('is not read by the older record that it carries', async () => {
    const domain = await make(rig, { name: `back-${kind}` });
    const setup = await setUpDomain(rig, domain, `back-${kind}`);
    await backUp(rig.daemon, setup);
    await domain.write('vda', 'write -P 1 0 64k');
    await domain.stop();
    const older = { image: rig.lab.file(`older-${kind}.qcow2`), truth: rig.lab.file(`older-${kind}.truth`) };
    await cp(domain.images['vda'] ?? '', older.image);
    await cp(domain.truths['vda'] ?? '', older.truth);
    await domain.start();
    await domain.write('vda', 'write -P 2 1M 64k');
    const second = await backUp(rig.daemon, setup);
    const before = await domain.remember();
    await domain.stop();
    await cp(older.image, domain.images['vda'] ?? '');
    await cp(older.truth, domain.truths['vda'] ?? '');
    await domain.start();
    await domain.write('vda', 'write -P 3 2M 64k');
    // libvirt does not tell a bitmap that is missing from one that is broken.
    const reason = kind === 'libvirt' ? 'full BITMAP_INCONSISTENT' : 'compare BITMAP_MISSING';
    await expectBackup(domain, setup, [reason, BITMAP]);
    await expectReadsBack(rig, second.pointId, before);
    await expectBackup(domain, setup, [BITMAP, BITMAP]);
    await domain.stop();
  });
});

describe('a domain that is off', { timeout: 60_000 }, () => {
  it('and whose image is put back behind a point that made no record of its own reads back right', async () => {
    const { domain, setup } = await prepare('asleep');
    await domain.stop();
    const older = { image: rig.lab.file('older.qcow2'), truth: rig.lab.file('older.truth') };
    await cp(domain.images['vda'] ?? '', older.image);
    await cp(domain.truths['vda'] ?? '', older.truth);
    await domain.start();
    await domain.write('vda', 'write -P 2 1M 64k');
    await domain.stop();
    // The record of the first point goes on; the older image has it too, without the last write.
    const off = await backUp(rig.daemon, setup);
    expect(methodsOf(off)).toEqual([BITMAP, BITMAP]);
    await cp(older.image, domain.images['vda'] ?? '');
    await cp(older.truth, domain.truths['vda'] ?? '');
    await expectGoodBackup(rig, setup, { truths: domain.truths });
    await domain.start();
    await expectGoodBackup(rig, setup, { truths: domain.truths });
    await domain.stop();
  });
});
