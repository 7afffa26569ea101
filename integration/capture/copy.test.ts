import { open, rm } from 'node:fs/promises';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { CLUSTER_BYTES, KIB, MIB } from '../../src/lib/units.js';
import { addBitmap, firstDifference, makeQcow2, makeRaw, qemuImg, qemuIo } from '../lab/disk-image.js';
import { startQemuNbd } from '../lab/nbd-server.js';
import { startQemuGuest } from '../lab/qemu-guest.js';
import { startStorageDaemon } from '../lab/storage-daemon.js';
import { disk, expectedDigest, push, startCaptureRig, type CaptureRig } from './rig.js';

let rig: CaptureRig;
beforeAll(async () => {
  rig = await startCaptureRig();
});
afterAll(() => rig[Symbol.asyncDispose]());

async function allocatedBytes(layer: string): Promise<number> {
  const map = JSON.parse(await qemuImg(['map', '-f', 'qcow2', '--output=json', layer])) as {
    length: number;
    depth: number;
    data: boolean;
  }[];
  return map.filter(({ depth, data }) => depth === 0 && data).reduce((sum, { length }) => sum + length, 0);
}

describe('a full', () => {
  it('of a sparse raw file of odd size reads no hole, writes no zero, and agrees byte for byte', async () => {
    const file = rig.lab.file('sparse.raw');
    const sizeBytes = 3 * 1024 * MIB + 12_345;
    const regions = [
      { offset: MIB, length: 3 * MIB },
      { offset: 2048 * MIB, length: MIB },
      { offset: sizeBytes - 12_345, length: 12_345 },
    ];
    await makeRaw({ path: file, sizeBytes, regions });
    const handle = await open(file, 'r+');
    await handle.write(Buffer.alloc(MIB), 0, MIB, 16 * MIB);
    await handle.close();

    await using source = await rig.source({ kind: 'image', path: file, format: 'raw', bitmap: null });
    expect([source.sizeBytes, source.bitmaps]).toEqual([sizeBytes, []]);
    const layer = await rig.addLayer('sparse', { sizeBytes });
    const { completed, reports } = await push([disk(source, layer.tcp)]);
    const totals = completed.get('vda')!;
    expect(totals).toMatchObject({
      bytesRead: 5 * MIB + 12_345,
      bytesWritten: 4 * MIB + 12_345,
      bytesZeroed: 0,
      bytesSkipped: MIB,
    });
    expect(reports[0]?.[0]).toMatchObject({ diskId: 'd0', progress: { bytesWritten: 0 } });
    const copy = await layer.read();
    expect(await allocatedBytes(layer.path)).toBeLessThanOrEqual(4 * MIB + CLUSTER_BYTES);
    const handles = [await open(file), await open(copy)] as const;
    for (const { offset, length } of regions) {
      const [left, right] = [Buffer.alloc(length), Buffer.alloc(length)];
      await handles[0].read(left, 0, length, offset);
      await handles[1].read(right, 0, length, offset);
      expect(left.equals(right)).toBe(true);
    }
    for (const it of handles) await it.close();
    await rm(copy);
    await rm(file);
  });

  it('of several disks, from a QCOW2 file and an NBD server, one after the other, each with its own digest', async () => {
    const [a, b] = [rig.lab.file('a.raw'), rig.lab.file('b.raw')];
    await makeRaw({ path: a, sizeBytes: 5 * MIB + 512, regions: [{ offset: 100, length: 2 * MIB }] });
    await makeRaw({ path: b, sizeBytes: 777, regions: [{ offset: 0, length: 777 }] });
    const qcow2 = rig.lab.file('a.qcow2');
    await qemuImg(['convert', '-f', 'raw', '-O', 'qcow2', a, qcow2]);
    await using server = await startQemuNbd({
      image: b,
      format: 'raw',
      socketPath: rig.lab.file('b.sock'),
      isReadOnly: true,
    });
    await using first = await rig.source({ kind: 'image', path: qcow2, format: 'qcow2', bitmap: null });
    await using second = await rig.source({ kind: 'nbd', uri: server.uri });
    // An NBD server shows whole sectors; the exact size is what the server of the push has recorded.
    expect([first.sizeBytes, second.sizeBytes]).toEqual([5 * MIB + 512, 1024]);
    const layers = [
      await rig.addLayer('two-a', { sizeBytes: 5 * MIB + 512 }),
      await rig.addLayer('two-b', { sizeBytes: 777 }),
    ] as const;
    const { completed, reports } = await push([
      disk(first, layers[0].unix),
      disk(second, layers[1].tcp, { diskId: 'd1', name: 'vdb', sizeBytes: 777 }),
    ]);
    expect(reports[0]?.map(({ diskId }) => diskId)).toEqual(['d0', 'd1']);
    expect([...completed.keys()]).toEqual(['vda', 'vdb']);
    expect(await firstDifference(a, await layers[0].read())).toBeNull();
    expect(await firstDifference(b, await layers[1].read())).toBeNull();
    expect(completed.get('vda')?.sumsDigest).toBe(await expectedDigest(a));
    expect(completed.get('vdb')?.sumsDigest).toBe(await expectedDigest(b));
  });
});

