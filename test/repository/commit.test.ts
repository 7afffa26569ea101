import { readFile, readdir, stat } from 'node:fs/promises';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { runTool } from '../../src/lib/process.js';
import { newId, type DiskId, type LayerId, type PointId, type VmId } from '../../src/lib/id.js';
import { CLUSTER_BYTES } from '../../src/lib/units.js';
import type { Lease } from '../../repository/lease.js';
import type { PartialLayer } from '../../repository/repository.js';
import type { PointDraft } from '../../repository/types.js';
import { RepositoryLab, expectedDisk, fillLayer, type Fills } from './repository-lab.js';

let lab: RepositoryLab;

beforeEach(async () => {
  lab = await RepositoryLab.create();
});
afterEach(async () => {
  await lab[Symbol.asyncDispose]();
});

async function readTop(fileName: string, sizeBytes: number): Promise<Buffer> {
  const raw = path.join(lab.directory, 'out.raw');
  const source = path.join(lab.diskDirectory(), fileName);
  await runTool('qemu-img', ['convert', '-f', 'qcow2', '-O', 'raw', source, raw], { timeoutMs: 20_000 });
  return (await readFile(raw)).subarray(0, sizeBytes);
}

describe('commitPoint', () => {
  it('commits a full and an incremental that stock qemu-img reads', async () => {
    const full: Fills = new Map([
      [0, 0x11],
      [1, 0x12],
      [7, 0x17],
    ]);
    const changes: Fills = new Map<number, number | 'zero'>([
      [1, 0x22],
      [7, 'zero'],
    ]);
    const first = await lab.commit(full);
    const second = await lab.commit(changes);
    expect(first).toMatchObject({ sequence: 1, type: 'full', previous: null });
    expect(second).toMatchObject({ sequence: 2, type: 'incremental', previous: { pointId: first.pointId } });
    const top = second.disks[0]?.layerId ?? '';
    const expected = expectedDisk([
      { fills: full, sizeBytes: lab.sizeBytes },
      { fills: changes, sizeBytes: lab.sizeBytes },
    ]);
    expect((await readTop(`${top}.qcow2`, lab.sizeBytes)).equals(expected)).toBe(true);
    const files = await readdir(lab.diskDirectory());
    expect(files.filter((name) => name.startsWith('.'))).toEqual([]);
    const facts = await stat(path.join(lab.diskDirectory(), `${top}.qcow2`));
    expect(facts.mode & 0o777).toBe(0o440);
    const chain = await lab.repository.openChain(second, lab.diskId);
    expect(chain.layers.map((layer) => layer.pointId)).toEqual([second.pointId, first.pointId]);
  });

  it('keeps configuration files with mode 0600', async () => {
    const point = await lab.commit(new Map([[0, 1]]), {
      configFiles: [{ name: 'domain.xml', content: Buffer.from('<domain/>') }],
    });
    const file = path.join(lab.root, 'vms', lab.vmId, 'config', point.pointId, 'domain.xml');
    expect(await readFile(file, 'utf8')).toBe('<domain/>');
    expect((await stat(file)).mode & 0o777).toBe(0o600);
  });

  it.each(['../evil', 'a/b', '.hidden', ''])(
    'refuses %j as the name of a configuration file',
    async (name) => {
      await expect(
        lab.commit(new Map([[0, 1]]), { configFiles: [{ name, content: Buffer.from('x') }] }),
      ).rejects.toMatchObject({ code: 'INVALID_INPUT' });
      expect(await lab.repository.listPoints(lab.vmId)).toEqual([]);
    },
  );

  it('rounds an odd size up to sectors and keeps the exact size', async () => {
    const sizeBytes = 3 * CLUSTER_BYTES + 1000;
    const fills: Fills = new Map([
      [0, 5],
      [3, 6],
    ]);
    const point = await lab.commit(fills, { sizeBytes });
    expect(point.disks[0]?.sizeBytes).toBe(sizeBytes);
    const layer = `${point.disks[0]?.layerId ?? ''}.qcow2`;
    expect((await readTop(layer, sizeBytes)).equals(expectedDisk([{ fills, sizeBytes }]))).toBe(true);
  });
});

