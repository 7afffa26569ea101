import { readdir, readFile, writeFile } from 'node:fs/promises';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { errnoOf } from '../../src/lib/errors.js';
import { MIB } from '../../src/lib/units.js';
import { runTool } from '../../src/lib/process.js';
import { makeLabDirectory, type LabDirectory } from './directory.js';
import { makeQcow2, qemuImg } from './disk-image.js';
import { domainXml } from './domain-xml.js';
import { makeGuestDisk, startGuest, verifyInGuest, GuestConsole } from './guest.js';
import { findBlockLeftovers, findDescendants, findLeftovers } from './leftovers.js';
import { startLibvirt, type LabLibvirt } from './libvirt.js';
import { nbdUnixUri } from './nbd-server.js';
import { startQemuGuest } from './qemu-guest.js';

const GUEST_TIMEOUT_MS = 120_000;
const DIRECTORIES = ['/run', '/var/lib', '/var/log', '/var/cache', '/etc'];

let lab: LabDirectory;
let machineBefore: Record<string, string[]>;
beforeAll(async () => {
  machineBefore = await listMachine();
  lab = await makeLabDirectory();
});
afterAll(async () => {
  const left = await findLeftovers(lab.path);
  await lab[Symbol.asyncDispose]();
  expect(left).toEqual([]);
  expect(await findDescendants()).toEqual([]);
  expect(await listMachine()).toEqual(machineBefore);
});

/** The machine's own libvirt directories, also when there are none. */
async function listMachine(): Promise<Record<string, string[]>> {
  const found: Record<string, string[]> = {};
  for (const parent of DIRECTORIES) {
    try {
      found[parent] = (await readdir(`${parent}/libvirt`, { recursive: true })).sort();
    } catch (error) {
      if (errnoOf(error) !== 'ENOENT') throw error;
    }
  }
  return found;
}

async function startPaused(libvirt: LabLibvirt, name: string): Promise<void> {
  await makeQcow2({ path: lab.file(`${name}.qcow2`), sizeBytes: 16 * MIB });
  await libvirt.define(
    domainXml({ name, disks: [{ target: 'vda', path: lab.file(`${name}.qcow2`), serial: 'S1' }] }),
  );
  await libvirt.virsh('start', '--paused', name);
}

describe('a private libvirtd', () => {
  test('backs up a paused domain that is written to from outside', async () => {
    await using libvirt = await startLibvirt(lab);
    await startPaused(libvirt, 'd1');
    await libvirt.write('d1', 'vda', 'write -P 0xaa 1M 64k');
    const socket = lab.file('b.sock');
    const server = `<server transport='unix' socket='${socket}'/>`;
    await writeFile(lab.file('b.xml'), `<domainbackup mode='pull'>${server}</domainbackup>`);
    await libvirt.virsh('backup-begin', 'd1', lab.file('b.xml'));
    await libvirt.write('d1', 'vda', 'write -P 0xbb 1M 64k');
    expect(await findBlockLeftovers((command) => libvirt.qmp('d1', command))).not.toEqual([]);
    const read = ['-r', '-f', 'raw', '-c', 'read -P 0xaa 1M 64k', nbdUnixUri(socket, 'vda')];
    await runTool('qemu-io', read, { timeoutMs: 10_000 });
    await libvirt.virsh('domjobabort', 'd1');
    expect(await findBlockLeftovers((command) => libvirt.qmp('d1', command))).toEqual([]);
    await expect(libvirt.write('d1', 'vda', 'write -P 1 1T 64k')).rejects.toThrow(/Input\/output error/);
  });

  test('ends and comes back on its state while QEMU goes on', async () => {
    await using libvirt = await startLibvirt(lab);
    await startPaused(libvirt, 'd2');
    const qemu = await libvirt.qemuPid('d2');
    const first = libvirt.pid;
    await libvirt.kill();
    await expect(libvirt.virsh('list')).rejects.toMatchObject({ code: 'TOOL_FAILED' });
    await libvirt.restart();
    expect(libvirt.pid).not.toBe(first);
    expect(await libvirt.qemuPid('d2')).toBe(qemu);
    await libvirt.restart();
    expect((await libvirt.virsh('domstate', 'd2')).trim()).toBe('paused');
    await libvirt.killQemu('d2');
    expect((await libvirt.virsh('domstate', 'd2')).trim()).toBe('shut off');
    await expect(libvirt.qemuPid('d2')).rejects.toThrow('has no process');
  });

  test('has firmware, a TPM and a second one beside it to migrate to', async () => {
    await using here = await startLibvirt(lab, { name: 'l1' });
    await using there = await startLibvirt(lab, { name: 'l2' });
    await makeQcow2({ path: lab.file('m.qcow2'), sizeBytes: 16 * MIB });
    const disks = [{ target: 'vda', path: lab.file('m.qcow2') }];
    await here.define(domainXml({ name: 'm', disks, tpm: true, nvramFile: lab.file('m.fd') }));
    await here.virsh('start', '--paused', 'm');
    expect(await here.inside('ls', '/var/lib/libvirt/swtpm')).not.toBe('');
    await here.virsh('destroy', 'm');
    await here.virsh('undefine', '--nvram', 'm');
    await here.define(domainXml({ name: 'n', disks }));
    await here.virsh('start', 'n');
    await here.migrate('n', there);
    expect((await there.virsh('domstate', 'n')).trim()).toBe('running');
    expect((await here.virsh('list', '--all', '--name')).trim()).toBe('');
    await there.write('n', 'vda', 'write -P 2 0 64k');
  });
});

