import { describe, expect, it } from 'vitest';
import { parseDomain } from '../../src/libvirt/domain.js';
import { childAt, childElements, parseXml, rootElement, type XmlElement } from '../../src/libvirt/xml.js';
import { rewriteDomain, type DomainPlan } from '../../src/target/libvirt/rewrite-domain.js';

const OLD_UUID = '11111111-2222-3333-4444-555555555555';
const NEW_UUID = '99999999-8888-7777-6666-555555555555';
const EMULATOR = '/usr/bin/qemu-system-x86_64';

function domain(parts: { devices?: string; os?: string; rest?: string; root?: string } = {}): string {
  return `<domain type='kvm' id='7'${parts.root ?? ''}>
  <name>db</name>
  <uuid>${OLD_UUID}</uuid>
  <os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type>${parts.os ?? ''}</os>${parts.rest ?? ''}
  <devices>
    <emulator>${EMULATOR}</emulator>${parts.devices ?? ''}
  </devices>
</domain>`;
}

function plan(change: Partial<DomainPlan> = {}): DomainPlan {
  return {
    name: 'db-restored',
    uuid: NEW_UUID,
    isNew: true,
    emulators: new Set([EMULATOR]),
    nvramPath: null,
    disks: new Map(),
    keptDisks: new Map(),
    media: new Set(),
    ...change,
  };
}

const one = (text: string): string => text.replaceAll(/>\s+</g, '><').replaceAll('"', "'");