describe('the invariant between a layer and what it was taken from', () => {
  it('accepts a change id of an ancestor in the same chain', async () => {
    const first = await lab.commit(new Map([[0, 1]]));
    const second = await lab.commit(new Map([[1, 2]]));
    await using lease = await lab.lease();
    const point = await lab.prepare(new Map([[1, 3]]), { lease, parent: second });
    const [disk] = point.draft.disks;
    if (disk === undefined) throw new Error('no disk');
    const draft = { ...point.draft, disks: [{ ...disk, changeIdFrom: first.disks[0]?.changeIdTo ?? '' }] };
    await expect(lab.repository.commitPoint(draft, [point.layer], { lease })).resolves.toMatchObject({
      sequence: 3,
    });
  });

  it.each([
    ['an unknown change id', { changeIdFrom: 'change-nowhere' }],
    ['another lineage', { sourceLineage: 'lineage-2' }],
    ['another parent point', { parentPointId: newId<PointId>() }],
  ])('refuses %s with PARENT_MISMATCH and renames nothing', async (_name, change) => {
    const first = await lab.commit(new Map([[0, 1]]));
    await using lease = await lab.lease();
    const point = await lab.prepare(new Map([[1, 3]]), { lease, parent: first });
    const [disk] = point.draft.disks;
    if (disk === undefined) throw new Error('no disk');
    const before = (await readdir(lab.diskDirectory())).sort();
    const draft = { ...point.draft, disks: [{ ...disk, ...change }] };
    await expect(lab.repository.commitPoint(draft, [point.layer], { lease })).rejects.toMatchObject({
      code: 'PARENT_MISMATCH',
    });
    expect((await readdir(lab.diskDirectory())).sort()).toEqual(before);
    expect(await lab.repository.listPoints(lab.vmId)).toHaveLength(1);
  });

  it('refuses a layer whose header was rebased by somebody else', async () => {
    const first = await lab.commit(new Map([[0, 1]]));
    const other = await lab.commit(new Map([[0, 2]]), { parent: null });
    await using lease = await lab.lease();
    const point = await lab.prepare(new Map([[1, 3]]), { lease, parent: first });
    const backing = `${other.disks[0]?.layerId ?? ''}.qcow2`;
    await runTool(
      'qemu-img',
      ['rebase', '-u', '-f', 'qcow2', '-F', 'qcow2', '-b', backing, point.layer.path],
      {
        timeoutMs: 20_000,
      },
    );
    await expect(lab.repository.commitPoint(point.draft, [point.layer], { lease })).rejects.toMatchObject({
      code: 'PARENT_MISMATCH',
    });
  });

  it('refuses hashes that do not belong to the clusters written', async () => {
    await using lease = await lab.lease();
    const point = await lab.prepare(new Map([[0, 1]]), { lease });
    await runTool('qemu-io', ['-f', 'qcow2', '-c', 'write -P 9 65536 65536', point.layer.path], {
      timeoutMs: 20_000,
    });
    await expect(lab.repository.commitPoint(point.draft, [point.layer], { lease })).rejects.toMatchObject({
      code: 'LAYER_CORRUPT',
      details: { offset: CLUSTER_BYTES },
    });
  });
});

describe('discardLayer and discardRun', () => {
  it('leave nothing and may be called twice', async () => {
    await using lease = await lab.lease();
    const one = await lab.prepare(new Map([[0, 1]]), { lease });
    const two = await lab.prepare(new Map([[0, 1]]), { lease });
    await lab.repository.discardLayer(one.layer);
    await lab.repository.discardLayer(one.layer);
    expect(await lab.repository.discardRun(lab.vmId, two.draft.runId)).toHaveLength(2);
    expect(await lab.repository.discardRun(lab.vmId, two.draft.runId)).toEqual([]);
    expect(await readdir(lab.diskDirectory())).toEqual([]);
  });
});

