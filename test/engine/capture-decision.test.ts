import { describe, expect, it } from 'vitest';
import {
  decideCapture,
  findHead,
  type CaptureInput,
  type DiskHead,
} from '../../src/engine/capture-decision.js';
import { newId, type DiskId, type LayerId, type PointId } from '../../src/lib/id.js';
import { bitmapNameFor } from '../../src/source/bitmap-name.js';
import type { PointManifest } from '../../repository/index.js';

const HEAD = newId<PointId>();
const OLDER = newId<PointId>();
const ELSEWHERE = newId<PointId>();
const LAYER = newId<LayerId>();

const head: DiskHead = {
  pointId: HEAD,
  layerId: LAYER,
  sizeBytes: 1000,
  lineage: 'nbd:here',
  ancestors: [HEAD, OLDER].map((pointId) => ({ pointId, changeIdTo: bitmapNameFor(pointId) })),
};

const GIVEN = { recordKeeper: 'given', noRecordReason: null } as const;

function input(change: Partial<CaptureInput> & { bitmaps?: [string, boolean][] }): CaptureInput {
  const { bitmaps = [], ...rest } = change;
  return {
    type: 'auto',
    diskName: 'vda',
    tracking: 'auto',
    probe: {
      sizeBytes: 1000,
      lineage: 'nbd:here',
      records: bitmaps.map(([bitmap, isInconsistent]) => ({ bitmap, isInconsistent })),
      ...GIVEN,
    },
    head,
    damage: null,
    stated: null,
    ...rest,
  };
}

const ofHead: [string, boolean] = [bitmapNameFor(HEAD), false];
const ofOlder: [string, boolean] = [bitmapNameFor(OLDER), false];

