import { describe, expect, it } from 'vitest';
import { parseDomain, parseDomainUuid, type Domain } from '../../src/libvirt/domain.js';

const UUID = '281b2fe2-b28c-402e-9563-d2219c8ccf28';

function domain(parts: { attributes?: string; top?: string; devices?: string }): Domain {
  return parseDomain(
    `<domain type='kvm' ${parts.attributes ?? ''}><name>d</name><uuid>${UUID.toUpperCase()}</uuid>${parts.top ?? ''}<devices>${parts.devices ?? ''}</devices></domain>`,
  );
}

const disk = (content: string, attributes = "type='file' device='disk'") => {
  const [found] = domain({
    devices: `<disk ${attributes}>${content}<target dev='vda' bus='virtio'/></disk>`,
  }).disks;
  return found!;
};

describe('domain XML', () => {
  it('tells a running machine from one that is off', () => {
    expect(domain({})).toMatchObject({ name: 'd', uuid: UUID, isActive: false, disks: [], agent: 'none' });
    expect(domain({ attributes: "id='7'" }).isActive).toBe(true);
  });

  it('tells who runs QEMU, from the DAC label alone', () => {
    const label = (model: string, text: string) =>
      domain({ top: `<seclabel type='dynamic' model='${model}'><label>${text}</label></seclabel>` }).runsAs;
    expect(label('dac', '+64055:+107')).toEqual({ uid: 64055, gid: 107 });
    expect(label('dac', 'root:root')).toBeNull();
    expect(label('apparmor', '+1:+1')).toBeNull();
  });

  it('tells the state of the agent channel', () => {
    const channel = (state: string) =>
      domain({
        devices: `<channel type='unix'><target type='virtio' name='other' state='connected'/></channel>
          <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0' ${state}/></channel>`,
      }).agent;
    expect(channel("state='connected'")).toBe('connected');
    expect(channel("state='disconnected'")).toBe('disconnected');
    expect(channel('')).toBe('disconnected');
  });

  it('finds UEFI variables in both notations', () => {
    expect(domain({ top: '<os><nvram>/n/a.fd</nvram></os>' }).nvram).toEqual({
      path: '/n/a.fd',
      format: 'raw',
    });
    const file = "<os><nvram type='file' format='qcow2'><source file='/n/b.fd'/></nvram></os>";
    expect(domain({ top: file }).nvram).toEqual({ path: '/n/b.fd', format: 'qcow2' });
    const network = "<os><nvram type='network'><source protocol='iscsi' name='x'/></nvram></os>";
    expect(domain({ top: network }).nvram).toBeNull();
  });

  it('finds the TPM', () => {
    const tpm = (backend: string) => domain({ devices: `<tpm model='tpm-crb'>${backend}</tpm>` }).tpm;
    expect(tpm("<backend type='emulator' version='2.0'/>")).toEqual({
      backend: 'emulator',
      version: '2.0',
      statePath: null,
    });
    expect(tpm("<backend type='emulator' version='1.2'><source type='dir' path='/t'/></backend>")).toEqual({
      backend: 'emulator',
      version: '1.2',
      statePath: '/t',
    });
    expect(tpm("<backend type='passthrough'/>")?.backend).toBe('passthrough');
  });

  it('lets the owner opt disks out by target or serial, in our namespace only', () => {
    const disks = ['vda', 'vdb', 'vdc']
      .map((dev) => `<disk type='file'><target dev='${dev}'/><serial>S-${dev}</serial></disk>`)
      .join('');
    const optedOut = (metadata: string) =>
      domain({ top: `<metadata>${metadata}</metadata>`, devices: disks })
        .disks.filter(({ isOptedOut }) => isOptedOut)
        .map(({ target }) => target);
    const excludes = "<h:exclude disk='vdb'/><h:exclude disk='S-vdc'/><h:exclude/>";
    expect(optedOut(`<h:backup xmlns:h='urn:holdfast:domain:1'>${excludes}</h:backup>`)).toEqual([
      'vdb',
      'vdc',
    ]);
    expect(optedOut(`<h:backup xmlns:h='urn:other'>${excludes}</h:backup>`)).toEqual([]);
    expect(optedOut("<backup><exclude disk='vdb'/></backup>")).toEqual([]);
  });

  it('reads where a disk is, never a secret', () => {
    expect(disk("<source file='/a &amp; b'/>").location).toMatchObject({ text: '/a & b', path: '/a & b' });
    expect(disk("<source dev='/dev/vg/lv'/>", "type='block'").location.path).toBe('/dev/vg/lv');
    expect(disk("<source pool='p' volume='v'/>", "type='volume'").location).toMatchObject({
      text: 'p/v',
      path: null,
      volume: { pool: 'p', name: 'v' },
    });
    const network = disk(
      `<auth username='admin'><secret type='ceph' uuid='${UUID}'/></auth>
       <source protocol='rbd' name='pool/image?key=TOPSECRET'><host name='m1' port='6789'/><host name='m2'/></source>`,
      "type='network'",
    );
    expect(network.location.text).toBe('rbd://m1:6789,m2/pool/image');
    expect(JSON.stringify(network)).not.toMatch(/TOPSECRET|admin/);
    const nvme =
      "<source type='pci' namespace='1'><address domain='0x0000' bus='0x01' slot='0x00' function='0x0'/></source>";
    expect(disk(nvme, "type='nvme'").location.text).toBe('pci:0x0000:0x01:0x00:0x0');
    expect(disk("<source type='unix' path='/s'/>", "type='vhostuser'").location).toMatchObject({
      type: 'vhostuser',
      text: '/s',
      path: null,
    });
  });

  it('takes what is left out for what libvirt takes it for', () => {
    expect(disk('', '')).toMatchObject({
      device: 'disk',
      format: 'raw',
      serial: null,
      location: { type: 'file', text: '', path: null },
      isReadOnly: false,
      isShareable: false,
      isTransient: false,
      isEncrypted: false,
      isSliced: false,
      backing: [],
    });
  });

  it('sees what stands in the way of reading a disk', () => {
    const odd = disk(
      `<driver type='qcow2'/><source file='/a'><encryption format='luks'/><slices><slice type='storage' offset='1' size='2'/></slices></source>
       <readonly/><shareable/><transient/>`,
    );
    expect(odd).toMatchObject({
      format: 'qcow2',
      isReadOnly: true,
      isShareable: true,
      isTransient: true,
      isEncrypted: true,
      isSliced: true,
    });
  });

  it('reads the backing chain', () => {
    const { backing } = disk(
      `<backingStore type='file'><format type='qcow2'/><source file='/b'/><backingStore type='block'><format type='raw'/><source dev='/dev/c'/><backingStore/></backingStore></backingStore>`,
    );
    expect(backing.map(({ location, format }) => [location.text, format])).toEqual([
      ['/b', 'qcow2'],
      ['/dev/c', 'raw'],
    ]);
  });

  it('sees an iothread at the disk or at its SCSI controller', () => {
    const scsi = (controller: string) =>
      domain({
        devices: `<disk type='file'><target dev='sda' bus='scsi'/><address type='drive' controller='1'/></disk>${controller}`,
      }).disks[0]?.hasIothread;
    expect(disk("<driver type='qcow2' iothread='1'/>").hasIothread).toBe(true);
    expect(disk("<driver type='qcow2'><iothreads><iothread id='1'/></iothreads></driver>").hasIothread).toBe(
      true,
    );
    expect(disk("<driver type='qcow2'/>").hasIothread).toBe(false);
    expect(scsi("<controller type='scsi' index='1'><driver iothread='2'/></controller>")).toBe(true);
    expect(scsi("<controller type='scsi' index='0'><driver iothread='2'/></controller>")).toBe(false);
  });

  it.each([
    '<domain/>',
    `<domain><name>d</name><uuid>not-one</uuid></domain>`,
    `<domain><uuid>${UUID}</uuid></domain>`,
    `<network><name>d</name><uuid>${UUID}</uuid></network>`,
  ])('is refused when it is none: %s', (xml) => {
    expect(() => parseDomain(xml)).toThrow(expect.objectContaining({ code: 'SOURCE_FORMAT' }) as unknown);
  });
});

describe('the UUID of a domain', () => {
  it('is taken in any case, and nothing else is', () => {
    expect(parseDomainUuid(UUID.toUpperCase())).toBe(UUID);
    for (const text of ['', '--all', `${UUID} `, UUID.slice(1), `${UUID}\n`]) {
      expect(() => parseDomainUuid(text)).toThrow(
        expect.objectContaining({ code: 'INVALID_INPUT' }) as unknown,
      );
    }
  });
});
