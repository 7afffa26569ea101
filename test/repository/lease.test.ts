import { mkdtemp, readdir, rm, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { Clock } from '../../src/lib/clock.js';
import { pollUntil } from '../../src/lib/deadline.js';
import { newId, type ApplianceId, type RunId } from '../../src/lib/id.js';
import { runTool } from '../../src/lib/process.js';
import { acquireLease, type Lease, type LeaseTerms } from '../../repository/lease.js';
import { LocalBackend } from '../../repository/local-backend.js';
import { RepositoryLab } from './repository-lab.js';

const TERMS: LeaseTerms = { renewMs: 20, expiryMs: 400 };

class MovableClock implements Clock {
  offsetMs = 0;
  nowMs(): number {
    return Date.now() + this.offsetMs;
  }
  monotonicMs(): number {
    return performance.now() + this.offsetMs;
  }
}

describe('a lease', () => {
  let root: string;
  let backend: LocalBackend;
  const clock = new MovableClock();
  beforeEach(async () => {
    root = await mkdtemp('/dev/shm/holdfast-lease-');
    backend = new LocalBackend({ root });
    clock.offsetMs = 0;
  });
  afterEach(async () => {
    await rm(root, { recursive: true, force: true });
  });

  const acquire = (terms: LeaseTerms = TERMS, name = 'vm-x'): Promise<Lease> =>
    acquireLease({ backend, clock, applianceId: newId<ApplianceId>(), terms }, name, {
      runId: newId<RunId>(),
      purpose: 'test',
    });

  it('is refused while held, with its holder named, and free after release', async () => {
    const first = await acquire();
    await expect(acquire()).rejects.toMatchObject({
      code: 'REPOSITORY_LOCKED',
      details: { purpose: 'test', pid: process.pid, token: first.token },
    });
    await first.release();
    await first.release();
    const second = await acquire();
    expect(second.token).toBe(first.token + 1);
    await expect(first.verify()).rejects.toMatchObject({ code: 'LEASE_LOST' });
    await second.verify();
    await second.release();
  });

  it('has tokens that grow for ever, though old token files go', async () => {
    for (let token = 1; token <= 12; token += 1) {
      await using lease = await acquire();
      expect(lease.token).toBe(token);
    }
    expect((await readdir(path.join(root, 'locks/vm-x'))).length).toBeLessThanOrEqual(5);
  });

  it('stays alive by renewal far beyond its term', async () => {
    await using lease = await acquire();
    const start = performance.now();
    await pollUntil(() => (performance.now() - start > 3 * TERMS.expiryMs ? true : undefined), {
      timeoutMs: 5000,
      what: 'three terms',
    });
    await lease.verify();
    await expect(acquire()).rejects.toMatchObject({ code: 'REPOSITORY_LOCKED' });
  });

  it('can be taken over when it was not renewed in time, and the former holder learns it', async () => {
    const slow = await acquire({ renewMs: 50, expiryMs: 100_000 });
    clock.offsetMs = 200_000;
    const next = await acquire({ renewMs: 1000, expiryMs: 100_000 });
    expect(next.token).toBe(slow.token + 1);
    await expect(slow.verify()).rejects.toMatchObject({ code: 'LEASE_LOST' });
    await pollUntil(() => (slow.lost.aborted ? true : undefined), { timeoutMs: 2000, what: 'the loss' });
    expect(slow.lost.reason).toMatchObject({ code: 'LEASE_LOST' });
    await slow.release();
    await next.verify();
    await next.release();
  });

  it('is lost when the repository stays away for the whole term', async () => {
    const lease = await acquire({ renewMs: 10, expiryMs: 100 });
    await rm(path.join(root, 'locks'), { recursive: true });
    await pollUntil(() => (lease.lost.aborted ? true : undefined), { timeoutMs: 2000, what: 'the loss' });
    await lease.release();
  });

  it('is alive on doubt: a file that cannot be read keeps others out until the term is over', async () => {
    const lease = await acquire();
    const [file = ''] = await readdir(path.join(root, 'locks/vm-x'));
    await lease.release();
    await writeFile(path.join(root, 'locks/vm-x', file), '{ "token": 1');
    await expect(acquire()).rejects.toMatchObject({ code: 'REPOSITORY_LOCKED' });
    clock.offsetMs = 10 * TERMS.expiryMs;
    await using next = await acquire();
    expect(next.token).toBe(2);
  });
});

describe('a lease between processes', () => {
  let lab: RepositoryLab;
  beforeEach(async () => {
    lab = await RepositoryLab.create();
  });
  afterEach(async () => {
    await lab[Symbol.asyncDispose]();
  });

  function startChild(
    gate: string,
    onAnswer: (answer: { token?: number; code?: string }) => void,
  ): Promise<unknown> {
    const script = path.join(import.meta.dirname, 'lease-child.ts');
    const args = ['--import', 'tsx', script, lab.root, lab.vmId, gate];
    return runTool(process.execPath, args, {
      timeoutMs: 25_000,
      onOutput: (chunk) => {
        onAnswer(JSON.parse(chunk) as { token?: number; code?: string });
      },
    });
  }

  it('goes to exactly one of several that try at once, and at once to the next when the winner is dead', async () => {
    const gate = path.join(lab.directory, 'gate');
    const answers: { token?: number; code?: string }[] = [];
    const children = [1, 2, 3, 4].map(() =>
      startChild(gate, (answer) => {
        answers.push(answer);
      }),
    );
    await writeFile(gate, '');
    const answered = pollUntil(() => (answers.length === 4 ? true : undefined), {
      timeoutMs: 20_000,
      what: 'four answers',
    });
    await Promise.race([answered, Promise.all(children)]);
    await expect(lab.lease()).rejects.toMatchObject({
      code: 'REPOSITORY_LOCKED',
      details: { purpose: 'race' },
    });
    await writeFile(`${gate}.done`, '');
    await Promise.all(children);
    expect(answers.filter((answer) => answer.token !== undefined)).toEqual([{ token: 1 }]);
    expect(answers.filter((answer) => answer.code === 'REPOSITORY_LOCKED')).toHaveLength(3);
    await using next = await lab.lease();
    expect(next.token).toBe(2);
  });

  it('guards every method that writes: a lost lease changes nothing more', async () => {
    const parent = await lab.commit(new Map([[0, 1]]));
    const terms = { renewMs: 60_000, expiryMs: 100_000 };
    const clock = new MovableClock();
    const late = await lab.reopen({ leaseTerms: terms, clock });
    const lease = await lab.lease(late);
    const point = await lab.prepare(new Map([[1, 1]]), { lease, parent, repository: late });
    clock.offsetMs = 200_000;
    const taker = await lab.lease(late);
    const lost = { code: 'LEASE_LOST' };
    await expect(late.commitPoint(point.draft, [point.layer], { lease })).rejects.toMatchObject(lost);
    await expect(late.deletePoint(lab.vmId, parent.pointId, lease)).rejects.toMatchObject(lost);
    await expect(lab.prepare(new Map(), { lease, parent, repository: late })).rejects.toMatchObject(lost);
    expect(await late.listPoints(lab.vmId)).toHaveLength(1);
    await lease.release();
    await taker.release();
  });
});
