import { readdir } from 'node:fs/promises';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { isErrorCode } from '../../src/lib/errors.js';
import type { PointManifest } from '../../repository/types.js';
import { faultyBackend, type Fault, type FaultyBackend } from '../contract/faulty-backend.js';
import { RepositoryLab } from './repository-lab.js';

let lab: RepositoryLab;
let parent: PointManifest;

beforeEach(async () => {
  lab = await RepositoryLab.create();
  parent = await lab.commit(new Map([[0, 1]]));
});
afterEach(async () => {
  await lab[Symbol.asyncDispose]();
});

/** One commit through a backend that begins to misbehave when the commit begins. */
async function commitWith(fault: Fault | undefined): Promise<{ error: unknown; log: string[] }> {
  let faulty: FaultyBackend | undefined;
  const repository = await lab.reopen({
    backend: (backend) => {
      faulty = faultyBackend(backend);
      return faulty.backend;
    },
  });
  await using lease = await lab.lease();
  const point = await lab.prepare(new Map([[2, 7]]), { lease, parent, repository });
  faulty?.arm(fault);
  try {
    await repository.commitPoint(point.draft, [point.layer], {
      lease,
      configFiles: [{ name: 'domain.xml', content: Buffer.from('x') }],
    });
    return { error: undefined, log: [...(faulty?.log ?? [])] };
  } catch (error) {
    const log = [...(faulty?.log ?? [])];
    if (fault?.kind === 'fail') await repository.discardLayer(point.layer);
    return { error, log };
  }
}

async function expectOldOrNew(before: PointManifest[]): Promise<'old' | 'new'> {
  const points = await lab.repository.listPoints(lab.vmId);
  expect(points.slice(0, before.length)).toEqual(before);
  expect(points.length - before.length).toBeLessThanOrEqual(1);
  const added = points[before.length];
  if (added === undefined) return 'old';
  const chain = await lab.repository.openChain(added, lab.diskId);
  expect(chain.layers).toHaveLength(2);
  return 'new';
}

describe('commitPoint under faults', () => {
  it('interrupted after any operation it leaves the old state or the new one, and sweep and a retry bring order', async () => {
    const { log: whole } = await commitWith(undefined);
    expect(whole.length).toBeGreaterThan(15);
    const outcomes: string[] = [];
    for (let at = 0; at < whole.length; at += 1) {
      const before = await lab.repository.listPoints(lab.vmId);
      const { error } = await commitWith({ kind: 'crash', at });
      outcomes.push(await expectOldOrNew(before));
      expect(isErrorCode(error, 'REPOSITORY_IO')).toBe(true);
      const retried = await commitWith(undefined);
      expect(retried.error).toBeUndefined();
    }
    expect(outcomes[0]).toBe('old');
    const swept = await lab.repository.sweep();
    expect(swept.skipped).toEqual([]);
    const { findings, damagedPoints } = await lab.repository.check({ content: false });
    expect(findings).toEqual([]);
    expect(damagedPoints).toEqual([]);
  }, 120_000);

  it('failing at any operation it rejects with the code, and a discard leaves only what is committed', async () => {
    const { log: whole } = await commitWith(undefined);
    for (let at = 1; at <= whole.length; at += 1) {
      const before = await lab.repository.listPoints(lab.vmId);
      const { error } = await commitWith({ kind: 'fail', at, code: 'REPOSITORY_FULL' });
      expect(isErrorCode(error, 'REPOSITORY_FULL'), `operation ${at}: ${whole[at - 1] ?? ''}`).toBe(true);
      await expectOldOrNew(before);
      const points = await lab.repository.listPoints(lab.vmId);
      const files = (await readdir(lab.diskDirectory())).sort();
      const expected = points.flatMap(({ disks }) =>
        disks.flatMap(({ layerId }) => [`${layerId}.qcow2`, `${layerId}.sums`]),
      );
      expect(files).toEqual(expected.sort());
    }
  }, 120_000);
});
