import { isUlid, type PointId } from '../lib/id.js';

/** The name of a bitmap that counts from a point; also the point's change id at sources of these kinds. */
export function bitmapNameFor(pointId: PointId): string {
  return `holdfast-${pointId}`;
}

/**
 * The point a bitmap's name says it counts from, or null. Any name that carries the point's id as a
 * word of its own is proof: the id was not known to anybody before the point was made.
 */
export function pointOfBitmap(name: string): PointId | null {
  for (const word of name.split(/[^0-9A-Za-z]+/)) {
    if (isUlid(word.toUpperCase())) return word.toUpperCase() as PointId;
  }
  return null;
}