describe('the definition of a restored machine', () => {
  it('keeps the machine, and changes what says who it is and where its disks are', () => {
    const { xml, notes } = rewriteDomain(
      domain({
        os: "<loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.fd</loader><nvram template='/usr/share/OVMF/OVMF_VARS_4M.fd'>/old/db_VARS.fd</nvram>",
        rest: `<genid>aaaaaaaa-2222-3333-4444-555555555555</genid>
          <metadata><x:mine xmlns:x='urn:x'>kept</x:mine></metadata>
          <sysinfo type='smbios'><system><entry name='uuid'>${OLD_UUID}</entry></system></sysinfo>`,
        devices: `
          <disk type='network' device='disk' snapshot='external'>
            <driver name='qemu' type='raw' cache='none' io='io_uring'/>
            <auth username='u'><secret type='ceph' usage='s'/></auth>
            <source protocol='rbd' name='pool/db'><host name='ceph'/></source>
            <backingStore type='file'><format type='qcow2'/><source file='/base.qcow2'/></backingStore>
            <mirror type='file' job='copy'/>
            <target dev='vda' bus='virtio'/><serial>S1</serial><alias name='virtio-disk0'/>
          </disk>
          <interface type='network'><mac address='52:54:00:01:02:03'/><source network='default' portid='p'/><target dev='vnet0'/></interface>
          <memballoon model='virtio'/>`,
      }),
      plan({
        nvramPath: '/new/db-restored-nvram.fd',
        disks: new Map([['vda', { kind: 'file', path: '/new/db-restored-vda.qcow2', format: 'qcow2' }]]),
      }),
    );
    const mac = /mac address="(52:54:00(?::[0-9a-f]{2}){3})"/.exec(xml)?.[1] ?? '';
    expect(mac).toMatch(/^52:54:00/);
    expect(mac).not.toBe('52:54:00:01:02:03');
    expect(one(xml)).toBe(
      one(`<domain type='kvm'><name>db-restored</name><uuid>${NEW_UUID}</uuid>
        <os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type>
          <loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.fd</loader>
          <nvram template='/usr/share/OVMF/OVMF_VARS_4M.fd'>/new/db-restored-nvram.fd</nvram></os>
        <genid/>
        <metadata><x:mine xmlns:x='urn:x'>kept</x:mine></metadata>
        <sysinfo type='smbios'><system><entry name='uuid'>${NEW_UUID}</entry></system></sysinfo>
        <devices><emulator>${EMULATOR}</emulator>
          <disk type='file' device='disk' snapshot='external'>
            <source file='/new/db-restored-vda.qcow2'/>
            <driver name='qemu' type='qcow2' cache='none' io='io_uring'/>
            <target dev='vda' bus='virtio'/><serial>S1</serial><alias name='virtio-disk0'/></disk>
          <interface type='network'><mac address='${mac}'/><source network='default'/><target/></interface>
          <memballoon model='virtio'/></devices></domain>`),
    );
    expect(notes).toEqual([]);
    expect(parseDomain(xml)).toMatchObject({ name: 'db-restored', uuid: NEW_UUID });
  });

  it('of the same identity keeps addresses, and what two machines could not both have', () => {
    const devices = `<interface type='bridge'><mac address='52:54:00:01:02:03'/><source bridge='br0'/></interface>
      <graphics type='vnc' port='5901' autoport='no'/>
      <hostdev mode='subsystem' type='pci'><source><address domain='0' bus='3' slot='0' function='0'/></source></hostdev>`;
    const same = rewriteDomain(domain({ devices }), plan({ name: 'db', uuid: OLD_UUID, isNew: false }));
    expect(same.xml).toContain('52:54:00:01:02:03');
    expect(same.xml).toContain('port="5901"');
    expect(same.notes).toEqual(['the machine takes a pci device of this host']);
    const other = rewriteDomain(domain({ devices }), plan());
    expect(other.xml).not.toMatch(/52:54:00:01:02:03|5901|hostdev/);
    expect(other.xml).toContain('autoport="yes"');
    expect(other.notes).toEqual([
      'a hostdev that takes a device of the host was left out of the new machine',
    ]);
  });

  it('tells of each disk that is not in the point; a kept one is as the replaced domain has it', () => {
    const disk = (target: string, file: string): string =>
      `<disk type='file' device='disk'><source file='${file}'/><target dev='${target}'/></disk>`;
    const now = rootElement(parseXml(`<domain>${disk('vdb', '/now/b.qcow2')}</domain>`), 'domain');
    const kept = new Map<string, XmlElement>([['vdb', childAt(now, 'disk') as XmlElement]]);
    const { xml, notes } = rewriteDomain(
      domain({ devices: disk('vdb', '/etc/shadow') + disk('vdc', '/etc/passwd') }),
      plan({ keptDisks: kept }),
    );
    expect(parseDomain(xml).disks.map(({ target, location }) => [target, location.text])).toEqual([
      ['vdb', '/now/b.qcow2'],
    ]);
    expect(notes.map((note) => note.slice(0, 9))).toEqual(['disk vdb ', 'disk vdc ']);
  });

  it('empties a drive whose medium is not on this host', () => {
    const drive = (target: string, source: string): string =>
      `<disk type='file' device='cdrom'><source file='${source}'/><target dev='${target}'/><readonly/></disk>`;
    const { xml, notes } = rewriteDomain(
      domain({
        devices: `${drive('sda', '/there.iso')}${drive('sdb', '/gone.iso')}
          <disk type='network' device='cdrom'><source protocol='https' name='x'/><target dev='sdc'/></disk>`,
      }),
      plan({ media: new Set(['/there.iso']) }),
    );
    expect(
      parseDomain(xml).disks.map(({ target, location }) => [target, location.type, location.text]),
    ).toEqual([
      ['sda', 'file', '/there.iso'],
      ['sdb', 'file', ''],
      ['sdc', 'file', ''],
    ]);
    expect(notes).toHaveLength(3);
  });

  it('starts with fresh firmware variables when the point has none, never with the old file', () => {
    for (const nvram of [
      "<nvram template='/usr/share/OVMF/OVMF_VARS_4M.fd'>/old/VARS.fd</nvram>",
      "<nvram type='file' template='/usr/share/OVMF/OVMF_VARS_4M.fd'><source file='/old/VARS.fd'/></nvram>",
      '<nvram>/old/VARS.fd</nvram>',
    ]) {
      const { xml, notes } = rewriteDomain(domain({ os: nvram }), plan());
      expect(xml).not.toContain('/old/');
      expect(parseDomain(xml).nvram).toBeNull();
      expect(notes).toHaveLength(1);
    }
  });

  it('names a raw disk on a device as such, and drops what only qcow2 has', () => {
    const { xml } = rewriteDomain(
      domain({
        devices: `<disk type='file' device='lun' rawio='yes'><driver name='qemu' type='qcow2'><metadata_cache><max_size>1</max_size></metadata_cache></driver>
          <source file='/x'/><target dev='sda' bus='scsi'/><shareable/></disk>`,
      }),
      plan({ disks: new Map([['sda', { kind: 'device', path: '/dev/sdz', format: 'raw' }]]) }),
    );
    expect(one(xml)).toContain(
      "<disk type='block' device='disk'><source dev='/dev/sdz'/><driver name='qemu' type='raw'/><target dev='sda' bus='scsi'/><shareable/></disk>",
    );
  });
});