describe('a bare QEMU', () => {
  test('takes writes beside the QMP client under test, and tells of failed ones', async () => {
    await makeQcow2({ path: lab.file('q.qcow2'), sizeBytes: 16 * MIB });
    const disks = [{ path: lab.file('q.qcow2'), serial: 'S1' }];
    await using qemu = await startQemuGuest(lab, { disks, isPaused: true });
    await qemu.write('disk0', 'write -P 0xaa 0 64k');
    await expect(qemu.write('disk0', 'write -P 0xaa 1T 64k')).rejects.toThrow(/Input\/output error/);
    await qemu.stop();
    const read = ['-r', '-f', 'qcow2', '-c', 'read -P 0xaa 0 64k', lab.file('q.qcow2')];
    await runTool('qemu-io', read, { timeoutMs: 10_000 });
  });

  test('runs the real guest, which measures its writes', { timeout: GUEST_TIMEOUT_MS }, async () => {
    await makeQcow2({ path: lab.file('l.qcow2'), sizeBytes: 64 * MIB });
    const disks = [{ path: lab.file('l.qcow2') }];
    await using qemu = await startQemuGuest(lab, { disks, name: 'l', mode: 'latency' });
    const guest = new GuestConsole(qemu.serialFile);
    await guest.waitFor(/^hf: ms(.*\n){3}/m);
    const latencies = await guest.latencies();
    expect(latencies.length).toBeGreaterThanOrEqual(60);
    expect(latencies.every((ms) => ms > 0 && ms < 10_000)).toBe(true);
  });
});

describe('the real guest', () => {
  test('freezes, thaws, and its disks agree at one instant', { timeout: GUEST_TIMEOUT_MS }, async () => {
    await using libvirt = await startLibvirt(lab);
    const disks = ['vda', 'vdb'].map((target) => ({ target, path: lab.file(`${target}.qcow2`) }));
    for (const { path } of disks) await makeGuestDisk({ path, sizeBytes: 64 * MIB });
    const serialFile = lab.file('g.log');
    const guest = await startGuest(libvirt, { name: 'g', disks, serialFile, mode: 'writer' });
    await guest.console.waitFor(/^hf: record 100/m);

    expect(await guest.agent('guest-fsfreeze-freeze')).toBe(2);
    const frozenAt = await guest.console.lastRecord();
    await copyDisks(disks, 'frozen');
    expect(await guest.console.lastRecord()).toBe(frozenAt);
    expect(await guest.agent('guest-fsfreeze-thaw')).toBe(2);
    await guest.console.waitFor(new RegExp(`^hf: record ${frozenAt + 100}`, 'm'));
    await libvirt.virsh('suspend', 'g');
    await copyDisks(disks, 'paused');
    await libvirt.killQemu('g');

    for (const state of ['frozen', 'paused']) {
      const copies = disks.map((disk) => ({ ...disk, path: `${disk.path}.${state}` }));
      const { vda, vdb } = await verifyInGuest(libvirt, {
        name: state,
        disks: copies,
        serialFile: lab.file(`${state}.log`),
      });
      const good = { fsck: 0, fsckReplayed: 0, missingRecords: 0, isJournalClean: state === 'frozen' };
      expect([vda, vdb]).toMatchObject([good, good]);
      expect([0, 1]).toContain(vda.lastRecord - vdb.lastRecord);
      expect(vda.lastRecord).toBeGreaterThanOrEqual(state === 'frozen' ? frozenAt : frozenAt + 100);
      if (state === 'frozen') expect(vda.lastRecord).toBeLessThan(frozenAt + 26);
    }
    expect(await readFile(serialFile, 'latin1')).not.toMatch(/EXT4-fs error|I\/O error/);
  });
});

async function copyDisks(disks: readonly { path: string }[], suffix: string): Promise<void> {
  for (const { path } of disks) {
    await qemuImg(['convert', '-q', '-U', '-f', 'qcow2', '-O', 'qcow2', path, `${path}.${suffix}`]);
  }
}
