import { expect, it } from 'vitest';
import type { PointManifest } from '../../repository/index.js';
import { obsoleteRecords } from '../../src/engine/change-records.js';
import { newId, type DiskId, type LayerId, type PointId, type RepositoryId } from '../../src/lib/id.js';
import { bitmapNameFor } from '../../src/source/bitmap-name.js';

const here = newId<RepositoryId>();
const elsewhere = newId<RepositoryId>();
const [vda, vdb] = [newId<DiskId>(), newId<DiskId>()];

function point(disks: { diskId: DiskId; changeIdTo?: string }[], pointId = newId<PointId>()): PointManifest {
  return {
    pointId,
    repositoryId: here,
    disks: disks.map(({ diskId, changeIdTo = bitmapNameFor(pointId) }) => ({
      diskId,
      layerId: newId<LayerId>(),
      parentPointId: null,
      sizeBytes: 1,
      sourceLineage: 'libvirt:x',
      changeIdTo,
    })),
  } as unknown as PointManifest;
}

const nameOf = ({ pointId }: PointManifest): string => bitmapNameFor(pointId);

it('removes the records of older points of this repository, and of runs that came to nothing', () => {
  const [a, b] = [point([{ diskId: vda }]), point([{ diskId: vda }])];
  const failed = bitmapNameFor(newId<PointId>());
  const other = bitmapNameFor(newId<PointId>());
  const own = new Map([
    [nameOf(a), here],
    [failed, here],
    [other, elsewhere],
    [nameOf(b), here],
  ]);
  expect(obsoleteRecords(own, here, { points: [a, b], diskIds: [vda, vdb] }).sort()).toEqual(
    [nameOf(a), failed].sort(),
  );
});

it('keeps the record a disk still counts from that the last run left out', () => {
  const [a, b] = [point([{ diskId: vda }, { diskId: vdb }]), point([{ diskId: vda }])];
  const own = new Map([
    [nameOf(a), here],
    [nameOf(b), here],
  ]);
  expect(obsoleteRecords(own, here, { points: [a, b], diskIds: [vda, vdb] })).toEqual([]);
});

it('keeps the older record that a point of a machine that was off goes on with', () => {
  const a = point([{ diskId: vda }]);
  const offline = point([{ diskId: vda, changeIdTo: nameOf(a) }]);
  expect(
    obsoleteRecords(new Map([[nameOf(a), here]]), here, { points: [a, offline], diskIds: [vda] }),
  ).toEqual([]);
});

it('lets the record go that only a disk counts from which the machine has no more', () => {
  const [a, b] = [point([{ diskId: vda }, { diskId: vdb }]), point([{ diskId: vda }])];
  const own = new Map([
    [nameOf(a), here],
    [nameOf(b), here],
  ]);
  expect(obsoleteRecords(own, here, { points: [a, b], diskIds: [vda] })).toEqual([nameOf(a)]);
});
