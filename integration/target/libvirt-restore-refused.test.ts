import { mkdir, readFile, readdir, writeFile } from 'node:fs/promises';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import { GIB } from '../../src/lib/units.js';
import { DOMAIN_FILE } from '../../src/libvirt/machine-file.js';
import { MachineLab, refused, TARGETS, UUID } from './machine-lab.js';

describe('the restore of a machine to libvirt that cannot be', { timeout: 60_000 }, () => {
  let m: MachineLab;

  beforeAll(async () => {
    m = await MachineLab.start();
  }, 60_000);
  afterAll(() => m[Symbol.asyncDispose]());
  beforeEach(() => m.begin());
  afterEach(() => m.end());

  it('that does not start stays defined and says why', async () => {
    const bad =
      "<hostdev mode='subsystem' type='usb' managed='yes'><source><vendor id='0x1234'/><product id='0x1111'/></source></hostdev>";
    await m.define(m.domainXml({ devices: bad }));
    const point = await m.pointOf();
    await m.virsh('undefine', UUID, '--nvram');
    await expect(m.restore({ start: true }, point)).rejects.toEqual(
      refused('TOOL_FAILED', /restored and defined, but does not start.*usb/),
    );
    expect(await m.virsh('domstate', UUID)).toBe('shut off');
    await m.expectDisks(await m.domainOf(UUID));
  });

  it('is refused before anything is written when libvirt would not take it', async () => {
    const strange = (await m.xmlOf(UUID)).replace(/machine='[^']*'/, "machine='pc-none'");
    const point = {
      ...m.request,
      configFiles: [{ name: DOMAIN_FILE, content: Buffer.from(strange) }, ...m.request.configFiles.slice(1)],
    };
    await expect(m.prepare({ identity: 'new', name: 'db two' }, point)).rejects.toEqual(
      refused('TOOL_FAILED', /does not take the machine/),
    );
    expect(await readdir(m.out)).toEqual([]);
    expect(await m.listUuids()).toEqual([UUID]);
  });

  it('is not started unseen when it would use files of the host', async () => {
    const log = m.lab.file('serial.log');
    await writeFile(log, 'precious');
    await m.define(m.domainXml({ devices: `<serial type='file'><source path='${log}'/></serial>` }));
    const point = await m.pointOf();
    const fresh = { identity: 'new' as const, name: 'db two' };
    await expect(m.prepare({ ...fresh, start: true }, point)).rejects.toEqual(
      refused('INVALID_INPUT', /serial\.log.*start it by hand/),
    );
    const machine = await m.restore(fresh, point);
    expect(machine.notes.filter((note) => note.includes(log))).toHaveLength(2);
    expect(await readFile(log, 'utf8')).toBe('precious');
  });

  it('is refused where it cannot be right: elsewhere, without room, taken, forbidden, without a machine', async () => {
    const fresh = { identity: 'new' as const, name: 'db two' };
    await expect(m.prepare({ ...fresh, uri: 'qemu+ssh://root@there/system' })).rejects.toEqual(
      refused('INVALID_INPUT', /libvirt of this host only/),
    );
    await expect(m.prepare({ identity: 'new' })).rejects.toEqual(refused('CONFLICT', /there already/));
    const large = {
      ...m.request,
      disks: m.request.disks.map((disk) => ({ ...disk, leastBytes: 100_000 * GIB })),
    };
    await expect(m.prepare(fresh, large)).rejects.toEqual(refused('TARGET_FULL', /needed/));
    await expect(
      m.prepare({ ...fresh, place: { kind: 'directory', path: `${m.out}/nowhere` } }),
    ).rejects.toEqual(refused('TARGET_IO', /ENOENT/));
    await writeFile(`${m.out}/db_two-nvram.fd`, 'precious');
    await expect(m.prepare(fresh)).rejects.toEqual(refused('TARGET_EXISTS', /nvram/));
    await mkdir(m.lab.file('repository'), { recursive: true });
    await expect(
      m.prepare({ ...fresh, place: { kind: 'directory', path: m.lab.file('repository') } }),
    ).rejects.toEqual(refused('TARGET_FORBIDDEN', /repository/));
    await expect(m.prepare(fresh, { ...m.request, configFiles: [] })).rejects.toEqual(
      refused('INVALID_INPUT', /keeps no machine/),
    );
    for (const change of [
      { disks: [] },
      { disks: TARGETS.map((target) => ({ diskId: m.ids[target], target: '../x' })) },
      { disks: TARGETS.map((target) => ({ diskId: m.ids[target], target: `${target}9` })) },
      { files: [{ name: 'gone', role: 'nvram' as const, path: null }] },
    ]) {
      await expect(m.prepare(fresh, await m.pointOf(change))).rejects.toEqual(refused('INVALID_INPUT', /./));
    }
    expect(await readFile(`${m.out}/db_two-nvram.fd`, 'utf8')).toBe('precious');
    expect(await m.listUuids()).toEqual([UUID]);
  });

  it('takes back what it made when it is not finished, and starts nothing that changed meanwhile', async () => {
    const prepared = await m.prepare({ identity: 'new', name: 'db two' });
    await m.define(
      (await m.xmlOf(UUID))
        .replaceAll(UUID, '99999999-2222-3333-4444-555555555555')
        .replace('db one', 'db two'),
    );
    await expect(prepared.confirm()).rejects.toEqual(refused('CONFLICT', /db two/));
    // The same again, unasked: libvirt itself refuses the second of the name, and the NVRAM goes again.
    await expect(prepared.complete()).rejects.toEqual(refused('TOOL_FAILED', /db two/));
    await prepared[Symbol.asyncDispose]();
    expect(await readdir(m.out)).toEqual([]);
    expect((await m.listUuids()).sort()).toEqual([UUID, '99999999-2222-3333-4444-555555555555']);
  });
});
