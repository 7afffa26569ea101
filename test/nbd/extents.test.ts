import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { BASE_ALLOCATION, walkClusters, type ClusterMap } from '../../src/nbd/extents.js';
import type { BlockStatus } from '../../src/nbd/index.js';

const CLUSTER = 16;
const DIRTY = 'qemu:dirty-bitmap:b';

interface Disk {
  /** Per byte: base:allocation flags and dirty flag. */
  base: number[];
  dirty: number[];
}

/** Run lengths of `states` from `offset`, at most `maximum` extents, possibly reaching beyond the asked end. */
function extentsOf(states: number[], offset: number, maximum: number): Float64Array {
  const flat: number[] = [];
  for (let start = offset; start < states.length && flat.length < maximum * 2;) {
    let stop = start + 1;
    while (stop < states.length && states[stop] === states[start]) stop += 1;
    flat.push(stop - start, states[start] ?? 0);
    start = stop;
  }
  return Float64Array.from(flat);
}

function server(disk: Disk, limits: { base: number; dirty: number }) {
  return (offset: number): Promise<BlockStatus> =>
    Promise.resolve({
      [BASE_ALLOCATION]: extentsOf(disk.base, offset, limits.base),
      [DIRTY]: extentsOf(disk.dirty, offset, limits.dirty),
    });
}

async function collect(
  ask: (offset: number, length: number) => Promise<BlockStatus>,
  options: { diskBytes: number; windowBytes: number; dirty: boolean; fromBytes?: number },
): Promise<ClusterMap[]> {
  const maps: ClusterMap[] = [];
  const walk = walkClusters(ask, {
    diskBytes: options.diskBytes,
    clusterBytes: CLUSTER,
    dirtyContext: options.dirty ? DIRTY : null,
    grantedContexts: [BASE_ALLOCATION, DIRTY],
    windowBytes: options.windowBytes,
    ...(options.fromBytes === undefined ? {} : { fromBytes: options.fromBytes }),
  });
  for await (const map of walk) maps.push(map);
  return maps;
}

const runs = (flags: number[]) =>
  fc
    .array(fc.record({ length: fc.integer({ min: 1, max: 40 }), flags: fc.constantFrom(...flags) }), {
      minLength: 1,
      maxLength: 40,
    })
    .map((list) => list.flatMap(({ length, flags: value }) => new Array<number>(length).fill(value)));

describe('walkClusters', () => {
  it('begins where it is told to, with what a walk of the whole disk says from there', async () => {
    const base = Array.from({ length: 100 }, (_value, index) => (index % 48 < 20 ? 2 : 0));
    const disk = { base, dirty: base.map((_flags, index) => (index % 30 < 3 ? 1 : 0)) };
    const options = { diskBytes: base.length, windowBytes: 2 * CLUSTER, dirty: true };
    const whole = await collect(server(disk, { base: 3, dirty: 2 }), options);
    const rest = await collect(server(disk, { base: 3, dirty: 2 }), { ...options, fromBytes: 3 * CLUSTER });
    const flat = (maps: ClusterMap[], key: 'isZero' | 'isDirty'): number[] =>
      maps.flatMap((map) => [...map[key]]);
    expect(rest[0]?.offset).toBe(3 * CLUSTER);
    expect(flat(rest, 'isZero')).toEqual(flat(whole, 'isZero').slice(3));
    expect(flat(rest, 'isDirty')).toEqual(flat(whole, 'isDirty').slice(3));
  });

  it('says of each cluster what a byte-by-byte reading of the answers says, however they are cut', async () => {
    await fc.assert(
      fc.asyncProperty(
        runs([0, 1, 2, 3]),
        runs([0, 1]),
        fc.integer({ min: 1, max: 5 }),
        fc.integer({ min: 1, max: 5 }),
        fc.integer({ min: 1, max: 8 }),
        async (base, dirtyRuns, baseLimit, dirtyLimit, windowClusters) => {
          const dirty = base.map((_byte, index) => dirtyRuns[index % dirtyRuns.length] ?? 0);
          const maps = await collect(server({ base, dirty }, { base: baseLimit, dirty: dirtyLimit }), {
            diskBytes: base.length,
            windowBytes: windowClusters * CLUSTER,
            dirty: true,
          });
          let position = 0;
          for (const map of maps) {
            expect(map.offset).toBe(position);
            expect(map.end === base.length || map.end % CLUSTER === 0).toBe(true);
            map.isZero.forEach((isZero, index) => {
              const from = map.offset + index * CLUSTER;
              const bytes = base.slice(from, Math.min(from + CLUSTER, base.length));
              expect(isZero === 1).toBe(bytes.every((flags) => (flags & 2) !== 0));
              const marks = dirty.slice(from, Math.min(from + CLUSTER, base.length));
              expect(map.isDirty[index] === 1).toBe(marks.includes(1));
            });
            position = map.end;
          }
          expect(position).toBe(base.length);
        },
      ),
      { numRuns: 300 },
    );
  });

  it('reads HOLE without ZERO like data: content is not known', async () => {
    const [map] = await collect(
      server({ base: new Array<number>(64).fill(1), dirty: [] }, { base: 9, dirty: 9 }),
      {
        diskBytes: 64,
        windowBytes: 1024,
        dirty: false,
      },
    );
    expect([...(map?.isZero ?? [])]).toEqual([0, 0, 0, 0]);
  });

  it('knows nothing to be zero when the server grants no context, and asks nothing', async () => {
    const maps: ClusterMap[] = [];
    const walk = walkClusters(() => Promise.reject(new Error('must not be asked')), {
      diskBytes: 40,
      clusterBytes: CLUSTER,
      dirtyContext: null,
      grantedContexts: [],
      windowBytes: 32,
    });
    for await (const map of walk) maps.push(map);
    expect(maps.map(({ offset, end }) => [offset, end])).toEqual([
      [0, 32],
      [32, 40],
    ]);
    expect(maps.every(({ isZero, isDirty }) => !isZero.includes(1) && !isDirty.includes(0))).toBe(true);
  });

  it('ends with NBD_PROTOCOL, not in a loop, when an answer covers nothing', async () => {
    const ask = (): Promise<BlockStatus> => Promise.resolve({ [BASE_ALLOCATION]: new Float64Array() });
    await expect(collect(ask, { diskBytes: 64, windowBytes: 64, dirty: false })).rejects.toMatchObject({
      code: 'NBD_PROTOCOL',
    });
  });

  it('ends with NBD_PROTOCOL when a granted context is left out of an answer', async () => {
    const ask = (): Promise<BlockStatus> =>
      Promise.resolve({ [BASE_ALLOCATION]: Float64Array.from([64, 0]) });
    await expect(collect(ask, { diskBytes: 64, windowBytes: 64, dirty: true })).rejects.toMatchObject({
      code: 'NBD_PROTOCOL',
    });
  });

  it('ends with BITMAP_MISSING when the dirty context was not granted', async () => {
    const walk = walkClusters(() => Promise.resolve({}), {
      diskBytes: 64,
      clusterBytes: CLUSTER,
      dirtyContext: DIRTY,
      grantedContexts: [BASE_ALLOCATION],
      windowBytes: 64,
    });
    await expect(walk.next()).rejects.toMatchObject({ code: 'BITMAP_MISSING' });
  });
});