describe('an incremental', () => {
  const sizeBytes = 64 * MIB;

  it('of a storage daemon with a bitmap reads what is dirty and writes zeroes where zero', async () => {
    const image = rig.lab.file('live.qcow2');
    await makeQcow2({ path: image, sizeBytes, regions: [{ offset: 0, length: 32 * MIB }] });
    const base = await rig.addLayer('inc-base', { sizeBytes });
    await using daemon = await startStorageDaemon({ image, socketPath: rig.lab.file('live.sock') });
    await daemon.addBitmap('b1');
    {
      await using source = await rig.source({ kind: 'nbd', uri: daemon.uri });
      await push([disk(source, base.tcp)]);
    }
    await rig.exportd.remove('inc-base.conf');
    await rig.exportd.reload();
    await qemuIo({
      path: daemon.uri,
      format: 'raw',
      commands: ['write -P 0x11 1M 100k', 'write -z 8M 1M', 'discard 20M 1M', 'write -P 0 25M 64k'],
    });
    await using source = await rig.source({ kind: 'nbd', uri: daemon.uri });
    expect(source.bitmaps).toEqual(['b1']);
    const layer = await rig.addLayer('inc-top', { sizeBytes, parent: base.path });
    const dirtyContext = 'qemu:dirty-bitmap:b1';
    const { completed } = await push([disk(source, layer.tcp, { method: 'bitmap', dirtyContext })]);
    const truth = rig.lab.file('live.raw');
    await qemuImg(['convert', '-f', 'raw', '-O', 'raw', daemon.uri, truth]);
    expect(await firstDifference(truth, await layer.read())).toBeNull();
    const totals = completed.get('vda')!;
    // 100k are two clusters; what was written with zeroes is read and found zero, the rest is known to be.
    expect(totals).toMatchObject({
      bytesRead: 3 * CLUSTER_BYTES,
      bytesWritten: 2 * CLUSTER_BYTES,
      bytesZeroed: 2 * MIB + CLUSTER_BYTES,
      bytesSkipped: 0,
    });
    const dirty = [
      [1 * MIB, 100 * KIB],
      [8 * MIB, MIB],
      [20 * MIB, MIB],
      [25 * MIB, 64 * KIB],
    ] as const;
    const isDirty = (cluster: number): boolean =>
      dirty.some(
        ([offset, length]) =>
          cluster * CLUSTER_BYTES < offset + length && (cluster + 1) * CLUSTER_BYTES > offset,
      );
    expect(totals.sumsDigest).toBe(await expectedDigest(truth, { isDirty }));
  });

  it('of a QCOW2 file with its persistent bitmap', async () => {
    const image = rig.lab.file('off.qcow2');
    await makeQcow2({ path: image, sizeBytes, regions: [{ offset: 0, length: 4 * MIB }] });
    const base = await rig.addLayer('off-base', { sizeBytes });
    {
      await using source = await rig.source({ kind: 'image', path: image, format: 'qcow2', bitmap: null });
      await push([disk(source, base.tcp)]);
    }
    await rig.exportd.remove('off-base.conf');
    await rig.exportd.reload();
    await addBitmap(image, 'since');
    await qemuIo({ path: image, format: 'qcow2', commands: ['write -P 7 63M 1M', 'write -z 0 64k'] });
    await using source = await rig.source({ kind: 'image', path: image, format: 'qcow2', bitmap: 'since' });
    expect(source.bitmaps).toEqual(['since']);
    const layer = await rig.addLayer('off-top', { sizeBytes, parent: base.path });
    const dirtyContext = 'qemu:dirty-bitmap:since';
    const { completed } = await push([disk(source, layer.tcp, { method: 'bitmap', dirtyContext })]);
    expect(completed.get('vda')).toMatchObject({ bytesWritten: MIB, bytesZeroed: 64 * KIB });
    const truth = rig.lab.file('off.raw');
    await qemuImg(['convert', '-U', '-f', 'qcow2', '-O', 'raw', image, truth]);
    expect(await firstDifference(truth, await layer.read())).toBeNull();
  });

  it('of a disk that grew has all of what it grew by, zeroes too', async () => {
    const old = 2 * MIB + 512;
    const image = rig.lab.file('grown.qcow2');
    await makeQcow2({ path: image, sizeBytes: old, regions: [{ offset: 0, length: old }] });
    const base = await rig.addLayer('grown-base', { sizeBytes: old });
    await using daemon = await startStorageDaemon({ image, socketPath: rig.lab.file('grown.sock') });
    await daemon.addBitmap('b1');
    {
      await using source = await rig.source({ kind: 'nbd', uri: daemon.uri });
      await push([disk(source, base.tcp)]);
    }
    await rig.exportd.remove('grown-base.conf');
    await rig.exportd.reload();
    await daemon.resizeDisk(8 * MIB);
    await daemon.clearBitmap('b1');
    await qemuIo({ path: daemon.uri, format: 'raw', commands: ['write -P 5 7M 64k'] });
    await daemon.clearBitmap('b1');
    await using source = await rig.source({ kind: 'nbd', uri: daemon.uri });
    const layer = await rig.addLayer('grown-top', { sizeBytes: 8 * MIB, parent: base.path });
    const more = { method: 'bitmap', dirtyContext: 'qemu:dirty-bitmap:b1', parentSizeBytes: old } as const;
    const { completed } = await push([disk(source, layer.tcp, more)]);
    const truth = rig.lab.file('grown.raw');
    await qemuImg(['convert', '-f', 'raw', '-O', 'raw', daemon.uri, truth]);
    expect(await firstDifference(truth, await layer.read())).toBeNull();
    const isDirty = (cluster: number): boolean => cluster >= 32;
    expect(completed.get('vda')?.sumsDigest).toBe(await expectedDigest(truth, { isDirty }));
  });

  it('without the bitmap it counts from writes nothing', async () => {
    const file = rig.lab.file('none.raw');
    await makeRaw({ path: file, sizeBytes: 4 * MIB, regions: [{ offset: 0, length: MIB }] });
    await using source = await rig.source({ kind: 'image', path: file, format: 'raw', bitmap: null });
    const layer = await rig.addLayer('none', { sizeBytes: 4 * MIB });
    const dirtyContext = 'qemu:dirty-bitmap:gone';
    const pushing = push([disk(source, layer.tcp, { method: 'bitmap', dirtyContext })]);
    await expect(pushing).rejects.toMatchObject({ code: 'BITMAP_MISSING' });
    await layer.read();
    expect(await allocatedBytes(layer.path)).toBe(0);
  });
});

