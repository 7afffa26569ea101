import { describe, expect, it } from 'vitest';
import {
  newId,
  type DiskId,
  type RepositoryId,
  type RunId,
  type TokenId,
  type VmId,
} from '../../src/lib/id.js';
import type { DatabaseHandles } from './database-contract.js';
import { addPair, pointEntry, repositoryRow, runRow, time, tokenRow, vmRow } from './database-fixture.js';

export function describeSmallTables(handles: () => DatabaseHandles): void {
  describe('repositories', () => {
    it('answers what was inserted, null for what was not', async () => {
      const { first, second } = handles();
      const row = repositoryRow({
        name: 'Größe 💾',
        root: `/srv/${'ü'.repeat(1000)}/${newId()}`.slice(0, 1024),
      });
      await first.repositories.insert(row);
      expect(await second.repositories.get(row.id)).toEqual(row);
      expect(await first.repositories.get(newId<RepositoryId>())).toBeNull();
    });

    it('refuses a second name or root and says which', async () => {
      const { first } = handles();
      const row = repositoryRow({ root: `/srv/${'r'.repeat(990)}${newId()}` });
      await first.repositories.insert(row);
      await expect(first.repositories.insert(repositoryRow({ name: row.name }))).rejects.toMatchObject({
        code: 'CONFLICT',
        details: { field: 'name', repositoryId: row.id },
      });
      await expect(first.repositories.insert(repositoryRow({ root: row.root }))).rejects.toMatchObject({
        code: 'CONFLICT',
        details: { field: 'root', repositoryId: row.id },
      });
    });

    it('takes names that differ only in case, accent or a space at the end as different', async () => {
      const { first } = handles();
      const name = `Name${newId()}e`;
      for (const other of [name, name.toLowerCase(), `${name} `, name.replace(/e$/, 'é')]) {
        await first.repositories.insert(repositoryRow({ name: other }));
      }
    });

    it('refuses a name or root that is too long, or empty', async () => {
      const { first } = handles();
      for (const change of [{ name: 'n'.repeat(256) }, { root: `/${'r'.repeat(1024)}` }, { name: '' }]) {
        await expect(first.repositories.insert(repositoryRow(change))).rejects.toMatchObject({
          code: 'INVALID_INPUT',
        });
      }
    });

    it('pages through all, each once, while rows are added', async () => {
      const { first } = handles();
      const rows = Array.from({ length: 5 }, () => repositoryRow());
      for (const row of rows) await first.repositories.insert(row);
      const seen: string[] = [];
      let cursor: string | null = null;
      do {
        const page: { rows: { id: string }[]; nextCursor: string | null } = await first.repositories.list({
          limit: 2,
          cursor,
        });
        seen.push(...page.rows.map((row) => row.id));
        cursor = page.nextCursor;
        if (seen.length < 4) await first.repositories.insert(repositoryRow());
      } while (cursor !== null);
      expect(new Set(seen).size).toBe(seen.length);
      expect(seen).toEqual(expect.arrayContaining(rows.map((row) => row.id)));
    });

    it('refuses a cursor that is none, or of another list', async () => {
      const { first } = handles();
      for (let i = 0; i < 2; i += 1) await first.auditLog.append(auditRow(`entry ${i}`));
      const audit = await first.auditLog.list({ limit: 1, cursor: null });
      for (const cursor of ['', 'x', 'bnVsbA', 'a'.repeat(2000), String(audit.nextCursor)]) {
        await expect(first.repositories.list({ limit: 1, cursor })).rejects.toMatchObject({
          code: 'INVALID_INPUT',
          details: { field: 'cursor' },
        });
      }
    });
  });

  describe('vms', () => {
    it('keeps VM and disks, with exact sizes and the source as it was', async () => {
      const { first, second } = handles();
      const vm = vmRow({ name: 'v'.repeat(255) }, 3);
      await first.vms.insert(vm);
      expect(await second.vms.get(vm.id)).toEqual(vm);
      expect(await first.vms.get(newId<VmId>())).toBeNull();
    });

    it('inserts VM and disks together or not at all', async () => {
      const { first } = handles();
      const vm = vmRow({}, 2);
      vm.disks[1]!.number = 0;
      await expect(first.vms.insert(vm)).rejects.toMatchObject({ code: 'CONFLICT' });
      expect(await first.vms.get(vm.id)).toBeNull();
    });

    it('refuses a second VM of the same name, also two at once', async () => {
      const { first, second } = handles();
      const name = `web ${newId()}`;
      const results = await Promise.allSettled([
        first.vms.insert(vmRow({ name })),
        second.vms.insert(vmRow({ name })),
      ]);
      expect(results.map((result) => result.status).sort()).toEqual(['fulfilled', 'rejected']);
      expect(results.find((result) => result.status === 'rejected')).toMatchObject({
        reason: { code: 'CONFLICT' },
      });
    });

    it('lists VMs with their own disks', async () => {
      const { first } = handles();
      const [one, two] = [vmRow({}, 1), vmRow({}, 2)];
      await first.vms.insert(one);
      await first.vms.insert(two);
      const { rows } = await first.vms.list({ limit: 1000, cursor: null });
      expect(rows.find((row) => row.id === one.id)).toEqual(one);
      expect(rows.find((row) => row.id === two.id)).toEqual(two);
    });

    it('updates a disk, and says when there is none', async () => {
      const { first } = handles();
      const vm = vmRow();
      await first.vms.insert(vm);
      const disk = vm.disks[0]!;
      await first.vms.updateDisk(disk.id, { sizeBytes: 5, lineage: 'other' });
      await first.vms.updateDisk(disk.id, {});
      expect((await first.vms.get(vm.id))?.disks[0]).toEqual({ ...disk, sizeBytes: 5, lineage: 'other' });
      await expect(first.vms.updateDisk(newId<DiskId>(), { sizeBytes: 1 })).rejects.toMatchObject({
        code: 'NOT_FOUND',
      });
    });

    it('removes a VM with its disks; its ended runs stay without it', async () => {
      const { first } = handles();
      const { vm, repository } = await addPair(first, 2);
      const run = runRow({ vmId: vm.id, repositoryId: repository.id, state: 'completed' });
      await first.runs.insert(run, { turn: 'refuse' });
      await first.vms.remove(vm.id);
      expect(await first.vms.get(vm.id)).toBeNull();
      expect(await first.runs.get(run.id)).toEqual({ ...run, vmId: null });
      await expect(first.vms.remove(vm.id)).rejects.toMatchObject({ code: 'NOT_FOUND' });
    });

    it('does not remove a VM with active runs or points', async () => {
      const { first } = handles();
      const { vm, repository } = await addPair(first);
      const run = runRow({ vmId: vm.id });
      await first.runs.insert(run, { turn: 'wait' });
      await expect(first.vms.remove(vm.id)).rejects.toMatchObject({
        code: 'CONFLICT',
        details: { runIds: [run.id] },
      });
      await first.runs.requestCancel(run.id, time(1));
      const entry = pointEntry(vm, repository);
      await first.points.insert(entry.point, entry.layers);
      await expect(first.vms.remove(vm.id)).rejects.toMatchObject({ code: 'CONFLICT' });
      expect(await first.vms.get(vm.id)).toEqual(vm);
    });
  });

  describe('tokens', () => {
    it('are found by hash, touched, listed and removed once', async () => {
      const { first, second } = handles();
      const row = tokenRow();
      await first.tokens.insert(row);
      expect(await second.tokens.findByHash(row.hash)).toEqual(row);
      expect(await first.tokens.findByHash('0')).toBeNull();
      await first.tokens.touch(row.id, time(5));
      expect(await first.tokens.list()).toContainEqual({ ...row, lastUsedAt: time(5) });
      await expect(first.tokens.insert(tokenRow({ hash: row.hash }))).rejects.toMatchObject({
        code: 'CONFLICT',
      });
      expect(await first.tokens.remove(row.id)).toBe(true);
      expect(await first.tokens.remove(row.id)).toBe(false);
    });
  });

  describe('idempotency keys', () => {
    const keyRow = (tokenId: TokenId, key: string) => ({
      tokenId,
      key,
      requestHash: 'a'.repeat(64),
      createdAt: time(10),
      status: null,
      body: null,
    });

    it('answers the first request of a key to every later one', async () => {
      const { first, second } = handles();
      const token = tokenRow();
      await first.tokens.insert(token);
      const row = keyRow(token.id, 'key ä');
      expect(await first.idempotencyKeys.begin(row, time(0))).toBeNull();
      expect(await second.idempotencyKeys.begin({ ...row, requestHash: 'b' }, time(0))).toEqual(row);
      await first.idempotencyKeys.finish(token.id, row.key, { status: 202, body: { id: 1 } });
      expect(await second.idempotencyKeys.begin(row, time(0))).toEqual({
        ...row,
        status: 202,
        body: { id: 1 },
      });
      await first.idempotencyKeys.remove(token.id, row.key);
      expect(await second.idempotencyKeys.begin(row, time(0))).toBeNull();
    });

    it('lets exactly one of many at once be the first', async () => {
      const { first, second } = handles();
      const token = tokenRow();
      await first.tokens.insert(token);
      const row = keyRow(token.id, 'race');
      const answers = await Promise.all(
        [first, second, first, second].map((db) => db.idempotencyKeys.begin(row, time(0))),
      );
      expect(answers.filter((answer) => answer === null)).toHaveLength(1);
    });

    it('forgets old keys, and goes with its token', async () => {
      const { first } = handles();
      const token = tokenRow();
      await first.tokens.insert(token);
      const row = keyRow(token.id, 'old');
      await first.idempotencyKeys.begin(row, time(0));
      expect(await first.idempotencyKeys.begin({ ...row, createdAt: time(20) }, time(11))).toBeNull();
      expect(await first.tokens.remove(token.id)).toBe(true);
      await expect(first.idempotencyKeys.begin(row, time(0))).rejects.toMatchObject({ code: 'NOT_FOUND' });
    });
  });

  describe('settings', () => {
    it('keep the value that was there first, also when many ask at once', async () => {
      const { first, second } = handles();
      const key = `key-${newId()}`;
      const asked = await Promise.all(
        Array.from({ length: 8 }, (_item, index) =>
          (index % 2 === 0 ? first : second).settings.getOrCreate(key, `value ${index}`),
        ),
      );
      expect(new Set(asked).size).toBe(1);
      expect(await second.settings.getOrCreate(key, 'later')).toBe(asked[0]);
      expect(await first.settings.getOrCreate(`${key}-other`, 'ä')).toBe('ä');
    });
  });

  describe('audit log', () => {
    it('is paged newest first', async () => {
      const { first } = handles();
      for (const subject of ['one', 'two', 'three']) await first.auditLog.append(auditRow(subject));
      const page = await first.auditLog.list({ limit: 2, cursor: null });
      expect(page.rows.map((row) => row.subject)).toEqual(['three', 'two']);
      const next = await first.auditLog.list({ limit: 1, cursor: page.nextCursor });
      expect(next.rows).toEqual([auditRow('one')]);
    });
  });

  describe('run events', () => {
    it('are numbered one after the other, also when several append at once', async () => {
      const { first, second } = handles();
      const run = runRow();
      await first.runs.insert(run, { turn: 'wait' });
      const event = {
        runId: run.id,
        at: time(1),
        level: 'info',
        code: 'STEP',
        message: 'ä',
        details: { n: 1 },
      };
      await Promise.all(
        Array.from({ length: 20 }, (_item, index) =>
          (index % 2 === 0 ? first : second).runEvents.append(event),
        ),
      );
      const all = await second.runEvents.list(run.id, { afterSequence: 0, limit: 100 });
      expect(all.map((row) => row.sequence)).toEqual(Array.from({ length: 20 }, (_item, index) => index + 1));
      expect(all[0]).toEqual({ ...event, sequence: 1 });
      const some = await first.runEvents.list(run.id, { afterSequence: 5, limit: 2 });
      expect(some.map((row) => row.sequence)).toEqual([6, 7]);
    });

    it('need a run', async () => {
      const { first } = handles();
      await expect(
        first.runEvents.append({
          runId: newId<RunId>(),
          at: time(1),
          level: 'info',
          code: 'STEP',
          message: '',
          details: null,
        }),
      ).rejects.toMatchObject({ code: 'NOT_FOUND' });
    });
  });
}

function auditRow(subject: string) {
  return { at: time(0), actor: 'admin', action: 'backup.request', subject, details: { n: 1 } };
}
