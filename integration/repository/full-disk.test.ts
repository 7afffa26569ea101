import { mkdir, mkdtemp, readFile, readdir, rm, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { newId, type LayerId, type RunId } from '../../src/lib/id.js';
import { runTool } from '../../src/lib/process.js';
import { LocalBackend } from '../../repository/local-backend.js';
import { RepositoryLab } from '../../test/repository/repository-lab.js';

/** Real small file systems: a tmpfs of 8 MiB for each test. */
let base: string;
let mountPoint: string;

const mount = (args: string[]): Promise<unknown> => runTool('mount', args, { timeoutMs: 10_000 });

beforeEach(async () => {
  base = await mkdtemp('/dev/shm/holdfast-full-');
  mountPoint = path.join(base, 'mount');
  await mkdir(mountPoint);
  await mount(['-t', 'tmpfs', '-o', 'size=8m,mode=0700', 'tmpfs', mountPoint]);
});
afterEach(async () => {
  await runTool('umount', ['--recursive', mountPoint], { timeoutMs: 10_000 });
  await rm(base, { recursive: true, force: true });
});

async function fillUp(leaveBytes: number): Promise<void> {
  const { freeBytes } = await new LocalBackend({ root: mountPoint }).capacity();
  await writeFile(path.join(mountPoint, 'filler'), Buffer.alloc(Math.max(0, freeBytes - leaveBytes), 1));
}

describe('a full file system', () => {
  it('fails a backend write with REPOSITORY_FULL, keeps the old content and leaves nothing new', async () => {
    const backend = new LocalBackend({ root: mountPoint });
    await backend.writeDurable('file', Buffer.from('old'));
    await fillUp(64 * 1024);
    const large = Buffer.alloc(1024 * 1024, 2);
    const full = { code: 'REPOSITORY_FULL' };
    await expect(backend.writeDurable('file', large)).rejects.toMatchObject(full);
    await expect(backend.createExclusive('other', large)).rejects.toMatchObject(full);
    expect((await readFile(path.join(mountPoint, 'file'))).toString()).toBe('old');
    expect((await readdir(mountPoint)).sort()).toEqual(['file', 'filler']);
  });

  it('refuses a new layer, fails a commit cleanly, and works again when there is room', async () => {
    const root = path.join(mountPoint, 'repository');
    await using lab = await RepositoryLab.create({ root });
    const first = await lab.commit(new Map([[0, 1]]));
    await using lease = await lab.lease();
    const point = await lab.prepare(new Map([[1, 2]]), { lease, parent: first });
    await fillUp(0);
    const full = { code: 'REPOSITORY_FULL' };
    await expect(lab.repository.commitPoint(point.draft, [point.layer], { lease })).rejects.toMatchObject(
      full,
    );
    await expect(lab.prepare(new Map([[1, 2]]), { lease, parent: first })).rejects.toMatchObject(full);
    await expect(lab.repository.requireSpace(1)).rejects.toMatchObject(full);
    expect(await lab.repository.listPoints(lab.vmId)).toEqual([first]);
    await rm(path.join(mountPoint, 'filler'));
    await lab.repository.discardLayer(point.layer);
    expect(await readdir(lab.diskDirectory())).toHaveLength(2);
    const again = await lab.prepare(new Map([[1, 2]]), { lease, parent: first });
    await lab.repository.commitPoint(again.draft, [again.layer], { lease });
    expect((await lab.repository.check({ content: true })).findings).toEqual([]);
  });

  it('lets qemu-img and the sums writer run into it with the same code', async () => {
    const root = path.join(mountPoint, 'repository');
    await using lab = await RepositoryLab.create({ root });
    await using lease = await lab.lease();
    // 64 TiB needs an L1 table of 1 MiB, written at creation.
    const layer = {
      vmId: lab.vmId,
      diskId: lab.diskId,
      runId: newId<RunId>(),
      layerId: newId<LayerId>(),
      sizeBytes: 64 * 1024 ** 4,
      parentLayerId: null,
    };
    await fillUp(600 * 1024);
    await expect(lab.repository.createLayer(layer, lease)).rejects.toMatchObject({ code: 'REPOSITORY_FULL' });
    expect(await readdir(lab.diskDirectory())).toEqual([]);
  });

  it('lets a delete work when nothing is left', async () => {
    const root = path.join(mountPoint, 'repository');
    await using lab = await RepositoryLab.create({ root });
    await lab.commit(new Map([[0, 1]]));
    const second = await lab.commit(new Map([[1, 1]]));
    await using lease = await lab.lease();
    await fillUp(32 * 1024);
    const { freedBytes } = await lab.repository.deletePoint(lab.vmId, second.pointId, lease);
    expect(freedBytes).toBeGreaterThan(0);
    expect(await lab.repository.listPoints(lab.vmId)).toHaveLength(1);
  });
});

describe('a read-only or unmounted file system', () => {
  it('reads and checks, and refuses every write with REPOSITORY_READ_ONLY', async () => {
    const root = path.join(mountPoint, 'repository');
    await using lab = await RepositoryLab.create({ root });
    const point = await lab.commit(new Map([[0, 1]]));
    const lease = await lab.lease();
    await mount(['-o', 'remount,ro', mountPoint]);
    const readOnly = { code: 'REPOSITORY_READ_ONLY' };
    expect(await lab.repository.listPoints(lab.vmId)).toEqual([point]);
    expect((await lab.repository.check({ content: true })).findings).toEqual([]);
    await expect(lab.repository.putVm(lab.vmRecord())).rejects.toMatchObject(readOnly);
    await expect(lab.prepare(new Map([[0, 1]]), { lease })).rejects.toMatchObject(readOnly);
    await expect(lab.repository.deletePoint(lab.vmId, point.pointId, lease)).rejects.toMatchObject(readOnly);
    await expect(lab.lease()).rejects.toMatchObject({ code: 'REPOSITORY_LOCKED' });
    await mount(['-o', 'remount,rw', mountPoint]);
    await lease.release();
  });

  it('is offline after an unmount, and the directory below stays empty (must never happen 16)', async () => {
    const root = mountPoint;
    await using lab = await RepositoryLab.create({ root });
    await lab.commit(new Map([[0, 1]]));
    const lease = await lab.lease();
    const point = await lab.prepare(new Map([[1, 1]]), { lease });
    await point.layer.sums.append(Buffer.alloc(0));
    await runTool('umount', ['--lazy', mountPoint], { timeoutMs: 10_000 });
    const offline = { code: 'REPOSITORY_OFFLINE' };
    await expect(lab.repository.commitPoint(point.draft, [point.layer], { lease })).rejects.toMatchObject(
      offline,
    );
    await expect(lab.repository.listPoints(lab.vmId)).rejects.toMatchObject(offline);
    await expect(lab.repository.sweep()).rejects.toMatchObject(offline);
    await expect(lab.lease()).rejects.toMatchObject(offline);
    await expect(lab.reopen()).rejects.toMatchObject(offline);
    expect(await readdir(mountPoint)).toEqual([]);
    await mount(['-t', 'tmpfs', 'tmpfs', mountPoint]);
    await expect(lease.release()).rejects.toMatchObject(offline);
  });
});

describe('two repositories on one file system', () => {
  it('are told apart by their ids', async () => {
    await using one = await RepositoryLab.create({ root: path.join(mountPoint, 'one') });
    await using two = await RepositoryLab.create({ root: path.join(mountPoint, 'two') });
    expect(one.repository.marker.repositoryId).not.toBe(two.repository.marker.repositoryId);
    const layer = await one.commit(new Map([[0, 1]]));
    const manifest = await readFile(one.pointFile(layer.pointId));
    await two.commit(new Map([[0, 1]]));
    await writeFile(two.pointFile(layer.pointId), manifest);
    await expect(two.repository.listPoints(two.vmId)).rejects.toMatchObject({ code: 'MANIFEST_UNREADABLE' });
    await expect(two.reopen().then((repository) => repository.readVm(one.vmId))).rejects.toMatchObject({
      code: 'NOT_FOUND',
    });
  });
});