describe('of a running QEMU', () => {
  it('a full and an incremental of the fleecing export with its bitmap are the disk at each instant', async () => {
    const sizeBytes = 32 * MIB;
    const image = rig.lab.file('vm.qcow2');
    await makeQcow2({ path: image, sizeBytes, regions: [{ offset: 0, length: 8 * MIB }] });
    await using guest = await startQemuGuest(rig.lab, {
      disks: [{ path: image }],
      isPaused: true,
      name: 'cap',
    });
    const socketPath = rig.lab.file('fleece.sock');
    const addr = { type: 'unix', data: { path: socketPath } };
    await guest.qmp.execute('nbd-server-start', { addr, 'max-connections': 0 });
    const uri = `nbd+unix:///vda?socket=${encodeURIComponent(socketPath)}`;

    /** What the page about bitmaps tells users to do by hand. */
    const fleece = async (next: string, since: string | null): Promise<void> => {
      const scratch = rig.lab.file(`scratch-${next}.qcow2`);
      await qemuImg([
        'create',
        '-q',
        '-f',
        'qcow2',
        '-b',
        image,
        '-F',
        'qcow2',
        '-u',
        scratch,
        String(sizeBytes),
      ]);
      await guest.qmp.execute('blockdev-add', {
        driver: 'qcow2',
        'node-name': 'scratch',
        file: { driver: 'file', filename: scratch },
        backing: 'disk0-format',
      });
      const node = 'disk0-format';
      await guest.qmp.execute('transaction', {
        actions: [
          {
            type: 'blockdev-backup',
            data: { 'job-id': 'fleece', device: node, target: 'scratch', sync: 'none' },
          },
          { type: 'block-dirty-bitmap-add', data: { node, name: next } },
          ...(since === null ? [] : [{ type: 'block-dirty-bitmap-disable', data: { node, name: since } }]),
        ],
      });
      await guest.qmp.execute('block-export-add', {
        type: 'nbd',
        id: 'e',
        'node-name': 'scratch',
        name: 'vda',
        ...(since === null ? {} : { bitmaps: [{ node, name: since }] }),
      });
    };
    const endFleece = async (): Promise<void> => {
      await guest.qmp.execute('block-export-del', { id: 'e', mode: 'hard' });
      await guest.qmp.execute('block-job-cancel', { device: 'fleece' });
      await expect.poll(() => guest.qmp.execute('query-block-jobs'), { timeout: 10_000 }).toEqual([]);
      await guest.qmp.execute('blockdev-del', { 'node-name': 'scratch' });
    };
    const copyNow = async (to: string): Promise<string> => {
      await qemuImg(['convert', '-U', '-f', 'qcow2', '-O', 'raw', image, to]);
      return to;
    };

    const base = await rig.addLayer('vm-base', { sizeBytes });
    const first = await copyNow(rig.lab.file('vm-1.raw'));
    await fleece('b1', null);
    await guest.write('disk0', 'write -P 0x55 2M 1M');
    {
      await using source = await rig.source({ kind: 'nbd', uri });
      const { completed } = await push([disk(source, base.tcp)]);
      expect(completed.get('vda')?.sumsDigest).toBe(await expectedDigest(first));
    }
    await endFleece();
    expect(await firstDifference(first, await base.read())).toBeNull();

    await guest.write('disk0', 'write -z 4M 1M');
    const layer = await rig.addLayer('vm-top', { sizeBytes, parent: base.path });
    await fleece('b2', 'b1');
    const source = await rig.source({ kind: 'nbd', uri });
    expect(source.bitmaps).toEqual(['b1']);
    const { completed } = await push([
      disk(source, layer.tcp, { method: 'bitmap', dirtyContext: 'qemu:dirty-bitmap:b1' }),
    ]);
    expect(completed.get('vda')).toMatchObject({ bytesWritten: MIB, bytesZeroed: MIB });
    const second = rig.lab.file('vm-2.raw');
    await qemuImg(['convert', '-f', 'raw', '-O', 'raw', uri, second]);
    await endFleece();
    expect(await firstDifference(second, await layer.read())).toBeNull();
  });
});