describe('decideCapture', () => {
  it.each<[string, Partial<CaptureInput> & { bitmaps?: [string, boolean][] }, string, string]>([
    ['a full when asked for, whatever is offered', { type: 'full', bitmaps: [ofHead] }, 'full', 'REQUESTED'],
    ['a full for the first point', { head: null }, 'full', 'FIRST_POINT'],
    ['a full on a damaged parent', { damage: 'gone', bitmaps: [ofHead] }, 'full', 'PARENT_DAMAGED'],
    ['the bitmap of the head', { bitmaps: [ofHead] }, 'bitmap', 'BITMAP'],
    ['the bitmap of an ancestor', { bitmaps: [ofOlder] }, 'bitmap', 'BITMAP'],
    [
      'a compare when the bitmap proves nothing',
      { bitmaps: [['bitmap0', false]] },
      'compare',
      'BITMAP_UNPROVEN',
    ],
    [
      'a compare when the bitmap is of a point of another chain',
      { bitmaps: [[bitmapNameFor(ELSEWHERE), false]] },
      'compare',
      'BITMAP_UNPROVEN',
    ],
    [
      'a full when the bitmap is inconsistent',
      { bitmaps: [[ofHead[0], true]] },
      'full',
      'BITMAP_INCONSISTENT',
    ],
    ['a compare without any record', {}, 'compare', 'NO_CHANGE_RECORD'],
    ['a full when a bitmap is expected and none is there', { tracking: 'bitmap' }, 'full', 'BITMAP_MISSING'],
    ['a compare when set to', { tracking: 'compare', bitmaps: [ofHead] }, 'compare', 'NO_CHANGE_RECORD'],
    [
      'the bitmap the user states',
      { stated: { name: 'b0', sincePointId: OLDER }, bitmaps: [['b0', false]] },
      'bitmap',
      'BITMAP',
    ],
    [
      'a compare when the stated point is none of the chain',
      { stated: { name: 'b0', sincePointId: ELSEWHERE }, bitmaps: [['b0', false]] },
      'compare',
      'BITMAP_UNPROVEN',
    ],
    [
      'a full when the stated bitmap is missing',
      { stated: { name: 'b0', sincePointId: HEAD } },
      'full',
      'BITMAP_MISSING',
    ],
    [
      'a full when the stated bitmap is inconsistent',
      { stated: { name: 'b0', sincePointId: HEAD }, bitmaps: [['b0', true]] },
      'full',
      'BITMAP_INCONSISTENT',
    ],
  ])('takes %s', (_title, change, method, code) => {
    const decision = decideCapture(input(change));
    expect(decision.method).toBe(method);
    expect(decision.reason.code).toBe(code);
    expect(decision.reason.sentence).not.toBe('');
    expect(decision.parent?.layerId ?? null).toBe(method === 'full' ? null : LAYER);
    expect(decision.changeIdFrom === null).toBe(method !== 'bitmap');
  });

  it('takes a full when the disk is another one', () => {
    const probe = { ...GIVEN, sizeBytes: 1000, lineage: 'nbd:there', records: [] };
    expect(decideCapture(input({ probe })).reason.code).toBe('DISK_REPLACED');
  });

  it('takes a full when the disk shrank, an incremental when it grew', () => {
    const records = [{ bitmap: ofHead[0], isInconsistent: false }];
    const shrunk = { ...GIVEN, sizeBytes: 999, lineage: 'nbd:here', records };
    expect(decideCapture(input({ probe: shrunk })).reason.code).toBe('DISK_SHRANK');
    const grown = { ...GIVEN, sizeBytes: 1001, lineage: 'nbd:here', records };
    expect(decideCapture(input({ probe: grown })).method).toBe('bitmap');
  });

  it('counts from the youngest point a bitmap is offered for', () => {
    expect(decideCapture(input({ bitmaps: [ofOlder, ofHead] })).bitmap).toBe(ofHead[0]);
    expect(decideCapture(input({ bitmaps: [ofOlder, ofHead] })).changeIdFrom).toBe(bitmapNameFor(HEAD));
    expect(decideCapture(input({ bitmaps: [ofOlder] })).changeIdFrom).toBe(bitmapNameFor(OLDER));
  });

  it.each([
    [{ head: null }, 'INCREMENTAL_IMPOSSIBLE'],
    [{ damage: 'gone' }, 'INCREMENTAL_IMPOSSIBLE'],
    [{ tracking: 'bitmap' as const }, 'BITMAP_MISSING'],
    [{ bitmaps: [[ofHead[0], true]] as [string, boolean][] }, 'BITMAP_INCONSISTENT'],
    [{ stated: { name: 'b0', sincePointId: HEAD } }, 'BITMAP_MISSING'],
  ])('is an error instead of a full when incremental was insisted on: %j', (change, code) => {
    expect(() => decideCapture(input({ type: 'incremental', ...change }))).toThrow(
      expect.objectContaining({ code }) as Error,
    );
  });
});

