import { randomUUID } from 'node:crypto';
import { open, readdir, readFile, writeFile } from 'node:fs/promises';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { pollUntil } from '../../src/lib/deadline.js';
import { newId, type PointId } from '../../src/lib/id.js';
import { startServer } from '../../src/lib/process.js';
import { KIB, MIB } from '../../src/lib/units.js';
import type { MachineFile } from '../../src/libvirt/machine-file.js';
import { connectNbd } from '../../src/nbd/index.js';
import { bitmapNameFor } from '../../src/source/bitmap-name.js';
import { openLibvirtSource } from '../../src/source/libvirt/libvirt-source.js';
import type {
  DiskProbe,
  MachineSource,
  SnapshotDisk,
  SourceDisk,
  SourceSnapshot,
} from '../../src/source/source.js';
import { makeLabDirectory, type LabDirectory } from '../lab/directory.js';
import {
  addBitmap,
  exportRaw,
  firstDifference,
  makeQcow2,
  makeRaw,
  qemuImg,
  writeRegionsToImage,
} from '../lab/disk-image.js';
import { domainXml, type LabDomain } from '../lab/domain-xml.js';
import { startLibvirt, type LabLibvirt } from '../lab/libvirt.js';
import { pathExists } from '../lab/server.js';
import { labSourceOptions, libvirtDisk, snapshotRequest } from './libvirt-rig.js';

const DISK_BYTES = 8 * MIB;
const RAW_BYTES = 5_000_192;
const signal = new AbortController().signal;

let lab: LabDirectory;
let libvirt: LabLibvirt;

beforeAll(async () => {
  lab = await makeLabDirectory();
  libvirt = await startLibvirt(lab);
});

afterAll(async () => {
  await libvirt[Symbol.asyncDispose]();
  await lab[Symbol.asyncDispose]();
});

interface OffMachine {
  name: string;
  source: MachineSource;
  qcow2: string;
  raw: string;
  disks: { vda: SourceDisk; vdb: SourceDisk };
}

/** A machine that is off, with a QCOW2 disk on a backing file and a raw disk, both with content. */
async function makeMachine(name: string, more: Partial<LabDomain> = {}): Promise<OffMachine> {
  const [base, qcow2, raw] = ['base.qcow2', 'a.qcow2', 'b.raw'].map((file) => lab.file(`${name}-${file}`));
  await makeQcow2({
    path: base!,
    sizeBytes: DISK_BYTES,
    regions: [{ offset: 0, length: 200 * KIB, seed: 1 }],
  });
  await makeQcow2({
    path: qcow2!,
    sizeBytes: DISK_BYTES,
    backing: { path: base!, format: 'qcow2' },
    regions: [{ offset: 3 * MIB, length: 100 * KIB, seed: 2 }],
  });
  await makeRaw({ path: raw!, sizeBytes: RAW_BYTES, regions: [{ offset: 4096, length: MIB, seed: 3 }] });
  const uuid = randomUUID();
  const disks = [
    { target: 'vda', path: qcow2! },
    { target: 'vdb', path: raw!, format: 'raw' as const },
  ];
  await libvirt.define(domainXml({ name, uuid, disks, ...more }));
  return {
    name,
    source: openLibvirtSource({ kind: 'libvirt', uri: libvirt.uri, uuid }, labSourceOptions(lab)),
    qcow2: qcow2!,
    raw: raw!,
    disks: { vda: libvirtDisk('vda'), vdb: libvirtDisk('vdb') },
  };
}

async function requestFor(machine: OffMachine, bitmap: string | null = null) {
  const { vda, vdb } = machine.disks;
  const probes = await machine.source.probe([vda, vdb], { signal });
  return snapshotRequest([
    { disk: vda, probe: probes.get(vda.diskId)!, bitmap },
    { disk: vdb, probe: probes.get(vdb.diskId)!, bitmap: null },
  ]);
}

function diskOf(snapshot: SourceSnapshot, { diskId }: SourceDisk): SnapshotDisk {
  return snapshot.disks.get(diskId)!;
}

/** Dirty stretches as [offset, length]. */
async function dirtyStretches({ endpoint, dirtyContext }: SnapshotDisk): Promise<[number, number][]> {
  await using handle = await connectNbd(
    { uri: endpoint.uri, metaContexts: [dirtyContext!], connectTimeoutMs: 5000, requestTimeoutMs: 5000 },
    {},
  );
  const status = await handle.blockStatus(0, handle.info.sizeBytes);
  const found: [number, number][] = [];
  let offset = 0;
  const extents = status[dirtyContext!]!;
  for (let i = 0; i < extents.length; i += 2) {
    if ((extents[i + 1]! & 1) !== 0) found.push([offset, extents[i]!]);
    offset += extents[i]!;
  }
  return found;
}

