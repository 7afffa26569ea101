import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { markGrown, planWindow, type PlanMethod } from '../../src/nbd/capture-plan.js';
import type { ClusterMap } from '../../src/nbd/extents.js';
import { COPY_OP, EXPECT_HASH, EXPECT_ZERO } from '../../src/nbd/index.js';

const CLUSTER = 65_536;
const HASH = 16;

interface Facts {
  zero: boolean;
  dirty: boolean;
  chainZero: boolean;
}

function mapOf(facts: Facts[], tailBytes: number): ClusterMap {
  return {
    offset: 4 * CLUSTER,
    end: (4 + facts.length - 1) * CLUSTER + tailBytes,
    isZero: Uint8Array.from(facts, ({ zero }) => (zero ? 1 : 0)),
    isDirty: Uint8Array.from(facts, ({ dirty }) => (dirty ? 1 : 0)),
  };
}

/** The table of the design, a cluster at a time. */
function expectedOp(method: PlanMethod, { zero, dirty, chainZero }: Facts): number | null {
  if (!dirty) return null;
  if (!zero) return COPY_OP.copy;
  if (method === 'full') return null;
  if (method === 'compare' && chainZero) return null;
  return COPY_OP.zero;
}

const facts = fc.array(fc.record({ zero: fc.boolean(), dirty: fc.boolean(), chainZero: fc.boolean() }), {
  minLength: 1,
  maxLength: 60,
});

describe('planWindow', () => {
  it.each(['full', 'bitmap', 'compare'] as const)('follows the zero rules of the design: %s', (method) => {
    fc.assert(
      fc.property(facts, fc.integer({ min: 1, max: CLUSTER }), (given, tailBytes) => {
        const list = method === 'bitmap' ? given : given.map((fact) => ({ ...fact, dirty: true }));
        const map = mapOf(list, tailBytes);
        const known = {
          kinds: Uint8Array.from(list, ({ chainZero }) => (chainZero ? EXPECT_ZERO : EXPECT_HASH)),
          hashes: Buffer.concat(list.map((_fact, index) => Buffer.alloc(HASH, index + 1))),
        };
        const plan = planWindow(method, map, {
          clusterBytes: CLUSTER,
          hashBytes: HASH,
          ...(method === 'compare' ? { known } : {}),
        });
        const got = new Array<number | null>(list.length).fill(null);
        let planned = 0;
        let before = map.offset;
        for (let i = 0; i < plan.rows.length; i += 5) {
          const [offset = 0, length = 0, op = 0] = plan.rows.slice(i, i + 3);
          expect(offset).toBeGreaterThanOrEqual(before);
          expect(offset % CLUSTER).toBe(0);
          expect(length % CLUSTER === 0 || offset + length === map.end).toBe(true);
          before = offset + length;
          planned += length;
          const first = (offset - map.offset) / CLUSTER;
          for (let cluster = first; cluster < first + Math.ceil(length / CLUSTER); cluster += 1)
            got[cluster] = op;
        }
        expect(got).toEqual(list.map((fact) => expectedOp(method, fact)));
        expect(plan.plannedBytes).toBe(planned);
        const copied = list.flatMap((fact, index) => (got[index] === COPY_OP.copy ? [index] : []));
        if (method !== 'compare') {
          expect(plan.expect).toBeUndefined();
          return;
        }
        expect(plan.expect?.length).toBe(copied.length * (1 + HASH));
        copied.forEach((cluster, position) => {
          const packed = plan.expect?.subarray(position * (1 + HASH), (position + 1) * (1 + HASH));
          const isChainZero = list[cluster]?.chainZero === true;
          expect(packed?.[0]).toBe(isChainZero ? EXPECT_ZERO : EXPECT_HASH);
          expect(packed?.subarray(1)).toEqual(Buffer.alloc(HASH, isChainZero ? 0 : cluster + 1));
        });
      }),
    );
  });
});

describe('markGrown', () => {
  it('marks everything from the cluster that held the old end', () => {
    const map = mapOf(
      Array.from({ length: 6 }, () => ({ zero: true, dirty: false, chainZero: true })),
      CLUSTER,
    );
    markGrown(map, 6 * CLUSTER + 1, CLUSTER);
    expect([...map.isDirty]).toEqual([0, 0, 1, 1, 1, 1]);
  });

  it('leaves what lies before the old end alone', () => {
    const map = mapOf([{ zero: true, dirty: false, chainZero: true }], CLUSTER);
    markGrown(map, 100 * CLUSTER, CLUSTER);
    expect([...map.isDirty]).toEqual([0]);
  });
});