describe('decideCapture with records that Holdfast makes', () => {
  const managed = (
    records: CaptureInput['probe']['records'],
    change: Partial<CaptureInput> & { noRecordReason?: string } = {},
  ): CaptureInput => {
    const { noRecordReason = null, ...rest } = change;
    const probe = {
      sizeBytes: 1000,
      lineage: 'nbd:here',
      records,
      recordKeeper: 'managed',
      noRecordReason,
    } as const;
    return { ...input(rest), probe };
  };
  const good = (bitmap: string): CaptureInput['probe']['records'][number] => ({
    bitmap,
    isInconsistent: false,
  });

  it('counts from the record the last point began', () => {
    const decision = decideCapture(managed([good(bitmapNameFor(OLDER)), good(bitmapNameFor(HEAD))]));
    expect(decision).toMatchObject({ method: 'bitmap', bitmap: bitmapNameFor(HEAD) });
    expect(decision.changeIdFrom).toBe(bitmapNameFor(HEAD));
  });

  it('does not trust an older record in its place: the disk was put back to an earlier state', () => {
    const decision = decideCapture(managed([good(bitmapNameFor(OLDER))]));
    expect(decision).toMatchObject({ method: 'compare', bitmap: null, reason: { code: 'BITMAP_MISSING' } });
  });

  it('counts from the older record that the last point says goes on', () => {
    const older = bitmapNameFor(OLDER);
    const ancestors = [HEAD, OLDER].map((pointId) => ({ pointId, changeIdTo: older }));
    const decision = decideCapture(managed([good(older)], { head: { ...head, ancestors } }));
    expect(decision.countsFrom).toBe(OLDER);
    expect(decision).toMatchObject({ method: 'bitmap', bitmap: older, changeIdFrom: older });
    expect(decision.parent?.pointId).toBe(HEAD);
  });

  it('takes a full when the record is broken, a compare with the reason when there can be none', () => {
    const broken = decideCapture(managed([{ bitmap: bitmapNameFor(HEAD), isInconsistent: true }]));
    expect(broken).toMatchObject({ method: 'full', reason: { code: 'BITMAP_INCONSISTENT' } });
    const raw = decideCapture(managed([], { noRecordReason: 'raw images keep no bitmaps' }));
    expect(raw).toMatchObject({ method: 'compare', reason: { code: 'NO_CHANGE_RECORD' } });
    expect(raw.reason.sentence).toContain('raw images keep no bitmaps');
  });

  it('compares a disk that can have no record now, whatever it is said to have', () => {
    const broken = [{ bitmap: bitmapNameFor(HEAD), isInconsistent: true }];
    const raw = decideCapture(managed(broken, { noRecordReason: 'raw images keep no bitmaps' }));
    expect(raw).toMatchObject({ method: 'compare', reason: { code: 'NO_CHANGE_RECORD' } });
  });

  it('does not trust a record of a point that the chain does not stand on', () => {
    const ancestors = [{ pointId: HEAD, changeIdTo: bitmapNameFor(OLDER) }];
    const decision = decideCapture(managed([good(bitmapNameFor(OLDER))], { head: { ...head, ancestors } }));
    expect(decision).toMatchObject({ method: 'compare', bitmap: null });
  });

  it('takes a full without the record when a bitmap is expected', () => {
    const decision = decideCapture(managed([], { tracking: 'bitmap' }));
    expect(decision).toMatchObject({ method: 'full', reason: { code: 'BITMAP_MISSING' } });
  });
});

describe('findHead', () => {
  const disk = newId<DiskId>();
  const other = newId<DiskId>();

  function point(
    pointId: PointId,
    parentPointId: PointId | null,
    change: { diskId?: DiskId; lineage?: string } = {},
  ) {
    return {
      pointId,
      disks: [
        {
          diskId: change.diskId ?? disk,
          layerId: newId<LayerId>(),
          parentPointId,
          sizeBytes: 1000,
          sourceLineage: change.lineage ?? 'nbd:here',
          changeIdTo: bitmapNameFor(pointId),
        },
      ],
    } as PointManifest;
  }

  it('is the newest point that has the disk, with its ancestors newest first', () => {
    const [a, b, c] = [newId<PointId>(), newId<PointId>(), newId<PointId>()];
    const points = [point(a, null), point(b, a), point(c, null, { diskId: other })];
    const found = findHead(points, disk);
    expect(found?.pointId).toBe(b);
    expect(found?.ancestors.map(({ pointId }) => pointId)).toEqual([b, a]);
  });

  it('does not reach beyond a full: an older point is of another chain', () => {
    const [a, b] = [newId<PointId>(), newId<PointId>()];
    expect(findHead([point(a, null), point(b, null)], disk)?.ancestors.map(({ pointId }) => pointId)).toEqual(
      [b],
    );
  });

  it('does not reach beyond a change of lineage', () => {
    const [a, b] = [newId<PointId>(), newId<PointId>()];
    const points = [point(a, null, { lineage: 'nbd:there' }), point(b, a)];
    expect(findHead(points, disk)?.ancestors.map(({ pointId }) => pointId)).toEqual([b]);
  });

  it('is null when no point has the disk', () => {
    expect(findHead([], disk)).toBeNull();
  });
});