/** As older tools made images: the header extension with the format gets a type that nobody knows. */
async function forgetBackingFormat(image: string): Promise<void> {
  const file = await open(image, 'r+');
  try {
    const header = Buffer.alloc(64 * KIB);
    await file.read(header, 0, header.length, 0);
    const at = header.indexOf(Buffer.from('e2792aca', 'hex'));
    expect(at).toBeGreaterThan(0);
    await file.write(Buffer.from('01020304', 'hex'), 0, 4, at);
  } finally {
    await file.close();
  }
}

async function serversOf(directory: string): Promise<string[]> {
  return (await readdir(directory)).filter((name) => name.startsWith('n-'));
}

describe('a machine that is off', () => {
  it('is read as qemu-img reads it, with what its bitmap says changed, and nothing is left open', async () => {
    const machine = await makeMachine('plain');
    const since = bitmapNameFor(newId<PointId>());
    await addBitmap(machine.qcow2, since);
    const change = { offset: 5 * MIB, length: 130 * KIB, seed: 9 };
    await writeRegionsToImage({ path: machine.qcow2, format: 'qcow2', regions: [change] });
    const request = await requestFor(machine, since);
    expect(request.disks.map(({ probe }) => [probe.sizeBytes, probe.records])).toEqual([
      [DISK_BYTES, [{ bitmap: since, isInconsistent: false }]],
      [RAW_BYTES, []],
    ]);
    const bytes = await machine.source.estimate(request.disks, { signal });
    expect([...bytes.values()]).toEqual([192 * KIB, expect.any(Number)]);
    expect(bytes.get(machine.disks.vdb.diskId)).toBeGreaterThanOrEqual(MIB);
    expect(bytes.get(machine.disks.vdb.diskId)).toBeLessThan(2 * MIB);

    await using snapshot = await machine.source.snapshot(request);
    expect(snapshot.consistency).toBe('offline');
    const [vda, vdb] = [diskOf(snapshot, machine.disks.vda), diskOf(snapshot, machine.disks.vdb)];
    expect([vda.changeIdTo, vdb.changeIdTo]).toEqual([since, bitmapNameFor(request.pointId)]);
    expect(await dirtyStretches(vda)).toEqual([[5 * MIB, 192 * KIB]]);
    for (const [disk, image, format] of [
      [vda, machine.qcow2, 'qcow2'],
      [vdb, machine.raw, 'raw'],
    ] as const) {
      await exportRaw(disk.endpoint.uri, 'raw', lab.file('read'));
      await exportRaw(image, format, lab.file('wanted'));
      expect(await firstDifference(lab.file('read'), lab.file('wanted'))).toBeNull();
    }
    await snapshot.close();
    await snapshot.commit([]);
    expect(await serversOf(lab.path)).toEqual([]);
    expect(snapshot.lost.aborted).toBe(false);
  });

  it('loses an obsolete record with the commit, and no other', async () => {
    const machine = await makeMachine('obsolete');
    const [old, kept] = [bitmapNameFor(newId<PointId>()), bitmapNameFor(newId<PointId>())];
    for (const name of [old, kept, 'somebody-else']) await addBitmap(machine.qcow2, name);
    const request = await requestFor(machine, kept);
    await using snapshot = await machine.source.snapshot(request);
    await snapshot.close();
    await snapshot.commit([old]);
    expect(request.notes.filter(({ code }) => code === 'RECORD_KEPT')).toEqual([]);
    const info = JSON.parse(await qemuImg(['info', '-f', 'qcow2', '--output=json', machine.qcow2])) as {
      'format-specific': { data: { bitmaps: { name: string }[] } };
    };
    expect(info['format-specific'].data.bitmaps.map(({ name }) => name).sort()).toEqual([
      kept,
      'somebody-else',
    ]);
  });

  it('cannot start while it is read; the attempt ends the read, and the next start succeeds', async () => {
    const machine = await makeMachine('started');
    await using snapshot = await machine.source.snapshot(await requestFor(machine));
    await expect(libvirt.virsh('start', '--paused', machine.name)).rejects.toThrow(/another process/);
    const reason = await pollUntil(
      () => (snapshot.lost.aborted ? (snapshot.lost.reason as unknown) : undefined),
      { timeoutMs: 10_000, what: 'the loss of the snapshot' },
    );
    expect(reason).toMatchObject({ code: 'SNAPSHOT_LOST', retryable: false });
    await expect(snapshot.close()).rejects.toMatchObject({ code: 'SNAPSHOT_LOST' });
    expect(await serversOf(lab.path)).toEqual([]);
    await libvirt.virsh('start', '--paused', machine.name);
  });

  it.each(['qcow2', 'raw'] as const)('is busy while a writer has its %s image open', async (format) => {
    const machine = await makeMachine(`busy-${format}`);
    const request = await requestFor(machine);
    await using _writer = await startServer(
      'qemu-nbd',
      ['--persistent', `--format=${format}`, `--socket=${lab.file('w')}`, '--', machine[format]],
      { owner: 'test', isReady: () => pathExists(lab.file('w')), readyTimeoutMs: 5000 },
    );
    await expect(machine.source.snapshot(request)).rejects.toMatchObject({
      code: 'SOURCE_BUSY',
      retryable: true,
    });
    expect(await serversOf(lab.path)).toEqual([]);
  });

  it('is lost when its file was written to past the lock, and when it is another state than probed', async () => {
    const machine = await makeMachine('past');
    const request = await requestFor(machine);
    const snapshot = await machine.source.snapshot(request);
    await writeFile(machine.raw, 'x', { flag: 'r+' });
    await expect(snapshot.close()).rejects.toMatchObject({ code: 'SNAPSHOT_LOST' });
    await snapshot[Symbol.asyncDispose]();
    await libvirt.virsh('start', '--paused', machine.name);
    await expect(machine.source.snapshot(request)).rejects.toMatchObject({ code: 'SNAPSHOT_LOST' });
    expect(await serversOf(lab.path)).toEqual([]);
  });

  it('is lost when a disk got another image since it was looked at', async () => {
    const machine = await makeMachine('swapped');
    const request = await requestFor(machine);
    const xml = await libvirt.virsh('dumpxml', '--inactive', machine.name);
    await libvirt.define(xml.replace(machine.qcow2, lab.file('swapped-base.qcow2')));
    await expect(machine.source.snapshot(request)).rejects.toMatchObject({
      code: 'SNAPSHOT_LOST',
      retryable: true,
    });
  });

  it('can be read twice at once, for two repositories', async () => {
    const machine = await makeMachine('twice');
    const request = await requestFor(machine);
    await using first = await machine.source.snapshot(request);
    await using second = await machine.source.snapshot({ ...request, pointId: newId<PointId>() });
    await first.close();
    await second.close();
  });

  it('keeps its definition without passwords, its UEFI variables, and says what it could not keep', async () => {
    const nvramFile = lab.file('vars.fd');
    const graphics = "<graphics type='vnc' port='-1' passwd='hunter2'/>";
    const machine = await makeMachine('whole', { nvramFile, tpm: true, extraDevices: graphics });
    await libvirt.virsh('start', '--paused', machine.name);
    await libvirt.virsh('destroy', machine.name);
    const request = await requestFor(machine);
    await using snapshot = await machine.source.snapshot(request);
    const files = new Map(snapshot.configFiles.map(({ name, content }) => [name, content]));
    expect([...files.keys()].sort()).toEqual(['domain.xml', 'machine.json', 'nvram.bin']);
    expect(files.get('nvram.bin')).toEqual(await readFile(nvramFile));
    expect(files.get('domain.xml')?.toString()).toContain("type='vnc'");
    expect(files.get('domain.xml')?.toString()).not.toContain('hunter2');
    const facts = JSON.parse(files.get('machine.json')!.toString()) as MachineFile;
    expect(facts).toMatchObject({
      kind: 'libvirt',
      name: 'whole',
      disks: [
        { diskId: machine.disks.vda.diskId, target: 'vda' },
        { diskId: machine.disks.vdb.diskId, target: 'vdb' },
      ],
      files: [
        { name: 'domain.xml', role: 'domain', path: null },
        { name: 'nvram.bin', role: 'nvram', path: nvramFile },
      ],
    });
    // The lab's libvirt keeps TPM state where only it sees it.
    expect(facts.notes).toEqual([expect.stringContaining('TPM')]);
    expect(request.notes.map(({ message }) => message)).toEqual(facts.notes);
  });

  it('is refused where reading it would be wrong', async () => {
    const base = lab.file('odd-base.qcow2');
    await makeQcow2({ path: base, sizeBytes: MIB });
    const remote = lab.file('remote.qcow2');
    await qemuImg([
      'create',
      '-q',
      '-u',
      '-f',
      'qcow2',
      '-b',
      'nbd://127.0.0.1:1/x',
      '-F',
      'raw',
      remote,
      '1M',
    ]);
    const unstated = lab.file('unstated.qcow2');
    await makeQcow2({ path: unstated, sizeBytes: MIB, backing: { path: base, format: 'qcow2' } });
    await forgetBackingFormat(unstated);
    const disk = libvirtDisk('vda');
    const attempt = async (source: string, driver = 'qcow2') => {
      const uuid = randomUUID();
      const xml = `<disk ${source.includes('protocol') ? "type='network'" : "type='file'"}><driver name='qemu' type='${driver}'/>${source}<target dev='vda' bus='virtio'/></disk>`;
      await libvirt.define(domainXml({ name: uuid, uuid, extraDevices: xml }));
      const machine = openLibvirtSource({ kind: 'libvirt', uri: libvirt.uri, uuid }, labSourceOptions(lab));
      const { lineage } = (await machine.discover({ signal })).disks[0]!;
      const probe: DiskProbe = {
        sizeBytes: MIB,
        lineage,
        records: [],
        recordKeeper: 'managed',
        noRecordReason: null,
      };
      return machine.snapshot(snapshotRequest([{ disk, probe, bitmap: null }]));
    };
    for (const [file, why] of [
      [remote, 'no local path'],
      [unstated, 'without a stated format'],
    ] as const) {
      await expect(attempt(`<source file='${file}'/>`)).rejects.toMatchObject({
        code: 'SOURCE_FORMAT',
        message: expect.stringContaining(why) as string,
      });
    }
    await expect(attempt(`<source file='${lab.file('nothing')}'/>`)).rejects.toMatchObject({
      code: 'SOURCE_UNREACHABLE',
    });
    await expect(attempt(`<source file='${lab.file('nothing')}'/>`, 'raw')).rejects.toMatchObject({
      code: 'SOURCE_UNREACHABLE',
    });
    await expect(
      attempt("<source protocol='nbd' name='x'><host name='127.0.0.1' port='1'/></source>", 'raw'),
    ).rejects.toMatchObject({ code: 'SOURCE_REFUSED' });
    expect(await serversOf(lab.path)).toEqual([]);
  });
});

