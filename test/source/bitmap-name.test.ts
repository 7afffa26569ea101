import { describe, expect, it } from 'vitest';
import { newId, type PointId } from '../../src/lib/id.js';
import { bitmapNameFor, pointOfBitmap } from '../../src/source/bitmap-name.js';

describe('bitmap names', () => {
  it('carry the point they count from', () => {
    const point = newId<PointId>();
    expect(pointOfBitmap(bitmapNameFor(point))).toBe(point);
    expect(pointOfBitmap(`vda.${point.toLowerCase()}_x`)).toBe(point);
  });

  it.each(['', 'bitmap0', 'holdfast', 'holdfast-', '01J', `x${newId<PointId>()}`, 'I'.repeat(26)])(
    'prove nothing without a whole id: %j',
    (name) => {
      expect(pointOfBitmap(name)).toBeNull();
    },
  );
});
