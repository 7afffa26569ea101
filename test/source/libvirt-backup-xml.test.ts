import { describe, expect, it } from 'vitest';
import { attributeOf, childAt, childElements, parseXml, textOf } from '../../src/libvirt/xml.js';
import {
  backupXml,
  checkpointXml,
  redefinedCheckpointXml,
  socketOfBackup,
  type JobDisk,
} from '../../src/source/libvirt/backup-xml.js';
import { scratchFloor } from '../../src/source/libvirt/scratch-watch.js';

const HOSTILE = `/s/"><&'x`;
const DISKS: JobDisk[] = [
  { target: 'vda', backup: { scratch: '/s/vda.qcow2', since: 'holdfast-A', isCounted: true } },
  { target: 'vdb', backup: { scratch: HOSTILE, since: null, isCounted: false } },
  { target: 'sda', backup: null },
];

function disksOf(xml: string): Record<string, string | null>[] {
  const disks = childElements(childAt(parseXml(xml).documentElement, 'disks'), 'disk');
  const names = ['name', 'backup', 'backupmode', 'incremental', 'exportname', 'checkpoint', 'bitmap'];
  return disks.map((disk) => {
    const all = names.map((name) => [name, attributeOf(disk, name)] as const);
    return Object.fromEntries(all.filter(([, value]) => value !== null));
  });
}

describe('the XML of a backup', () => {
  it('names every disk of the domain, each with its own mode', () => {
    const xml = backupXml('/s/nbd.sock', DISKS);
    expect(disksOf(xml)).toEqual([
      { name: 'vda', backup: 'yes', backupmode: 'incremental', incremental: 'holdfast-A', exportname: 'vda' },
      { name: 'vdb', backup: 'yes', backupmode: 'full', exportname: 'vdb' },
      { name: 'sda', backup: 'no' },
    ]);
    const [, second] = childElements(childAt(parseXml(xml).documentElement, 'disks'), 'disk');
    expect(attributeOf(childAt(second, 'scratch'), 'file')).toBe(HOSTILE);
    expect(socketOfBackup(xml)).toBe('/s/nbd.sock');
  });

  it('of a job without a Unix socket tells none', () => {
    expect(socketOfBackup('<domainbackup mode="push"><disks/></domainbackup>')).toBeNull();
    const tcp =
      '<domainbackup mode="pull"><server transport="tcp" name="::1" port="1" socket="/s"/></domainbackup>';
    expect(socketOfBackup(tcp)).toBeNull();
    expect(() => socketOfBackup('<domain/>')).toThrow('not a <domainbackup>');
  });
});

describe('the XML of a checkpoint', () => {
  const checkpoint = { name: 'holdfast-B', description: 'holdfast repository=<R> vm=V' };

  it('counts the disks that can be counted, and no other', () => {
    const xml = checkpointXml(checkpoint, DISKS) ?? '';
    expect(disksOf(xml)).toEqual([
      { name: 'vda', checkpoint: 'bitmap', bitmap: 'holdfast-B' },
      { name: 'vdb', checkpoint: 'no' },
      { name: 'sda', checkpoint: 'no' },
    ]);
    const root = parseXml(xml).documentElement;
    expect(textOf(childAt(root, 'name'))).toBe('holdfast-B');
    expect(textOf(childAt(root, 'description'))).toBe(checkpoint.description);
  });

  it('is none when no disk can be counted', () => {
    expect(checkpointXml(checkpoint, DISKS.slice(1))).toBeNull();
  });

  it('that libvirt is to know again has a time and only the disks named', () => {
    const xml = redefinedCheckpointXml('b', { all: ['vda', 'vdb'], counted: ['vdb'] });
    expect(disksOf(xml)).toEqual([
      { name: 'vda', checkpoint: 'no' },
      { name: 'vdb', checkpoint: 'bitmap', bitmap: 'b' },
    ]);
    expect(textOf(childAt(parseXml(xml).documentElement, 'creationTime'))).toMatch(/^\d+$/);
  });
});

describe('what stays free of a scratch filesystem', () => {
  it.each([
    [1000, 20, 500, 200],
    [10_000, 20, 500, 500],
    [0, 20, 500, 0],
  ])(
    'of %i bytes, %i percent or %i bytes: %i',
    (total, scratchKeepFreePercent, scratchKeepFreeBytes, floor) => {
      expect(scratchFloor(total, { scratchKeepFreePercent, scratchKeepFreeBytes })).toBe(floor);
    },
  );
});
