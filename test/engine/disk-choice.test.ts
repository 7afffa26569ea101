import { describe, expect, it } from 'vitest';
import { chooseDisks } from '../../src/engine/disk-choice.js';
import type { DiskView, VmView } from '../../src/engine/types.js';
import { newId, type DiskId, type VmId } from '../../src/lib/id.js';
import type { DiskFacts } from '../../src/source/source.js';

const vmId = newId<VmId>();

function disk(name: string, facts: Partial<DiskFacts> | null = {}): DiskView {
  const found: DiskFacts = {
    isPresent: true,
    target: name,
    serial: `serial-${name}`,
    format: 'qcow2',
    location: `/images/${name}.qcow2`,
    skip: null,
    incremental: { isPossible: true, reason: null },
  };
  return {
    id: newId<DiskId>(),
    vmId,
    number: 1,
    name,
    sizeBytes: 1024,
    source: { kind: 'libvirt', target: name, serial: null, changeTracking: 'auto' },
    facts: facts === null ? null : { ...found, ...facts },
  };
}

const cdrom = disk('sda', { skip: { code: 'REMOVABLE', sentence: 'it is a CD-ROM' } });
const optedOut = disk('vdc', { skip: { code: 'OPTED_OUT', sentence: 'its metadata says so' } });
const gone = disk('vdd', { isPresent: false });
const [vda, vdb] = [disk('vda'), disk('vdb')];

function vm(disks: DiskView[], isMachine = true): VmView {
  const machine: VmView['machine'] = {
    source: { kind: 'libvirt', uri: 'qemu:///system', uuid: '6b5a1f2e-0f7e-4c1e-9d3a-0a1b2c3d4e5f' },
    isPresent: true,
    state: 'running',
    seenAt: '2026-11-21T00:00:00.000Z',
    changeRecords: [],
  };
  return {
    id: vmId,
    name: 'web',
    createdAt: '2026-11-21T00:00:00.000Z',
    machine: isMachine ? machine : null,
    disks,
  };
}

const none = { include: [], exclude: [] };
const all = vm([vda, vdb, cdrom, optedOut, gone]);

describe('chooseDisks', () => {
  it('takes what discovery does not leave out, and says why the rest is', () => {
    const { chosen, leftOut } = chooseDisks(all, none);
    expect(chosen).toEqual([vda, vdb]);
    expect(leftOut.map(({ disk: { name }, reason }) => [name, reason.code])).toEqual([
      ['sda', 'REMOVABLE'],
      ['vdc', 'OPTED_OUT'],
      ['vdd', 'ABSENT'],
    ]);
  });

  it.each([['vdb'], ['serial-vdb'], [vdb.id]])('knows a disk as %s', (word) => {
    expect(chooseDisks(all, { include: [word], exclude: [] }).chosen).toEqual([vdb]);
    const excluded = chooseDisks(all, { include: [], exclude: [word] });
    expect(excluded.chosen).toEqual([vda]);
    expect(excluded.leftOut.find(({ disk: { id } }) => id === vdb.id)?.reason.code).toBe('EXCLUDED');
  });

  it('takes a disk that was opted out when it is named', () => {
    expect(chooseDisks(all, { include: ['vdc'], exclude: [] }).chosen).toEqual([optedOut]);
  });

  it.each([
    ['nothing', 'INVALID_INPUT'],
    ['sda', 'INVALID_INPUT'],
    ['vdd', 'INVALID_INPUT'],
  ])('refuses to include %s', (word, code) => {
    expect(() => chooseDisks(all, { include: [word], exclude: [] })).toThrow(
      expect.objectContaining({ code }) as Error,
    );
  });

  it('refuses an excluded word that means no disk, and a choice of none', () => {
    const refusal = (code: string): Error => expect.objectContaining({ code }) as Error;
    expect(() => chooseDisks(all, { include: [], exclude: ['vdz'] })).toThrow(refusal('INVALID_INPUT'));
    expect(() => chooseDisks(all, { include: [], exclude: ['vda', 'vdb'] })).toThrow(refusal('CONFLICT'));
  });

  it('takes every disk of a VM without a hypervisor', () => {
    const plain = disk('root', null);
    expect(chooseDisks(vm([plain], false), none)).toEqual({ chosen: [plain], leftOut: [] });
  });
});