describe('a definition from a hostile repository', () => {
  it('does not bring its own programs, arguments, scripts or freedom from confinement', () => {
    const { xml, notes } = rewriteDomain(
      domain({
        root: " xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'",
        rest: `<qemu:commandline><qemu:arg value='-chardev'/><qemu:env name='LD_PRELOAD' value='/tmp/evil.so'/></qemu:commandline>
          <x:devices xmlns:x='urn:x'><x:emulator>/tmp/evil</x:emulator></x:devices>
          <seclabel type='none'/><seclabel type='dynamic' model='dac'><label>+0:+0</label></seclabel>`,
        devices: `<emulator>/tmp/evil</emulator>
          <interface type='ethernet'><mac address='52:54:00:01:02:03'/><script path='/tmp/evil.sh'/><downscript path='/tmp/evil2.sh'/></interface>
          <serial type='dev'><source path='/dev/null'><seclabel model='dac' relabel='no'/></source></serial>`,
      }),
      plan(),
    );
    expect(xml).not.toMatch(/evil|commandline|seclabel|LD_PRELOAD/);
    expect(childElements(childAt(rootElement(parseXml(xml), 'domain'), 'devices'), 'emulator')).toHaveLength(
      1,
    );
    const told = notes.join('\n');
    for (const what of ['/tmp/evil ', 'qemu:commandline', 'x:devices', '/tmp/evil.sh', 'type none']) {
      expect(told).toContain(what);
    }
  });

  it('tells every path of the host it names, wherever that stands', () => {
    const { xml, hostPaths } = rewriteDomain(
      domain({
        os: '<kernel>/etc/shadow</kernel><loader>/usr/share/../../etc/x</loader>',
        devices: `<filesystem type='mount'><source dir='/root'/><target dir='r'/></filesystem>
          <serial type='file'><source path='/etc/cron.d/x'/></serial>
          <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>`,
      }),
      plan(),
    );
    expect(hostPaths).toEqual([
      'os/kernel: /etc/shadow',
      'os/loader: /usr/share/../../etc/x',
      'devices/filesystem/source: /root',
      'devices/serial/source: /etc/cron.d/x',
    ]);
    expect(xml).toContain('/etc/cron.d/x');
  });

  it('is not even tried with what a trial would open on the host', () => {
    const { trialXml, xml } = rewriteDomain(
      domain({
        devices: "<interface type='ethernet'/><filesystem type='mount'><source dir='/root'/></filesystem>",
      }),
      plan(),
    );
    expect(xml).toContain('<interface');
    expect(trialXml).not.toMatch(/<interface|<filesystem/);
  });

  it('is refused when it is not a domain', () => {
    for (const xml of ['', '<network/>', '<!DOCTYPE x [<!ENTITY a "b">]><domain/>', '<domain>']) {
      expect(() => rewriteDomain(xml, plan())).toThrow(
        expect.objectContaining({ code: 'SOURCE_FORMAT' }) as Error,
      );
    }
  });
});