describe('before anything is written', () => {
  const sizeBytes = 4 * MIB;
  const twoClusters = 2 * CLUSTER_BYTES;

  it.each([
    ['a source that is smaller than stated', sizeBytes - 512, sizeBytes],
    ['a source that is larger than stated', sizeBytes + 512, sizeBytes],
    ['an export of another size', sizeBytes, sizeBytes + twoClusters],
  ])('%s ends it', async (_what, sourceBytes, layerBytes) => {
    const file = rig.lab.file('size.raw');
    await makeRaw({ path: file, sizeBytes: sourceBytes, regions: [{ offset: 0, length: MIB }] });
    await using source = await rig.source({ kind: 'image', path: file, format: 'raw', bitmap: null });
    const name = `size-${sourceBytes}-${layerBytes}`;
    const layer = await rig.addLayer(name, { sizeBytes: layerBytes });
    const started = Date.now();
    await expect(push([disk(source, layer.tcp, { sizeBytes })])).rejects.toMatchObject({
      code: 'SOURCE_SIZE_MISMATCH',
    });
    expect(Date.now() - started).toBeLessThan(5000);
    await layer.read();
    expect(await allocatedBytes(layer.path)).toBe(0);
    await rm(file);
  });

  it('a hash or a method of a newer server ends it', async () => {
    const file = rig.lab.file('newer.raw');
    await makeRaw({ path: file, sizeBytes, regions: [] });
    await using source = await rig.source({ kind: 'image', path: file, format: 'raw', bitmap: null });
    const target = disk(source, 'nbd://127.0.0.1:1/none');
    await expect(push([target], { hash: 'blake3' as never })).rejects.toMatchObject({
      code: 'REPOSITORY_FORMAT',
    });
    await expect(push([{ ...target, method: 'compare' as never }])).rejects.toMatchObject({
      code: 'REPOSITORY_FORMAT',
    });
  });

  it('an image that somebody writes to is refused, and nobody may write to one that is read', async () => {
    const file = rig.lab.file('busy.qcow2');
    await makeQcow2({ path: file, sizeBytes });
    {
      await using _writer = await startStorageDaemon({ image: file, socketPath: rig.lab.file('busy.sock') });
      const opening = rig.source({ kind: 'image', path: file, format: 'qcow2', bitmap: null });
      await expect(opening).rejects.toMatchObject({ code: 'SOURCE_BUSY' });
    }
    const raw = rig.lab.file('busy.raw');
    await makeRaw({ path: raw, sizeBytes });
    await using _source = await rig.source({ kind: 'image', path: raw, format: 'raw', bitmap: null });
    await expect(qemuIo({ path: raw, format: 'raw', commands: ['write 0 512'] })).rejects.toThrow(
      /another process/,
    );
  });
});
