import { mkdir, mkdtemp, readFile, readdir, rename, rm, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { newId, type ApplianceId, type PointId, type VmId } from '../../src/lib/id.js';
import { createRepository, openRepository } from '../../repository/index.js';
import { sealJson } from '../../repository/sealed-json.js';
import { RepositoryLab } from './repository-lab.js';

let base: string;
let root: string;
const applianceId = newId<ApplianceId>();
const hash = 'xxh3-128' as const;

beforeEach(async () => {
  base = await mkdtemp('/dev/shm/holdfast-open-');
  root = path.join(base, 'repository');
});
afterEach(async () => {
  await rm(base, { recursive: true, force: true });
});

describe('createRepository', () => {
  it('makes marker, guide and folders in an absent or an empty directory', async () => {
    const repository = await createRepository({ root, hash, applianceId });
    expect(repository.marker).toMatchObject({
      formatVersion: 1,
      hash,
      clusterBytes: 65536,
      ownerApplianceId: applianceId,
    });
    expect((await readdir(root)).sort()).toEqual([
      'RESTORE.md',
      'holdfast.json',
      'locks',
      'runs',
      'trash',
      'vms',
    ]);
    expect(await readFile(path.join(root, 'RESTORE.md'), 'utf8')).toContain('qemu-img convert -f qcow2');
    const empty = path.join(base, 'empty');
    await mkdir(path.join(empty, 'lost+found'), { recursive: true });
    await expect(createRepository({ root: empty, hash, applianceId })).resolves.toBeDefined();
  });

  it('goes on where a creation was interrupted before the marker', async () => {
    await createRepository({ root, hash, applianceId });
    await rm(path.join(root, 'holdfast.json'));
    await writeFile(path.join(root, '.tmp-left'), 'x');
    await expect(createRepository({ root, hash, applianceId })).resolves.toBeDefined();
  });

  it('refuses a directory that holds anything, and a repository', async () => {
    await mkdir(root);
    await writeFile(path.join(root, 'precious'), 'x');
    await expect(createRepository({ root, hash, applianceId })).rejects.toMatchObject({
      code: 'REPOSITORY_EXISTS',
    });
    expect(await readdir(root)).toEqual(['precious']);
    const other = path.join(base, 'other');
    await createRepository({ root: other, hash, applianceId });
    await expect(createRepository({ root: other, hash, applianceId })).rejects.toMatchObject({
      code: 'REPOSITORY_EXISTS',
    });
  });

  it('refuses a relative root and one whose parent is not there', async () => {
    await expect(createRepository({ root: 'relative', hash, applianceId })).rejects.toMatchObject({
      code: 'INVALID_INPUT',
    });
    const deep = path.join(base, 'no', 'such');
    await expect(createRepository({ root: deep, hash, applianceId })).rejects.toMatchObject({
      code: 'INVALID_INPUT',
    });
    expect(await readdir(base)).toEqual([]);
  });
});

describe('openRepository', () => {
  it('says REPOSITORY_OFFLINE without a marker and creates nothing', async () => {
    await expect(openRepository({ root, applianceId })).rejects.toMatchObject({ code: 'REPOSITORY_OFFLINE' });
    await mkdir(root);
    await expect(openRepository({ root, applianceId })).rejects.toMatchObject({ code: 'REPOSITORY_OFFLINE' });
    expect(await readdir(root)).toEqual([]);
  });

  it('refuses a newer format and a marker that is damaged', async () => {
    const { marker } = await createRepository({ root, hash, applianceId });
    const file = path.join(root, 'holdfast.json');
    await writeFile(file, sealJson({ ...marker, formatVersion: 2, extra: true }));
    await expect(openRepository({ root, applianceId })).rejects.toMatchObject({
      code: 'REPOSITORY_FORMAT',
      details: { formatVersion: 2 },
    });
    for (const text of ['', '{}', '[]', 'null', '"x"', '{"formatVersion":1}', '['.repeat(50_000)]) {
      await writeFile(file, text);
      await expect(openRepository({ root, applianceId })).rejects.toMatchObject({
        code: 'REPOSITORY_FORMAT',
      });
    }
  });

  it('belongs to one appliance until an explicit takeover, which the former owner meets at its next write', async () => {
    const first = await createRepository({ root, hash, applianceId });
    const other = newId<ApplianceId>();
    await expect(openRepository({ root, applianceId: other })).rejects.toMatchObject({
      code: 'REPOSITORY_FOREIGN',
    });
    const taken = await openRepository({ root, applianceId: other, takeover: true });
    expect(taken.marker.ownerApplianceId).toBe(other);
    const vm = { vmId: newId<VmId>(), name: 'x', disks: [] };
    await expect(first.putVm(vm)).rejects.toMatchObject({ code: 'REPOSITORY_FOREIGN' });
    await expect(first.sweep()).rejects.toMatchObject({ code: 'REPOSITORY_FOREIGN' });
    await taken.putVm(vm);
    expect(await first.listVmIds()).toEqual([vm.vmId]);
  });

  it('has one owner after two takeovers at once', async () => {
    await createRepository({ root, hash, applianceId });
    const rivals = [newId<ApplianceId>(), newId<ApplianceId>(), newId<ApplianceId>()];
    const tries = await Promise.allSettled(
      rivals.map((rival) => openRepository({ root, applianceId: rival, takeover: true })),
    );
    const owner = (await openRepository({ root })).marker.ownerApplianceId;
    expect(rivals).toContain(owner);
    const vm = { vmId: newId<VmId>(), name: 'x', disks: [] };
    for (const [i, attempt] of tries.entries()) {
      if (attempt.status === 'rejected') expect(attempt.reason).toMatchObject({ code: 'REPOSITORY_LOCKED' });
      else if (rivals[i] === owner) await attempt.value.putVm(vm);
      else await expect(attempt.value.putVm(vm)).rejects.toMatchObject({ code: 'REPOSITORY_FOREIGN' });
    }
  });

  it('opened without an appliance id it reads and refuses every write', async () => {
    await using lab = await RepositoryLab.create();
    const point = await lab.commit(new Map([[0, 1]]));
    const reading = await openRepository({ root: lab.root });
    expect(await reading.listPoints(lab.vmId)).toEqual([point]);
    const refused = { code: 'REPOSITORY_FOREIGN' };
    await expect(reading.putVm(lab.vmRecord())).rejects.toMatchObject(refused);
    await expect(reading.acquireVmLease(lab.vmId, { runId: lab.runId, purpose: 'x' })).rejects.toMatchObject(
      refused,
    );
    await expect(reading.discardRun(lab.vmId, lab.runId)).rejects.toMatchObject(refused);
    await expect(reading.sweep()).rejects.toMatchObject(refused);
  });
});

describe('a repository whose directory vanishes or is exchanged', () => {
  it('is offline for reads and writes, and nothing is created at the mount point', async () => {
    await using lab = await RepositoryLab.create();
    const point = await lab.commit(new Map([[0, 1]]));
    const lease = await lab.lease();
    await rename(lab.root, `${lab.root}-away`);
    await mkdir(lab.root);
    const offline = { code: 'REPOSITORY_OFFLINE' };
    await expect(lab.repository.listVmIds()).rejects.toMatchObject(offline);
    await expect(lab.repository.listPoints(lab.vmId)).rejects.toMatchObject(offline);
    await expect(lab.repository.readPoint(lab.vmId, point.pointId)).rejects.toMatchObject(offline);
    await expect(lab.repository.putVm(lab.vmRecord())).rejects.toMatchObject(offline);
    await expect(lab.prepare(new Map([[0, 1]]), { lease })).rejects.toMatchObject(offline);
    await expect(lab.repository.deletePoint(lab.vmId, point.pointId, lease)).rejects.toMatchObject(offline);
    await expect(lab.repository.sweep()).rejects.toMatchObject(offline);
    await expect(lab.repository.check({ content: false })).rejects.toMatchObject(offline);
    expect(await readdir(lab.root)).toEqual([]);
    await rm(lab.root, { recursive: true });
    await rename(`${lab.root}-away`, lab.root);
    await lease.release();
    expect(await lab.repository.listPoints(lab.vmId)).toEqual([point]);
  });

  it('refuses to write when another repository is mounted at its place', async () => {
    await using lab = await RepositoryLab.create();
    await rename(lab.root, `${lab.root}-away`);
    await createRepository({ root: lab.root, hash, applianceId: lab.applianceId });
    await expect(lab.repository.putVm(lab.vmRecord())).rejects.toMatchObject({ code: 'REPOSITORY_OFFLINE' });
  });
});

describe('ids and records', () => {
  it('refuses ids that are no ULIDs before they become paths', async () => {
    await using lab = await RepositoryLab.create();
    const hostile = ['../../etc', '', 'x'.repeat(1_000_000), '01ARZ3NDEKTSV4RRFFQ69G5FA/', 'vm.json'];
    for (const id of hostile) {
      await expect(lab.repository.readVm(id as VmId)).rejects.toMatchObject({ code: 'INVALID_INPUT' });
      await expect(lab.repository.readPoint(lab.vmId, id as PointId)).rejects.toMatchObject({
        code: 'INVALID_INPUT',
      });
    }
  });

  it('keeps "not there" and "cannot be read" apart', async () => {
    await using lab = await RepositoryLab.create();
    const point = await lab.commit(new Map([[0, 1]]));
    await expect(lab.repository.readVm(newId<VmId>())).rejects.toMatchObject({ code: 'NOT_FOUND' });
    await expect(lab.repository.readPoint(lab.vmId, newId<PointId>())).rejects.toMatchObject({
      code: 'POINT_NOT_FOUND',
    });
    const file = lab.pointFile(point.pointId);
    const text = await readFile(file, 'utf8');
    for (const bad of [text.replace('"sequence": 1', '"sequence": 2'), text.slice(0, -20), '']) {
      await rm(file);
      await writeFile(file, bad);
      const unreadable = { code: 'MANIFEST_UNREADABLE' };
      await expect(lab.repository.readPoint(lab.vmId, point.pointId)).rejects.toMatchObject(unreadable);
      await expect(lab.repository.listPoints(lab.vmId)).rejects.toMatchObject(unreadable);
    }
    await rm(file);
    await writeFile(file, sealJson({ ...point, formatVersion: 99 }));
    await expect(lab.repository.listPoints(lab.vmId)).rejects.toMatchObject({ code: 'REPOSITORY_FORMAT' });
  });

  it('refuses a manifest that was copied from another place', async () => {
    await using lab = await RepositoryLab.create();
    const point = await lab.commit(new Map([[0, 1]]));
    const other = newId<PointId>();
    await writeFile(lab.pointFile(other), await readFile(lab.pointFile(point.pointId)));
    await expect(lab.repository.readPoint(lab.vmId, other)).rejects.toMatchObject({
      code: 'MANIFEST_UNREADABLE',
    });
  });
});

describe('capacity', () => {
  it('keeps 5 % and at least the largest recent increment back', async () => {
    await using lab = await RepositoryLab.create();
    await lab.commit(new Map([[0, 1]]));
    await lab.commit(new Map([[1, 1]]));
    const { totalBytes, freeBytes, reserveBytes, availableBytes } = await lab.repository.capacity();
    expect(reserveBytes).toBe(Math.ceil(totalBytes * 0.05));
    expect(availableBytes).toBe(Math.max(0, freeBytes - reserveBytes));
    await lab.repository.requireSpace(1);
    await expect(lab.repository.requireSpace(totalBytes)).rejects.toMatchObject({ code: 'REPOSITORY_FULL' });
  });
});
