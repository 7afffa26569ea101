import { mkdir, readFile, readdir, rename, rm, stat, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { isErrorCode } from '../../src/lib/errors.js';
import { newId, type LayerId, type PointId, type RunId } from '../../src/lib/id.js';
import { runTool } from '../../src/lib/process.js';
import type { PointManifest } from '../../repository/types.js';
import { sealJson } from '../../repository/sealed-json.js';
import { faultyBackend, type FaultyBackend } from '../contract/faulty-backend.js';
import { RepositoryLab } from './repository-lab.js';

let lab: RepositoryLab;
beforeEach(async () => {
  lab = await RepositoryLab.create();
});
afterEach(async () => {
  await lab[Symbol.asyncDispose]();
});

async function remove(point: PointManifest): Promise<string[]> {
  await using lease = await lab.lease();
  return (await lab.repository.deletePoint(lab.vmId, point.pointId, lease)).removedFiles;
}

const layerFile = (point: PointManifest): string =>
  path.join(lab.diskDirectory(), `${point.disks[0]?.layerId ?? ''}.qcow2`);

describe('deletePoint', () => {
  it('removes the newest point with layer, sums, config and state, and later points are sound', async () => {
    const first = await lab.commit(new Map([[0, 1]]));
    const second = await lab.commit(new Map([[1, 1]]), {
      configFiles: [{ name: 'domain.xml', content: Buffer.from('x') }],
    });
    await writeFile(lab.pointFile(second.pointId).replace('.json', '.state.json'), '{}');
    const removed = await remove(second);
    expect(removed).toHaveLength(4);
    expect(await lab.repository.listPoints(lab.vmId)).toEqual([first]);
    expect(await readdir(lab.diskDirectory())).toHaveLength(2);
    expect(await readdir(path.join(lab.root, 'vms', lab.vmId, 'config'))).toEqual([]);
    const third = await lab.commit(new Map([[1, 2]]), { parent: first });
    expect(third.sequence).toBe(3);
    expect(third.previous?.pointId).toBe(first.pointId);
    expect((await lab.repository.check({ content: true })).findings).toEqual([]);
    await expect(remove(second)).rejects.toMatchObject({ code: 'POINT_NOT_FOUND' });
  });

  it('refuses a point that others stand on and names them', async () => {
    const first = await lab.commit(new Map([[0, 1]]));
    const second = await lab.commit(new Map([[1, 1]]));
    const third = await lab.commit(new Map([[2, 1]]));
    expect(await lab.repository.dependents(lab.vmId, first.pointId)).toEqual([second.pointId, third.pointId]);
    await expect(remove(first)).rejects.toMatchObject({
      code: 'POINT_HAS_DEPENDENTS',
      details: { dependents: [second.pointId, third.pointId] },
    });
    expect(await lab.repository.listPoints(lab.vmId)).toHaveLength(3);
  });

  it('refuses a point that a layer under way stands on, seen in the header only', async () => {
    const first = await lab.commit(new Map([[0, 1]]));
    await using lease = await lab.lease();
    const point = await lab.prepare(new Map([[1, 1]]), { lease, parent: first });
    await expect(lab.repository.deletePoint(lab.vmId, first.pointId, lease)).rejects.toMatchObject({
      code: 'POINT_HAS_DEPENDENTS',
      details: { dependents: [] },
    });
    await lab.repository.discardLayer(point.layer);
    await lab.repository.deletePoint(lab.vmId, first.pointId, lease);
    expect(await lab.repository.listPoints(lab.vmId)).toEqual([]);
  });

  it('removes damaged points one by one, past partial files without a header', async () => {
    const points = [
      await lab.commit(new Map([[0, 1]])),
      await lab.commit(new Map([[0, 2]]), { parent: null }),
    ];
    for (const point of points) {
      await rm(layerFile(point));
      await writeFile(layerFile(point), 'rotten');
    }
    await writeFile(
      path.join(lab.diskDirectory(), `.partial-${newId<RunId>()}-${newId<LayerId>()}.qcow2`),
      '',
    );
    const stray = path.join(lab.diskDirectory(), `${newId<LayerId>()}.qcow2`);
    await writeFile(stray, 'rotten, and no manifest says what it stood on');
    for (const point of points) await expect(remove(point)).rejects.toMatchObject({ code: 'LAYER_CORRUPT' });
    await rm(stray);
    for (const point of points) await remove(point);
    expect(await lab.repository.listPoints(lab.vmId)).toEqual([]);
  });

  it('keeps no more records of removed points than the chain of digests needs', async () => {
    const base = await lab.commit(new Map([[0, 1]]));
    for (let round = 0; round < 4; round += 1)
      await remove(await lab.commit(new Map([[1, 1]]), { parent: base }));
    expect(await readdir(path.join(lab.root, 'vms', lab.vmId, 'merges'))).toHaveLength(1);
    expect((await lab.commit(new Map([[1, 1]]), { parent: base })).sequence).toBe(6);
    expect((await lab.repository.check({ content: false })).findings).toEqual([]);
  });

  it('leaves a sound chain of digests when a point in the middle goes', async () => {
    const first = await lab.commit(new Map([[0, 1]]));
    await lab.commit(new Map([[0, 2]]), { parent: null });
    await remove(first);
    const report = await lab.repository.check({ content: false });
    expect(report.findings).toEqual([]);
    expect((await lab.repository.sweep()).skipped).toEqual([]);
  });

  it('interrupted after any operation it has removed the point or not, and the rest is swept', async () => {
    let faulty: FaultyBackend | undefined;
    const repository = await lab.reopen({
      backend: (backend) => {
        faulty = faultyBackend(backend);
        return faulty.backend;
      },
    });
    const base = await lab.commit(new Map([[0, 1]]));
    for (let at = 0; ; at += 1) {
      const victim = await lab.commit(new Map([[1, 1]]), { parent: base });
      const lease = await lab.lease();
      faulty?.arm({ kind: 'crash', at });
      let error: unknown;
      try {
        await repository.deletePoint(lab.vmId, victim.pointId, lease);
      } catch (caught) {
        error = caught;
      }
      await lease.release();
      const points = await lab.repository.listPoints(lab.vmId);
      expect(points[0]).toEqual(base);
      if (points.length === 2) await remove(victim);
      const { skipped } = await lab.repository.sweep();
      expect(skipped).toEqual([]);
      expect(await readdir(lab.diskDirectory())).toHaveLength(2);
      expect((await lab.repository.check({ content: false })).findings).toEqual([]);
      if (error === undefined) break;
      // Each record is one more file to read: without them every round has the same operations.
      await rm(path.join(lab.root, 'vms', lab.vmId, 'merges'), { recursive: true, force: true });
      expect(isErrorCode(error, 'REPOSITORY_IO')).toBe(true);
    }
  }, 60_000);
});

describe('sweep', () => {
  async function leaveGarbage(): Promise<string[]> {
    const names = [
      `${newId<LayerId>()}.qcow2`,
      `${newId<LayerId>()}.sums`,
      `.partial-${newId<RunId>()}-${newId<LayerId>()}.qcow2`,
    ];
    for (const name of names) await writeFile(path.join(lab.diskDirectory(), name), 'garbage');
    return names;
  }

  it('moves what no manifest names to the trash of the day, and purges trash after its days', async () => {
    const point = await lab.commit(new Map([[0, 1]]), {
      configFiles: [{ name: 'a.xml', content: Buffer.from('x') }],
    });
    const garbage = await leaveGarbage();
    await writeFile(path.join(lab.diskDirectory(), 'notes-of-the-admin.txt'), 'keep');
    const orphan = newId<PointId>();
    await mkdir(path.join(lab.root, 'vms', lab.vmId, 'config', orphan));
    await writeFile(path.join(lab.root, 'vms', lab.vmId, 'config', orphan, 'domain.xml'), 'x');
    await writeFile(lab.pointFile(orphan).replace('.json', '.state.json'), '{}');
    await mkdir(path.join(lab.root, 'trash', '2020-01-01', 'deep'), { recursive: true });
    await writeFile(path.join(lab.root, 'trash', '2020-01-01', 'deep', 'old'), 'x');
    await mkdir(path.join(lab.root, 'trash', 'not-a-day'));
    const report = await lab.repository.sweep();
    expect(report.skipped).toEqual([]);
    expect(report.moved).toHaveLength(garbage.length + 2);
    expect(report.purged).toEqual(['trash/2020-01-01']);
    expect(await readdir(path.join(lab.root, 'trash'))).toHaveLength(2);
    expect((await readdir(lab.diskDirectory())).sort()).toEqual(
      [
        `${point.disks[0]?.layerId ?? ''}.qcow2`,
        `${point.disks[0]?.layerId ?? ''}.sums`,
        'notes-of-the-admin.txt',
      ].sort(),
    );
    expect(await readdir(path.join(lab.root, 'vms', lab.vmId, 'config'))).toEqual([point.pointId]);
    expect((await lab.repository.sweep()).moved).toEqual([]);
  });

  const untouched = async (reason: RegExp): Promise<void> => {
    const garbage = await leaveGarbage();
    const report = await lab.repository.sweep();
    expect(report.moved).toEqual([]);
    expect(report.skipped).toHaveLength(1);
    expect(report.skipped[0]).toMatchObject({ vmId: lab.vmId });
    expect(report.skipped[0]?.reason).toMatch(reason);
    for (const name of garbage) await stat(path.join(lab.diskDirectory(), name));
  };

  it('touches nothing of a VM with a manifest that cannot be read (must never happen 20)', async () => {
    const point = await lab.commit(new Map([[0, 1]]));
    await rm(lab.pointFile(point.pointId));
    await writeFile(lab.pointFile(point.pointId), 'rotten');
    await untouched(/MANIFEST_UNREADABLE/);
  });

  it('touches nothing of a VM with a manifest of a newer format', async () => {
    const point = await lab.commit(new Map([[0, 1]]));
    await writeFile(lab.pointFile(newId<PointId>()), sealJson({ ...point, formatVersion: 2 }));
    await untouched(/REPOSITORY_FORMAT/);
  });

  it('touches nothing of a VM whose chain of digests has a gap: a manifest is lost', async () => {
    const first = await lab.commit(new Map([[0, 1]]));
    await lab.commit(new Map([[0, 2]]), { parent: null });
    await rename(lab.pointFile(first.pointId), path.join(lab.directory, 'lost.json'));
    await untouched(/missing and was never removed/);
    const report = await lab.repository.check({ content: false });
    expect(report.findings.filter((finding) => finding.severity === 'error')).toMatchObject([
      { code: 'CHAIN_BROKEN' },
    ]);
  });

  it('touches nothing of a VM with a record it does not understand', async () => {
    await lab.commit(new Map([[0, 1]]));
    const records = path.join(lab.root, 'vms', lab.vmId, 'merges');
    await mkdir(records);
    await writeFile(
      path.join(records, `${newId<PointId>()}.json`),
      sealJson({ formatVersion: 1, kind: 'merge' }),
    );
    await untouched(/MANIFEST_UNREADABLE/);
  });

  it('touches nothing of a VM while a run holds its lease', async () => {
    await lab.commit(new Map([[0, 1]]));
    const lease = await lab.lease();
    await untouched(/REPOSITORY_LOCKED/);
    await lease.release();
  });

  it('touches nothing when a named layer stands on a file that no manifest names', async () => {
    const first = await lab.commit(new Map([[0, 1]]));
    const second = await lab.commit(new Map([[1, 1]]));
    const stray = `${newId<LayerId>()}.qcow2`;
    await writeFile(path.join(lab.diskDirectory(), stray), await readFile(layerFile(first)));
    await runTool(
      'qemu-img',
      ['rebase', '-u', '-f', 'qcow2', '-F', 'qcow2', '-b', stray, layerFile(second)],
      { timeoutMs: 10_000 },
    );
    await untouched(/CHAIN_BROKEN/);
  });
});

describe('check', () => {
  it('names what is wrong and every point that stands on it, and changes nothing', async () => {
    const first = await lab.commit(
      new Map([
        [0, 1],
        [1, 2],
      ]),
    );
    const second = await lab.commit(new Map([[1, 3]]));
    const alone = await lab.commit(new Map([[0, 4]]), { parent: null });
    await rename(layerFile(first), path.join(lab.directory, 'moved'));
    const before = await readdir(lab.root, { recursive: true });
    const report = await lab.repository.check({ content: true });
    expect(report.findings).toMatchObject([
      { code: 'LAYER_NOT_FOUND', pointId: first.pointId, diskId: lab.diskId },
    ]);
    expect(report.damagedPoints).toEqual([first.pointId, second.pointId].sort());
    expect(report.bytesVerified).toBeGreaterThan(0);
    expect(await readdir(lab.root, { recursive: true })).toEqual(before);
    const partial = await lab.repository.check({ content: true, pointId: alone.pointId });
    expect(partial).toMatchObject({ points: 1, layers: 1, findings: [], damagedPoints: [] });
  });

  it('finds a cluster that rotted, with disk, layer and offset', async () => {
    const first = await lab.commit(
      new Map([
        [0, 1],
        [5, 2],
      ]),
    );
    const data = await readFile(layerFile(first));
    const at = data.lastIndexOf(Buffer.alloc(4096, 2));
    data[at + 17] = 0x55;
    await rm(layerFile(first));
    await writeFile(layerFile(first), data);
    expect((await lab.repository.check({ content: false })).findings).toEqual([]);
    const report = await lab.repository.check({ content: true });
    expect(report.findings).toMatchObject([
      { code: 'LAYER_CORRUPT', offset: 5 * 65536, diskId: lab.diskId, layerId: first.disks[0]?.layerId },
    ]);
    expect(report.damagedPoints).toEqual([first.pointId]);
  });

  it('tells garbage and leftovers as warnings, and reads on past a manifest that cannot be read', async () => {
    const first = await lab.commit(new Map([[0, 1]]));
    const second = await lab.commit(new Map([[1, 1]]));
    await writeFile(path.join(lab.diskDirectory(), `${newId<LayerId>()}.qcow2`), 'x');
    await writeFile(
      path.join(lab.diskDirectory(), `.partial-${newId<RunId>()}-${newId<LayerId>()}.qcow2`),
      'x',
    );
    const clean = await lab.repository.check({ content: false });
    expect(clean.findings.map(({ code, severity }) => [code, severity]).sort()).toEqual([
      ['LEFTOVER', 'warning'],
      ['UNREFERENCED', 'warning'],
    ]);
    expect(clean.damagedPoints).toEqual([]);
    await rm(lab.pointFile(first.pointId));
    await writeFile(lab.pointFile(first.pointId), 'rotten');
    const report = await lab.repository.check({ content: false });
    const errors = report.findings.filter((finding) => finding.severity === 'error');
    expect(errors.map(({ code, pointId }) => [code, pointId])).toEqual([
      ['MANIFEST_UNREADABLE', first.pointId],
      ['CHAIN_BROKEN', second.pointId],
    ]);
    expect(report.damagedPoints).toEqual([first.pointId, second.pointId].sort());
  });

  it('rejects for a point that is not there, and when it is cancelled', async () => {
    await lab.commit(new Map([[0, 1]]));
    await expect(lab.repository.check({ content: false, pointId: newId<PointId>() })).rejects.toMatchObject({
      code: 'POINT_NOT_FOUND',
    });
    await expect(lab.repository.check({ content: true, signal: AbortSignal.abort() })).rejects.toMatchObject({
      code: 'CANCELLED',
    });
  });
});
