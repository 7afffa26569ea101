import { describe, expect, it } from 'vitest';
import type { VmRow } from '../../src/db/database.js';
import { followMachine } from '../../src/engine/follow-machine.js';
import { newId, type DiskId, type VmId } from '../../src/lib/id.js';
import type { DiscoveredDisk, DiscoveredVm, DiskFacts } from '../../src/source/source.js';

const UUID = '6b5a1f2e-0f7e-4c1e-9d3a-0a1b2c3d4e5f';

function found(disks: { target: string; serial?: string; location?: string }[]): DiscoveredVm {
  return {
    source: { kind: 'libvirt', uri: 'qemu:///system', uuid: UUID },
    key: `libvirt:${UUID}`,
    name: 'web',
    facts: { isPresent: true, state: 'running', seenAt: '2026-11-21T00:00:00.000Z', changeRecords: [] },
    disks: disks.map(({ target, serial = null, location = `/images/${target}` }): DiscoveredDisk => ({
      facts: {
        isPresent: true,
        target,
        serial,
        format: 'qcow2',
        location,
        skip: null,
        incremental: { isPossible: true, reason: null },
      },
      sizeBytes: 1024,
      lineage: `libvirt:${UUID}:${location}`,
    })),
  };
}

const empty: VmRow = {
  id: newId<VmId>(),
  name: 'web',
  createdAt: '2026-11-21T00:00:00.000Z',
  sourceKey: null,
  source: null,
  facts: null,
  disks: [],
};

const byTarget = (row: VmRow, target: string): VmRow['disks'][number] | undefined =>
  row.disks.find(({ facts }) => (facts as DiskFacts).target === target && (facts as DiskFacts).isPresent);

describe('followMachine', () => {
  it('records disks with numbers of their own, once', () => {
    const row = followMachine(empty, found([{ target: 'vda' }, { target: 'vdb' }]));
    expect(row.disks.map(({ number, name }) => [number, name])).toEqual([
      [1, 'vda'],
      [2, 'vdb'],
    ]);
    const again = followMachine(row, found([{ target: 'vda' }, { target: 'vdb' }]));
    expect(again).toEqual(row);
  });

  it('knows disks again by what they are when their targets are exchanged', () => {
    const row = followMachine(
      empty,
      found([
        { target: 'vda', location: '/a' },
        { target: 'vdb', location: '/b' },
      ]),
    );
    const swapped = followMachine(
      row,
      found([
        { target: 'vda', location: '/b' },
        { target: 'vdb', location: '/a' },
      ]),
    );
    expect(byTarget(swapped, 'vda')?.id).toBe(byTarget(row, 'vdb')?.id);
    expect(byTarget(swapped, 'vdb')?.id).toBe(byTarget(row, 'vda')?.id);
  });

  it('knows a disk again by its serial after it moved to another file and target', () => {
    const row = followMachine(empty, found([{ target: 'vda', serial: 'S1' }]));
    const moved = followMachine(row, found([{ target: 'vdc', serial: 'S1', location: '/elsewhere' }]));
    expect(moved.disks).toHaveLength(1);
    expect(moved.disks[0]).toMatchObject({ id: row.disks[0]?.id, lineage: `libvirt:${UUID}:/elsewhere` });
  });

  it('takes a disk with another serial under the same target for another disk', () => {
    const row = followMachine(empty, found([{ target: 'vda', serial: 'S1' }]));
    const replaced = followMachine(row, found([{ target: 'vda', serial: 'S2', location: '/new' }]));
    expect(replaced.disks).toHaveLength(2);
    expect(byTarget(replaced, 'vda')).toMatchObject({ number: 2, name: 'vda-2' });
    expect(replaced.disks[0]?.facts).toMatchObject({ isPresent: false, serial: 'S1' });
  });

  it('keeps a disk that is gone, marked, and never gives its number away', () => {
    const row = followMachine(empty, found([{ target: 'vda' }, { target: 'vdb' }]));
    const without = followMachine(row, found([{ target: 'vda' }]));
    expect(without.disks[1]?.facts).toMatchObject({ isPresent: false });
    const withNew = followMachine(without, found([{ target: 'vda' }, { target: 'vdc' }]));
    expect(byTarget(withNew, 'vdc')?.number).toBe(3);
  });

  it('gives sources to the disks a repository knew, by lineage, and keeps their ids', () => {
    const id = newId<DiskId>();
    const lineage = `libvirt:${UUID}:/images/vda`;
    const known = {
      id,
      vmId: empty.id,
      number: 4,
      name: 'root',
      sizeBytes: 1,
      lineage,
      source: null,
      facts: null,
    };
    const row = followMachine({ ...empty, disks: [known] }, found([{ target: 'vda' }]));
    expect(row.disks).toEqual([
      expect.objectContaining({
        id,
        number: 4,
        name: 'root',
        sizeBytes: 1024,
        source: expect.anything() as unknown,
      }),
    ]);
  });

  it('keeps the tracking the user chose', () => {
    const row = followMachine(empty, found([{ target: 'vda' }]));
    const [disk] = row.disks;
    if (disk === undefined) throw new Error('no disk');
    const source = { ...(disk.source as object), changeTracking: 'compare' };
    const again = followMachine({ ...row, disks: [{ ...disk, source }] }, found([{ target: 'vda' }]));
    expect(again.disks[0]?.source).toMatchObject({ changeTracking: 'compare' });
  });
});