describe('a point of two disks', () => {
  async function prepareTwo(
    lease: Lease,
  ): Promise<{ draft: PointDraft; layers: [PartialLayer, PartialLayer] }> {
    const one = await lab.prepare(new Map([[0, 1]]), { lease });
    const diskId = newId<DiskId>();
    const layerId = newId<LayerId>();
    const { runId, vmId } = one.draft;
    const sizeBytes = 5 * CLUSTER_BYTES + 1;
    const layer = await lab.repository.createLayer(
      { vmId, diskId, runId, layerId, sizeBytes, parentLayerId: null },
      lease,
    );
    const fills: Fills = new Map([[5, 9]]);
    await fillLayer(layer, fills, sizeBytes);
    const [disk] = one.draft.disks;
    if (disk === undefined) throw new Error('no disk');
    const second = { ...disk, diskId, layerId, sizeBytes, number: 1, name: 'vdb' };
    return { draft: { ...one.draft, disks: [disk, second] }, layers: [one.layer, layer] };
  }

  it('commits both together, each in its own folder', async () => {
    await using lease = await lab.lease();
    const { draft, layers } = await prepareTwo(lease);
    const shares: number[] = [];
    const point = await lab.repository.commitPoint(draft, [layers[1], layers[0]], {
      lease,
      onProgress: (share) => {
        shares.push(share);
      },
    });
    expect(point.disks.map((disk) => disk.diskId)).toEqual(layers.map((layer) => layer.diskId));
    expect(shares.at(-1)).toBe(1);
    expect([...shares].sort((a, b) => a - b)).toEqual(shares);
    expect((await lab.repository.check({ content: true })).findings).toEqual([]);
    const { removedFiles } = await lab.repository.deletePoint(lab.vmId, point.pointId, lease);
    expect(removedFiles).toHaveLength(4);
  });

  it('commits neither when one of them is not sound, and discards both', async () => {
    await using lease = await lab.lease();
    const { draft, layers } = await prepareTwo(lease);
    await runTool('qemu-io', ['-f', 'qcow2', '-c', 'write -P 9 65536 65536', layers[1].path], {
      timeoutMs: 20_000,
    });
    await expect(lab.repository.commitPoint(draft, layers, { lease })).rejects.toMatchObject({
      code: 'LAYER_CORRUPT',
    });
    expect(await lab.repository.listPoints(lab.vmId)).toEqual([]);
    for (const layer of layers) await lab.repository.discardLayer(layer);
    const files = await readdir(path.join(lab.root, 'vms', lab.vmId, 'layers'), { recursive: true });
    expect(files.filter((name) => name.includes('.'))).toEqual([]);
  });

  it('refuses a point that leaves a layer out or has two entries for one disk', async () => {
    await using lease = await lab.lease();
    const { draft, layers } = await prepareTwo(lease);
    const invalid = { code: 'INVALID_INPUT' };
    await expect(lab.repository.commitPoint(draft, [layers[0]], { lease })).rejects.toMatchObject(invalid);
    const [disk] = draft.disks;
    if (disk === undefined) throw new Error('no disk');
    const doubled = { ...draft, disks: [disk, disk] };
    await expect(lab.repository.commitPoint(doubled, layers, { lease })).rejects.toMatchObject(invalid);
    for (const layer of layers) await lab.repository.discardLayer(layer);
  });

  it('refuses the lease of another VM and a second commit of the same point', async () => {
    const point = await lab.commit(new Map([[0, 1]]));
    await using lease = await lab.lease();
    const again = await lab.prepare(new Map([[0, 1]]), { lease });
    const draft = { ...again.draft, pointId: point.pointId };
    await expect(lab.repository.commitPoint(draft, [again.layer], { lease })).rejects.toMatchObject({
      code: 'CONFLICT',
    });
    const foreign = { ...again.draft, vmId: newId<VmId>() };
    await expect(lab.repository.commitPoint(foreign, [again.layer], { lease })).rejects.toMatchObject({
      code: 'LEASE_LOST',
    });
  });

  it('ends with the reason of the signal before anything takes its name', async () => {
    await using lease = await lab.lease();
    const point = await lab.prepare(new Map([[0, 1]]), { lease });
    const signal = AbortSignal.abort();
    await expect(
      lab.repository.commitPoint(point.draft, [point.layer], { lease, signal }),
    ).rejects.toMatchObject({
      code: 'CANCELLED',
    });
    expect((await readdir(lab.diskDirectory())).every((name) => name.startsWith('.partial-'))).toBe(true);
  });
});
