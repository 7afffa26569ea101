import { describe, expect, it } from 'vitest';
import { AppError } from '../../src/lib/errors.js';
import { parseLsblk } from '../../src/volume/lsblk.js';
import { devicesWith } from '../../src/volume/provider.js';
import { devicesOf, node } from './recorded.js';

const ext4 = (uuid: string): string =>
  `ID_FS_UUID=${uuid}\nID_FS_UUID_ENC=${uuid}\nID_FS_VERSION=1.0\nID_FS_BLOCK_SIZE=4096\nID_FS_TYPE=ext4\nID_FS_USAGE=filesystem\n`;
const DATA = '6f1a2b3c-0d4e-4f5a-8b6c-7d8e9fa0b1c2';

describe('devices as lsblk, udev and blkid show them', () => {
  it('a SATA disk has a WWN and a serial number, its partitions have UUIDs of their own', () => {
    const wwn = '0x5000c500a1b2c3d4';
    const devices = devicesOf(
      [
        node({
          kname: 'sda',
          number: '8:0',
          vendor: 'ATA     ',
          model: 'ST4000NM0035-1V4107',
          serial: 'ZC1234AB',
          wwn,
          children: [node({ kname: 'sda1', number: '8:1', type: 'part', wwn, serial: 'ZC1234AB' })],
        }),
      ],
      {
        sda: {
          udev: `DEVNAME=/dev/sda\nID_ATA=1\nID_MODEL=ST4000NM0035-1V4107\nID_SERIAL=ST4000NM0035-1V4107_ZC1234AB\nID_SERIAL_SHORT=ZC1234AB\nID_WWN=${wwn}\nID_WWN_WITH_EXTENSION=${wwn}\n`,
          blkid: 'ID_PART_TABLE_UUID=8a7b6c5d-4e3f-4a2b-9c8d-7e6f5a4b3c2d\nID_PART_TABLE_TYPE=gpt\n',
        },
        sda1: { blkid: `${ext4(DATA)}ID_PART_ENTRY_UUID=0f1e2d3c-4b5a-4697-8879-6a5b4c3d2e1f\n` },
      },
    );
    expect(devices['/dev/sda']?.identities).toEqual([
      'wwn:0x5000c500a1b2c3d4',
      'serial:ATA_ST4000NM0035-1V4107_ZC1234AB',
      'pt-uuid:8a7b6c5d-4e3f-4a2b-9c8d-7e6f5a4b3c2d',
    ]);
    // The disk's own names are not the partition's.
    expect(devices['/dev/sda1']?.identities).toEqual([
      'part-uuid:0f1e2d3c-4b5a-4697-8879-6a5b4c3d2e1f',
      `fs-uuid:${DATA}`,
    ]);
  });

  it('an NVMe namespace is known by its EUI-64 or NGUID, with udev and without', () => {
    const nvme = (name: string, number: string, wwn: string | null): unknown =>
      node({
        kname: name,
        number,
        model: 'Samsung SSD 970 EVO Plus 1TB',
        serial: 'S4EWNX0N123456',
        wwn,
      });
    const devices = devicesOf(
      [
        nvme('nvme0n1', '259:0', 'eui.0025385a91b2c3d4'),
        nvme('nvme1n1', '259:1', null),
        nvme('nvme2n1', '259:2', null),
      ],
      {
        nvme0n1: { udev: 'ID_WWN=eui.0025385a91b2c3d4\nID_SERIAL_SHORT=S4EWNX0N123456\n' },
        nvme1n1: { wwid: 'eui.36344730526012340025384700000001' },
        nvme2n1: { wwid: 'nvme.144d-533445-53616d-00000001' },
      },
    );
    const serial = 'serial:Samsung_SSD_970_EVO_Plus_1TB_S4EWNX0N123456';
    expect(devices['/dev/nvme0n1']?.identities).toEqual(['nvme:eui.0025385a91b2c3d4', serial]);
    expect(devices['/dev/nvme1n1']?.identities).toEqual([
      'nvme:eui.36344730526012340025384700000001',
      serial,
    ]);
    expect(devices['/dev/nvme2n1']?.identities).toEqual(['nvme:nvme.144d-533445-53616d-00000001', serial]);
  });

  it('logical units of one storage system are told apart by the whole of their names', () => {
    const [first, second] = ['0x600508b1001c4d41ab0000000000a001', '0x600508b1001c4d41ab0000000000a002'];
    const devices = devicesOf(
      [node({ kname: 'sdb', number: '8:16', wwn: first }), node({ kname: 'sdc', number: '8:32' })],
      {
        sdb: { udev: `ID_WWN=0x600508b1001c4d41\nID_WWN_WITH_EXTENSION=${first}\n` },
        sdc: { wwid: second.replace('0x', 'naa.') },
      },
    );
    expect(devices['/dev/sdb']?.identities).toEqual([`wwn:${first}`]);
    expect(devices['/dev/sdc']?.identities).toEqual([`wwn:${second}`]);
  });

  it('two paths are one multipath device, and no devices of their own', () => {
    const wwn = '0x600a0b80006e1a2b00001f2c5d3e4f60';
    const top = node({
      kname: 'dm-0',
      path: '/dev/dm-0',
      number: '253:0',
      type: 'mpath',
      children: [node({ kname: 'dm-1', number: '253:1', type: 'part' })],
    });
    const leg = (name: string, number: string, partition: string): unknown =>
      node({
        kname: name,
        number,
        wwn,
        vendor: 'DELL    ',
        model: 'MD38xxf',
        serial: '3A0012X',
        children: [node({ kname: `${name}1`, number: partition, type: 'part' }), top],
      });
    const entry = `${ext4(DATA)}ID_PART_ENTRY_UUID=11112222-3333-4444-5555-666677778888\n`;
    const table = 'ID_PART_TABLE_UUID=99990000-1111-2222-3333-444455556666\n';
    const devices = devicesOf([leg('sdd', '8:48', '8:49'), leg('sde', '8:64', '8:65')], {
      sdd: { blkid: table },
      sde: { blkid: table },
      sdd1: { blkid: entry },
      sde1: { blkid: entry },
      'dm-0': { dmUuid: 'mpath-3600a0b80006e1a2b00001f2c5d3e4f60', blkid: table },
      'dm-1': { dmUuid: 'part1-mpath-3600a0b80006e1a2b00001f2c5d3e4f60', blkid: entry },
    });
    expect(Object.keys(devices)).toHaveLength(6);
    for (const path of ['/dev/sdd', '/dev/sde', '/dev/sdd1', '/dev/sde1']) {
      expect(devices[path]).toMatchObject({ identities: [], pathOf: '/dev/dm-0' });
    }
    expect(devices['/dev/dm-0']?.identities[0]).toBe('dm-uuid:mpath-3600a0b80006e1a2b00001f2c5d3e4f60');
    const all = Object.values(devices);
    for (const identity of [...all.flatMap(({ identities }) => identities)]) {
      expect(devicesWith(identity, all), identity).toHaveLength(1);
    }
  });

  it('a logical volume is told from its snapshot, which holds the same filesystem', () => {
    const group = 'LVM-Qz4pW7mJ1xT5bL9cV3nR8kD2fH6gS0aY';
    const lv = (name: string, number: string): unknown => node({ kname: name, number, type: 'lvm' });
    const devices = devicesOf(
      [
        node({
          kname: 'sdf',
          number: '8:80',
          children: [lv('dm-2', '253:2'), lv('dm-3', '253:3')],
        }),
      ],
      {
        sdf: {
          blkid:
            'ID_FS_UUID=qDzyxx-1a2b-3c4d-5e6f-7a8b-9c0d-eFgHiJ\nID_FS_TYPE=LVM2_member\nID_FS_USAGE=raid\n',
        },
        'dm-2': { dmUuid: `${group}aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa`, blkid: ext4(DATA) },
        'dm-3': { dmUuid: `${group}bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb`, blkid: ext4(DATA) },
      },
    );
    expect(devices['/dev/sdf']?.identities).toEqual(['fs-uuid:qDzyxx-1a2b-3c4d-5e6f-7a8b-9c0d-eFgHiJ']);
    expect(devices['/dev/dm-2']?.identities).toEqual([
      `dm-uuid:${group}aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa`,
      `fs-uuid:${DATA}`,
    ]);
    expect(devicesWith(`fs-uuid:${DATA}`, Object.values(devices))).toHaveLength(2);
  });

  it('the members of an array are not the array', () => {
    const array = node({ kname: 'md0', number: '9:0', type: 'raid1' });
    const member =
      'ID_FS_UUID=0a1b2c3d-4e5f-6071-8293-a4b5c6d7e8f9\nID_FS_TYPE=linux_raid_member\nID_FS_USAGE=raid\n';
    const devices = devicesOf(
      [
        node({ kname: 'sdg', number: '8:96', children: [array] }),
        node({ kname: 'sdh', number: '8:112', children: [array] }),
      ],
      { sdg: { blkid: member }, sdh: { blkid: member }, md0: { blkid: ext4(DATA) } },
    );
    expect(devices['/dev/sdg']?.identities).toEqual([]);
    expect(devices['/dev/md0']?.identities).toEqual([
      'md-uuid:0a1b2c3d-4e5f-6071-8293-a4b5c6d7e8f9',
      `fs-uuid:${DATA}`,
    ]);
  });

  it('a serial number that two sticks share tells nothing, and one of zeroes is none', () => {
    const stick = (name: string, number: string, serial: string): unknown =>
      node({ kname: name, number, vendor: 'Generic ', model: 'Flash Disk', serial });
    const devices = devicesOf([
      stick('sdi', '8:128', '0123456789ABCDEF'),
      stick('sdj', '8:144', '0123456789ABCDEF'),
      stick('sdk', '8:160', '000000000000'),
      stick('sdl', '8:176', '        '),
    ]);
    const shared = 'serial:Generic_Flash_Disk_0123456789ABCDEF';
    expect(devicesWith(shared, Object.values(devices)).map(({ devicePath }) => devicePath)).toEqual([
      '/dev/sdi',
      '/dev/sdj',
    ]);
    expect(devices['/dev/sdk']?.identities).toEqual([]);
    expect(devices['/dev/sdl']?.identities).toEqual([]);
  });

  it('what a device calls itself cannot break a line, a name or a log', () => {
    const devices = devicesOf([
      node({ kname: 'sdm', number: '8:192', model: 'a\nb\u001b[2J', serial: 'x"y$(z)\u0007é' }),
      node({ kname: 'sdn', number: '8:208', serial: 'S'.repeat(150) + 'T'.repeat(150) }),
    ]);
    expect(devices['/dev/sdm']?.identities).toEqual([
      'serial:a_b\\x1b\\x5b2J_x\\x22y\\x24\\x28z\\x29\\x07\\xc3\\xa9',
    ]);
    expect(devices['/dev/sdm']?.model).toBe('a\ufffdb\ufffd[2J');
    // Cut, it could become another's.
    expect(devices['/dev/sdn']?.identities).toEqual([]);
  });

  it('contradicting contents name nothing', () => {
    const devices = devicesOf([node({ kname: 'sdo', number: '8:224' })], {
      sdo: { blkid: `ID_FS_AMBIVALENT=filesystem:ext4:1.0 filesystem:xfs\n${ext4(DATA)}` },
    });
    expect(devices['/dev/sdo']?.identities).toEqual([]);
  });

  it.each([
    ['no JSON', 'lsblk: cannot open'],
    ['another shape', '{"devices":[]}'],
    [
      'a path that is none of /dev',
      JSON.stringify({ blockdevices: [node({ kname: 'x', number: '8:0', path: '/etc/passwd' })] }),
    ],
    ['a number that is none', JSON.stringify({ blockdevices: [node({ kname: 'x', number: '8' })] })],
    [
      'a size that is none',
      JSON.stringify({ blockdevices: [node({ kname: 'x', number: '8:0', size: -1 })] }),
    ],
  ])('an answer of lsblk with %s is refused', (_what, answer) => {
    expect(() => parseLsblk(answer)).toThrow(AppError);
    expect(() => parseLsblk(answer)).toThrow('lsblk gave an answer that cannot be read');
  });

  it('an answer nested without end is refused', () => {
    let nested = node({ kname: 'x', number: '8:0' });
    for (let depth = 0; depth < 40; depth += 1) {
      nested = node({ kname: `x${depth}`, number: `9:${depth}`, children: [nested] });
    }
    expect(() => parseLsblk(JSON.stringify({ blockdevices: [nested] }))).toThrow('nested without end');
  });
});