describe('a machine that runs, stops and starts again', () => {
  it('is counted from the point taken while it ran, while it is off and after', async () => {
    const machine = await makeMachine('cycle');
    const { vda } = machine.disks;
    await libvirt.virsh('start', '--paused', machine.name);
    const first = await requestFor(machine);
    {
      await using snapshot = await machine.source.snapshot(first);
      expect(snapshot.consistency).toBe('crash');
      await libvirt.write(machine.name, 'vda', 'write -P 7 1M 64k');
      await snapshot.close();
      await snapshot.commit([]);
      expect(diskOf(snapshot, vda).changeIdTo).toBe(bitmapNameFor(first.pointId));
    }
    await libvirt.virsh('destroy', machine.name);
    const since = bitmapNameFor(first.pointId);
    const expectRecord = async (request: Awaited<ReturnType<typeof requestFor>>) => {
      expect(request.disks[0]?.probe.records).toEqual([{ bitmap: since, isInconsistent: false }]);
      await using snapshot = await machine.source.snapshot(request);
      expect(await dirtyStretches(diskOf(snapshot, vda))).toEqual([[MIB, 64 * KIB]]);
      await snapshot.close();
      await snapshot.commit([]);
      return diskOf(snapshot, vda).changeIdTo;
    };
    expect(await expectRecord(await requestFor(machine, since))).toBe(since);
    await libvirt.virsh('start', '--paused', machine.name);
    const third = await requestFor(machine, since);
    expect(await expectRecord(third)).toBe(bitmapNameFor(third.pointId));
    const { facts } = await machine.source.discover({ signal });
    expect(facts.changeRecords.map(({ name }) => name)).toEqual([since, bitmapNameFor(third.pointId)]);
    await machine.source.removeRecords([since, bitmapNameFor(third.pointId)], { signal });
    expect((await machine.source.discover({ signal })).facts.changeRecords).toEqual([]);
    await machine.source.cleanUp(
      { runId: third.runId, pointId: third.pointId, isCommitted: true },
      { signal },
    );
  });
});
