import { describe, expect, it } from 'vitest';
import type { DiskHead } from '../../src/engine/capture-decision.js';
import { decidePush, type PushInput } from '../../src/engine/push-decision.js';
import { newId, type LayerId, type PointId } from '../../src/lib/id.js';

const HEAD = newId<PointId>();
const OLDER = newId<PointId>();
const LAYER = newId<LayerId>();

const head: DiskHead = {
  pointId: HEAD,
  layerId: LAYER,
  sizeBytes: 1000,
  lineage: 'push:here',
  ancestors: [
    { pointId: HEAD, changeIdTo: 'tuesday' },
    { pointId: OLDER, changeIdTo: 'monday' },
  ],
};

const input = (change: Partial<PushInput> = {}): PushInput => ({
  type: 'auto',
  diskName: 'vda',
  probe: { sizeBytes: 1000, lineage: 'push:here' },
  head,
  damage: null,
  changeIds: ['tuesday'],
  ...change,
});

const probe = (change: Partial<PushInput['probe']>): Partial<PushInput> => ({
  probe: { sizeBytes: 1000, lineage: 'push:here', ...change },
});

const FULLS: [string, Partial<PushInput>, string, string][] = [
  ['for the first point', { head: null }, 'FIRST_POINT', 'INCREMENTAL_IMPOSSIBLE'],
  ['when the agent has no change id', { changeIds: [] }, 'BITMAP_MISSING', 'BITMAP_MISSING'],
  [
    'when the id of the last point is not offered',
    { changeIds: ['sunday'] },
    'BITMAP_MISSING',
    'BITMAP_MISSING',
  ],
  [
    'when only the id of an ancestor is: the disk was put back',
    { changeIds: ['monday'] },
    'BITMAP_MISSING',
    'BITMAP_MISSING',
  ],
  ['of another disk', probe({ lineage: 'push:there' }), 'DISK_REPLACED', 'INCREMENTAL_IMPOSSIBLE'],
  ['of a disk that shrank', probe({ sizeBytes: 999 }), 'DISK_SHRANK', 'INCREMENTAL_IMPOSSIBLE'],
  ['on a damaged parent', { damage: 'gone' }, 'PARENT_DAMAGED', 'INCREMENTAL_IMPOSSIBLE'],
];

describe('decidePush', () => {
  it.each(FULLS)('takes a full %s', (_title, change, code) => {
    expect(decidePush(input(change))).toMatchObject({
      method: 'full',
      reason: { code },
      parent: null,
      changeIdFrom: null,
    });
  });

  it.each(FULLS)(
    'fails where incremental is insisted on and it would be a full %s',
    (_t, change, _c, code) => {
      expect(() => decidePush(input({ type: 'incremental', ...change }))).toThrow(
        expect.objectContaining({ code }) as Error,
      );
    },
  );

  it.each([
    ['the id of the last point', ['tuesday']],
    ['it among others', ['monday', 'tuesday', 'sunday']],
    ['nothing, and is believed to have it', null],
  ])('stands on the last point when the agent states %s', (_title, changeIds) => {
    expect(decidePush(input({ changeIds }))).toEqual({
      method: 'bitmap',
      reason: { code: 'BITMAP', sentence: `the bitmap tuesday counts from point ${HEAD}` },
      parent: { pointId: HEAD, layerId: LAYER, sizeBytes: 1000 },
      bitmap: 'tuesday',
      changeIdFrom: 'tuesday',
      countsFrom: HEAD,
    });
  });

  it('stands on the last point when the disk grew', () => {
    expect(decidePush(input(probe({ sizeBytes: 5000 })))).toMatchObject({
      method: 'bitmap',
      parent: { sizeBytes: 1000 },
    });
  });

  it('takes a full when one is asked for, whatever is offered', () => {
    expect(decidePush(input({ type: 'full' }))).toMatchObject({
      method: 'full',
      reason: { code: 'REQUESTED' },
    });
  });
});
