import { chmod, chown, readFile, readdir, rm, stat, symlink } from 'node:fs/promises';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import { newId, type PointId } from '../../src/lib/id.js';
import { DOMAIN_FILE } from '../../src/libvirt/machine-file.js';
import { firstDifference, makeRaw, qemuImg } from '../lab/disk-image.js';
import { DISK_BYTES, MAC, MachineLab, refused, UUID } from './machine-lab.js';

describe('the restore of a machine to libvirt', { timeout: 60_000 }, () => {
  let m: MachineLab;

  beforeAll(async () => {
    m = await MachineLab.start();
  }, 60_000);
  afterAll(() => m[Symbol.asyncDispose]());
  beforeEach(() => m.begin());
  afterEach(() => m.end());

  it('as a new machine beside the old one, which starts and shares nothing with it', async () => {
    await m.virsh('start', UUID, '--paused');
    const before = await m.xmlOf(UUID);
    await rm(`${m.old}/medium.iso`);
    const machine = await m.restore({ identity: 'new', name: 'db two', start: true });
    expect(await m.virsh('domstate', machine.uuid)).toBe('running');
    await m.virsh('destroy', machine.uuid);
    const domain = await m.domainOf(machine.uuid);
    expect(domain).toMatchObject({
      name: 'db two',
      nvram: { path: `${m.out}/db_two-nvram.fd` },
      agent: 'disconnected',
    });
    expect(domain.uuid).not.toBe(UUID);
    expect(domain.disks.map(({ target, location, format }) => [target, location.text, format])).toEqual([
      ['vda', `${m.out}/db_two-vda.qcow2`, 'qcow2'],
      ['vdb', `${m.out}/db_two-vdb.qcow2`, 'qcow2'],
      ['sda', '', 'raw'],
    ]);
    await m.expectDisks(domain);
    const xml = await m.xmlOf(machine.uuid);
    expect(xml).not.toMatch(new RegExp(`${MAC}|${UUID}|5999|${m.old}`));
    expect(/<genid>(.*)<\/genid>/.exec(xml)?.[1]).not.toBe(/<genid>(.*)<\/genid>/.exec(before)?.[1]);
    expect(machine.notes).toEqual(['the drive sda comes back empty: its medium is not on this host']);
    expect(await m.virsh('domstate', UUID)).toBe('paused');
    expect(await m.xmlOf(UUID)).toBe(before);
    expect((await readdir(m.lab.file('sockets'))).filter((name) => name.startsWith('define-'))).toEqual([]);
  });

  it('as the same machine once the old one is gone, with its firmware variables, off unless started', async () => {
    await expect(m.prepare({})).rejects.toEqual(refused('CONFLICT', /db one.*there already/));
    await m.virsh('undefine', UUID, '--nvram');
    const machine = await m.restore({ format: 'raw' });
    expect(machine).toMatchObject({ name: 'db one', uuid: UUID, isStarted: false });
    expect(await m.virsh('domstate', UUID)).toBe('shut off');
    const domain = await m.domainOf(UUID);
    expect(domain.disks.map(({ location, format }) => [location.text, format]).slice(0, 2)).toEqual([
      [`${m.out}/db_one-vda.raw`, 'raw'],
      [`${m.out}/db_one-vdb.raw`, 'raw'],
    ]);
    await m.expectDisks(domain);
    expect(await m.xmlOf(UUID)).toContain(MAC);
    const nvram = `${m.out}/db_one-nvram.fd`;
    expect(domain.nvram?.path).toBe(nvram);
    expect((await readFile(nvram)).toString('latin1', 1000, 1005)).toBe('point');
    expect((await stat(nvram)).mode & 0o777).toBe(0o600);
  });

  it('in place of the domain when it is off, disks where they were; then a backup can begin anew', async () => {
    const mine = `holdfast-${newId<PointId>()}`;
    const half = `holdfast-${newId<PointId>()}`;
    await m.virsh('start', UUID, '--paused');
    await m.virsh('checkpoint-create-as', UUID, mine);
    await m.virsh('checkpoint-create-as', UUID, 'of-another-program');
    await expect(m.prepare({ identity: 'replace', place: null })).rejects.toEqual(
      refused('CONFLICT', /not off but paused/),
    );
    await m.virsh('destroy', UUID);
    await chown(`${m.old}/vda.qcow2`, 1234, 4321);
    await chmod(`${m.old}/vda.qcow2`, 0o640);
    const machine = await m.restore({ identity: 'replace', place: null });
    expect(machine.uuid).toBe(UUID);
    const domain = await m.domainOf(UUID);
    expect(domain.disks.map(({ location }) => location.text)).toEqual([
      `${m.old}/vda.qcow2`,
      `${m.old}/vdb.qcow2`,
      `${m.old}/medium.iso`,
    ]);
    await m.expectDisks(domain);
    const facts = await stat(`${m.old}/vda.qcow2`);
    expect([facts.uid, facts.gid, facts.mode & 0o777]).toEqual([1234, 4321, 0o640]);
    expect((await readFile(`${m.old}/VARS.fd`)).toString('latin1', 1000, 1005)).toBe('point');
    expect(await m.virsh('checkpoint-list', UUID, '--name')).toBe('of-another-program');
    expect(machine.notes.filter((note) => note.includes('of-another-program'))).toHaveLength(1);
    await m.virsh('start', UUID, '--paused');
    await m.virsh('checkpoint-create-as', UUID, half);
  });

  it('in place keeps what is not in the point: the other disk, and our checkpoint that still counts on it', async () => {
    const name = `holdfast-${newId<PointId>()}`;
    await m.virsh('start', UUID, '--paused');
    await m.virsh('checkpoint-create-as', UUID, name);
    await m.virsh('destroy', UUID);
    const onlyVda = {
      ...(await m.pointOf({ disks: [{ diskId: m.ids.vda, target: 'vda' }] })),
      disks: m.request.disks.slice(0, 1),
    };
    const later = `<disk type='file' device='disk'><source file='${m.old}/later.raw'/><target dev='vdc' bus='virtio'/></disk>`;
    await m.define(m.domainXml({ devices: later }));
    const machine = await m.restore({ identity: 'replace', place: null }, onlyVda);
    expect(machine.notes).toContain('disk vdb is not in the point and stays as it is');
    expect(machine.notes.filter((note) => note.includes('vdc came after the point'))).toHaveLength(1);
    expect((await m.domainOf(UUID)).disks[1]?.location.text).toBe(`${m.old}/vdb.qcow2`);
    expect(await m.virsh('checkpoint-list', UUID, '--name')).toBe(name);
    const same = await m.restore({ identity: 'new', name: 'less' }, onlyVda);
    expect(same.notes).toContain('disk vdb is not in the point: the machine comes back without it');
    expect((await m.domainOf(same.uuid)).disks.map(({ target }) => target)).toEqual(['vda', 'sda']);
  });

  it('in place over a raw file behind a link; not over an image on another, saved memory or snapshots', async () => {
    const replace = { identity: 'replace' as const, place: null };
    await makeRaw({ path: `${m.old}/real.raw`, sizeBytes: DISK_BYTES.vda });
    await symlink('real.raw', `${m.old}/link.raw`);
    const raw = `<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='${m.old}/link.raw'/><target dev='vda' bus='virtio'/></disk>`;
    await m.define(m.domainXml({ vda: raw }));
    await m.restore(replace);
    const domain = await m.domainOf(UUID);
    expect(domain.disks[0]).toMatchObject({ format: 'raw', location: { text: `${m.old}/link.raw` } });
    await m.expectDisks(domain);
    expect(await firstDifference(`${m.old}/real.raw`, m.truths.vda)).toBeNull();

    await qemuImg(['create', '-q', '-f', 'qcow2', '-F', 'qcow2', '-b', 'vda.qcow2', `${m.old}/top.qcow2`]);
    await m.define(m.domainXml({ vda: raw.replace("'raw'", "'qcow2'").replace('link.raw', 'top.qcow2') }));
    await expect(m.prepare(replace)).rejects.toEqual(refused('CONFLICT', /vda.*stands on another/));
    await m.define(m.domainXml({ vda: raw.replaceAll('vda', 'vdz') }));
    await expect(m.prepare(replace)).rejects.toEqual(refused('CONFLICT', /vda.*does not have it now/));

    await m.define(m.domainXml());
    await m.virsh('snapshot-create-as', UUID, 'earlier', '--disk-only');
    await expect(m.prepare(replace)).rejects.toEqual(refused('CONFLICT', /snapshots/));
    await m.virsh('snapshot-delete', UUID, 'earlier', '--metadata');
    await m.define(m.domainXml());
    await m.virsh('start', UUID, '--paused');
    await m.virsh('managedsave', UUID);
    await expect(m.prepare(replace)).rejects.toEqual(refused('CONFLICT', /saved memory/));
  });

  it('to a storage pool by name, whose volumes it lists then; to no other kind of pool, nor an inactive one', async () => {
    await m.virsh('pool-define-as', 'images', 'dir', '--target', m.out);
    try {
      const place = { kind: 'pool' as const, name: 'images' };
      await expect(m.prepare({ identity: 'new', name: 'db two', place })).rejects.toEqual(
        refused('CONFLICT', /not active/),
      );
      await m.virsh('pool-start', 'images');
      const machine = await m.restore({ identity: 'new', name: 'db two', place });
      await m.expectDisks(await m.domainOf(machine.uuid));
      expect(await m.virsh('vol-list', 'images')).toContain('db_two-vda.qcow2');
    } finally {
      await m.virsh('pool-destroy', 'images');
      await m.virsh('pool-undefine', 'images');
    }
    await m.virsh('pool-define-as', 'group', 'logical', '--target', '/dev/group');
    try {
      await expect(
        m.prepare({ identity: 'new', name: 'x', place: { kind: 'pool', name: 'group' } }),
      ).rejects.toEqual(refused('INVALID_INPUT', /type logical/));
      await expect(
        m.prepare({ identity: 'new', name: 'x', place: { kind: 'pool', name: 'nope' } }),
      ).rejects.toEqual(refused('NOT_FOUND', /nope/));
    } finally {
      await m.virsh('pool-undefine', 'group');
    }
  });

  it('with the state of its TPM, which swtpm takes; a new machine gets an empty one', async () => {
    const tpm = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>";
    await m.define(m.domainXml({ devices: tpm }));
    await m.virsh('start', UUID, '--paused');
    await m.virsh('destroy', UUID);
    const guestPath = `/var/lib/libvirt/swtpm/${UUID}/tpm2/tpm2-00.permall`;
    const file = m.swtpm(UUID, 'tpm2', 'tpm2-00.permall');
    const state = await readFile(file);
    const owner = (await stat(file)).uid;
    const files = [
      { name: DOMAIN_FILE, role: 'domain' as const, path: null },
      { name: 'tpm2-00.permall', role: 'tpm' as const, path: guestPath },
    ];
    const point = await m.pointOf({ files });
    const withTpm = {
      ...point,
      configFiles: [...point.configFiles, { name: 'tpm2-00.permall', content: state }],
    };
    const other = await m.restore({ identity: 'new', name: 'db two' }, withTpm);
    expect(other.notes.filter((note) => note.includes('TPM'))).toHaveLength(1);
    await m.virsh('undefine', UUID, '--nvram');
    const machine = await m.restore({ start: true }, withTpm);
    expect(await m.virsh('domstate', machine.uuid)).toBe('running');
    expect((await stat(file)).uid).toBe(owner);
    expect((await readFile(file)).equals(state)).toBe(true);
  });
});
