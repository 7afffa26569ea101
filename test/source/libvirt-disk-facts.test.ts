import { describe, expect, it } from 'vitest';
import { parseDomain } from '../../src/libvirt/domain.js';
import { diskFacts, lineageOf } from '../../src/source/libvirt/disk-facts.js';

const UUID = '281b2fe2-b28c-402e-9563-d2219c8ccf28';

function facts(
  attributes: string,
  content: string,
  support: { canHaveBitmaps?: boolean; libvirtVersion?: number } = {},
) {
  const domain = parseDomain(
    `<domain><name>d</name><uuid>${UUID}</uuid><devices><disk ${attributes}>${content}<target dev='vda'/></disk></devices></domain>`,
  );
  const disk = domain.disks[0]!;
  const found = diskFacts(disk, { canHaveBitmaps: null, libvirtVersion: 9_000_000, ...support });
  return { ...found, lineage: lineageOf(domain, disk) };
}

const QCOW2 = "<driver type='qcow2'/><source file='/a'/>";

describe('what is said of a disk of a domain', () => {
  it.each([
    ["type='file' device='cdrom'", "<source file='/a.iso'/><readonly/>", 'REMOVABLE'],
    ["type='file' device='floppy'", '', 'REMOVABLE'],
    ["type='block' device='lun'", "<source dev='/dev/sdb'/>", 'PASSTHROUGH'],
    ["type='nvme' device='disk'", "<source type='pci'><address bus='1'/></source>", 'PASSTHROUGH'],
    ["type='vhostuser' device='disk'", "<source type='unix' path='/s'/>", 'PASSTHROUGH'],
    ["type='file' device='disk'", '', 'EMPTY'],
    ["type='file' device='disk'", `${QCOW2}<readonly/>`, 'READ_ONLY'],
  ])('%s %s is left out', (attributes, content, code) => {
    expect(facts(attributes, content).skip?.code).toBe(code);
  });

  it.each([
    [QCOW2, {}, null],
    [QCOW2, { canHaveBitmaps: true }, null],
    [QCOW2, { canHaveBitmaps: false }, /version 2/],
    [QCOW2, { libvirtVersion: 7_001_000 }, /older than 7\.2/],
    [`${QCOW2}<transient/>`, {}, /transient/],
    ["<driver type='raw'/><source file='/a'/>", {}, /raw/],
    ["<driver type='vmdk'/><source file='/a'/>", {}, /vmdk/],
  ])('whether %s with %j can be incremental, and why not', (content, support, reason) => {
    const { skip, incremental } = facts("type='file'", content, support);
    expect(skip).toBeNull();
    expect(incremental.isPossible).toBe(reason === null);
    if (reason !== null) expect(incremental.reason).toMatch(reason);
  });

  it('its lineage is the machine and the place, so that two empty drives are two', () => {
    expect(facts("type='file'", QCOW2).lineage).toBe(`libvirt:${UUID}:/a`);
    expect(facts("type='file' device='cdrom'", '').lineage).toBe(`libvirt:${UUID}:empty vda`);
  });
});
