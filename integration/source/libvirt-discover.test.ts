import { randomUUID } from 'node:crypto';
import { writeFile } from 'node:fs/promises';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { newId, type PointId } from '../../src/lib/id.js';
import { MIB } from '../../src/lib/units.js';
import { bitmapNameFor } from '../../src/source/bitmap-name.js';
import { discoverDomains } from '../../src/source/libvirt/discover.js';
import { openLibvirtSource } from '../../src/source/libvirt/libvirt-source.js';
import type { DiscoveredVm, MachineSource } from '../../src/source/source.js';
import { makeLabDirectory, type LabDirectory } from '../lab/directory.js';
import { addBitmap, makeQcow2, makeRaw, qemuImg } from '../lab/disk-image.js';
import { domainXml, type LabDisk } from '../lab/domain-xml.js';
import { startLibvirt, type LabLibvirt } from '../lab/libvirt.js';
import { labSourceOptions, libvirtDisk, snapshotRequest } from './libvirt-rig.js';

const RAW_BYTES = 10_000_384;
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

async function qcow2(name: string): Promise<string> {
  const path = lab.file(`${name}.qcow2`);
  await makeQcow2({ path, sizeBytes: 8 * MIB });
  return path;
}

async function defineDomain(name: string, disks: LabDisk[], metadata = ''): Promise<string> {
  const uuid = randomUUID();
  await libvirt.define(domainXml({ name, uuid, disks, metadata }));
  return uuid;
}

function discover(...names: string[]): Promise<DiscoveredVm[]> {
  return discoverDomains(libvirt.uri, { names, options: labSourceOptions(lab), signal });
}

function sourceOf(uuid: string, uri = libvirt.uri): MachineSource {
  return openLibvirtSource({ kind: 'libvirt', uri, uuid }, labSourceOptions(lab));
}

/** As a backup would begin it, with a bitmap of the same name on each of the disks. */
async function addCheckpoint(
  domain: string,
  disks: Record<string, boolean>,
  point = newId<PointId>(),
): Promise<string> {
  const name = bitmapNameFor(point);
  const file = lab.file('checkpoint.xml');
  const lines = Object.entries(disks).map(
    ([target, has]) =>
      `<disk name='${target}' checkpoint='${has ? 'bitmap' : 'no'}' ${has ? `bitmap='${name}'` : ''}/>`,
  );
  await writeFile(
    file,
    `<domaincheckpoint><name>${name}</name><disks>${lines.join('')}</disks></domaincheckpoint>`,
  );
  await libvirt.virsh('checkpoint-create', domain, '--xmlfile', file);
  return name;
}

describe('discovery of libvirt domains', () => {
  it('tells of every disk what it is, how large to the byte, and why it is left out or never incremental', async () => {
    await makeRaw({ path: lab.file('odd.raw'), sizeBytes: RAW_BYTES });
    await qemuImg(['create', '-q', '-f', 'qcow2', '-o', 'compat=0.10', lab.file('v2.qcow2'), '4M']);
    const metadata = "<h:backup xmlns:h='urn:holdfast:domain:1'><h:exclude disk='S-OUT'/></h:backup>";
    const uuid = await defineDomain(
      'many',
      [
        { target: 'vda', path: await qcow2('many-a'), serial: 'S-A' },
        { target: 'vdb', path: lab.file('odd.raw'), format: 'raw' },
        { target: 'vdc', path: lab.file('v2.qcow2') },
        { target: 'vdd', path: await qcow2('many-d'), readonly: true },
        { target: 'vde', path: await qcow2('many-e'), serial: 'S-OUT' },
        { target: 'sda', device: 'cdrom', format: 'raw' },
      ],
      metadata,
    );
    const [off] = await discover('many');
    expect(off).toMatchObject({
      source: { kind: 'libvirt', uri: libvirt.uri, uuid },
      key: `libvirt:${uuid}`,
      name: 'many',
      facts: { isPresent: true, state: 'off', changeRecords: [] },
    });
    const byTarget = (vm: DiscoveredVm | undefined) =>
      new Map(
        vm?.disks.map(({ facts, sizeBytes, lineage }) => [facts.target, { ...facts, sizeBytes, lineage }]),
      );
    const disks = byTarget(off);
    expect(disks.get('vda')).toMatchObject({
      serial: 'S-A',
      format: 'qcow2',
      location: lab.file('many-a.qcow2'),
      lineage: `libvirt:${uuid}:${lab.file('many-a.qcow2')}`,
      sizeBytes: 8 * MIB,
      skip: null,
      incremental: { isPossible: true, reason: null },
    });
    expect(disks.get('vdb')).toMatchObject({
      sizeBytes: RAW_BYTES,
      skip: null,
      incremental: { isPossible: false, reason: expect.stringContaining('raw') as string },
    });
    expect(disks.get('vdc')?.incremental).toMatchObject({ isPossible: false });
    expect(disks.get('vdc')?.incremental.reason).toContain('version 2');
    expect(['vdd', 'vde', 'sda'].map((target) => disks.get(target)?.skip?.code)).toEqual([
      'READ_ONLY',
      'OPTED_OUT',
      'REMOVABLE',
    ]);

    await libvirt.virsh('start', '--paused', 'many');
    const [running] = await discover(uuid);
    expect(running?.facts.state).toBe('paused');
    expect(byTarget(running)).toEqual(disks);
    await libvirt.virsh('destroy', 'many');
  });

  it('follows a rename, leaves out what is not there, and says NOT_FOUND of one that was removed', async () => {
    const uuid = await defineDomain('before', [{ target: 'vda', path: await qcow2('renamed') }]);
    await libvirt.virsh('domrename', 'before', "it's after");
    expect(await discover('before', 'no such machine')).toEqual([]);
    expect((await discover(uuid)).map(({ name }) => name)).toEqual(["it's after"]);
    expect((await sourceOf(uuid).discover({ signal })).name).toBe("it's after");
    await libvirt.virsh('undefine', "it's after");
    await expect(sourceOf(uuid).discover({ signal })).rejects.toMatchObject({ code: 'NOT_FOUND' });
  });

  it('resolves volumes, and knows another file under the same target as another disk', async () => {
    await qcow2('vol');
    const volume = (name: string) =>
      `<disk type='volume' device='disk'><driver name='qemu' type='qcow2'/><source pool='p1' volume='${name}'/><target dev='vda' bus='virtio'/></disk>`;
    await libvirt.virsh('pool-create-as', 'p1', 'dir', '--target', lab.path);
    const uuid = randomUUID();
    const define = (name: string) =>
      libvirt.define(domainXml({ name: 'volumes', uuid, extraDevices: volume(name) }));
    await define('vol.qcow2');
    const [first] = await discover('volumes');
    expect(first?.disks[0]).toMatchObject({ sizeBytes: 8 * MIB, lineage: `libvirt:${uuid}:p1/vol.qcow2` });
    await qcow2('vol2');
    await libvirt.virsh('pool-refresh', 'p1');
    await define('vol2.qcow2');
    const [second] = await discover('volumes');
    expect(second?.disks[0]?.lineage).not.toBe(first?.disks[0]?.lineage);
    await libvirt.virsh('pool-destroy', 'p1');
    expect((await discover('volumes'))[0]?.disks[0]?.sizeBytes).toBe(0);
    const disk = libvirtDisk('vda');
    await expect(sourceOf(uuid).probe([disk], { signal })).rejects.toMatchObject({ code: 'SOURCE_REFUSED' });
  });

  it('says who does not answer', async () => {
    const uri = `qemu:///system?socket=${lab.file('nobody')}`;
    await expect(
      discoverDomains(uri, { names: [], options: labSourceOptions(lab), signal }),
    ).rejects.toMatchObject({
      code: 'SOURCE_UNREACHABLE',
    });
  });

  it('looks at 100 machines in seconds', async () => {
    const disks = [{ target: 'vda', path: await qcow2('shared') }];
    for (let i = 0; i < 100; i += 1) await defineDomain(`herd${i}`, disks);
    const startMs = performance.now();
    const found = await discover();
    expect(found.filter(({ name }) => name.startsWith('herd'))).toHaveLength(100);
    expect(performance.now() - startMs).toBeLessThan(25_000);
    for (let i = 0; i < 100; i += 1) await libvirt.virsh('undefine', `herd${i}`);
  }, 90_000);
});

describe('records of changes', () => {
  const disks = { vda: libvirtDisk('vda'), vdb: libvirtDisk('vdb') };

  async function startPair(name: string): Promise<{ source: MachineSource; uuid: string }> {
    const pair = [
      { target: 'vda', path: await qcow2(`${name}-a`) },
      { target: 'vdb', path: await qcow2(`${name}-b`) },
    ];
    const uuid = await defineDomain(name, pair);
    await libvirt.virsh('start', '--paused', name);
    return { source: sourceOf(uuid), uuid };
  }

  const probe = async (source: MachineSource) => {
    const found = await source.probe(Object.values(disks), { signal });
    return { vda: found.get(disks.vda.diskId)!, vdb: found.get(disks.vdb.diskId)! };
  };

  it('are what libvirt and QEMU agree upon while the machine runs, and tell what a run would read', async () => {
    const { source } = await startPair('agree');
    const name = await addCheckpoint('agree', { vda: true, vdb: false });
    const foreign = lab.file('foreign.xml');
    await writeFile(foreign, '<domaincheckpoint><name>somebody-else</name></domaincheckpoint>');
    await libvirt.virsh('checkpoint-create', 'agree', '--xmlfile', foreign);
    await libvirt.write('agree', 'vda', 'write -P 1 1M 128k');
    const before = await probe(source);
    expect(before.vda).toMatchObject({
      sizeBytes: 8 * MIB,
      recordKeeper: 'managed',
      noRecordReason: null,
      records: [{ bitmap: name, isInconsistent: false }],
    });
    expect(before.vdb.records).toEqual([]);
    const found = await source.discover({ signal });
    expect(found.facts.changeRecords).toEqual([
      { name, pointId: name.slice('holdfast-'.length), isBroken: false },
    ]);
    const asked = snapshotRequest([
      { disk: disks.vda, probe: before.vda, bitmap: name },
      { disk: disks.vdb, probe: before.vdb, bitmap: null },
    ]);
    const bytes = await source.estimate(asked.disks, { signal });
    expect(bytes.get(disks.vda.diskId)).toBe(128 * 1024);
    expect(bytes.get(disks.vdb.diskId)).toBeLessThan(MIB);

    const nodes = (await libvirt.qmp('agree', 'query-named-block-nodes')) as {
      'node-name': string;
      'dirty-bitmaps'?: { name: string }[];
    }[];
    const node = nodes.find((candidate) =>
      candidate['dirty-bitmaps']?.some((bitmap) => bitmap.name === name),
    );
    await libvirt.qmp('agree', 'block-dirty-bitmap-remove', { node: node?.['node-name'], name });
    expect((await probe(source)).vda.records).toEqual([{ bitmap: name, isInconsistent: true }]);
    expect((await source.discover({ signal })).facts.changeRecords).toMatchObject([{ name, isBroken: true }]);
  });

  it('survive a clean stop and stay as they are while the machine is off', async () => {
    const { source } = await startPair('stopped');
    const name = await addCheckpoint('stopped', { vda: true, vdb: true });
    await libvirt.virsh('destroy', 'stopped');
    const { vda, vdb } = await probe(source);
    expect([vda.records, vdb.records]).toEqual(Array(2).fill([{ bitmap: name, isInconsistent: false }]));
    await libvirt.virsh('start', '--paused', 'stopped');
    expect((await probe(source)).vda.records).toEqual([{ bitmap: name, isInconsistent: false }]);
  });

  it('are broken after QEMU crashed: those of its own time are gone, stored ones in use', async () => {
    const { source } = await startPair('crashed');
    const stored = await addCheckpoint('crashed', { vda: true, vdb: true });
    await libvirt.virsh('destroy', 'crashed');
    await libvirt.virsh('start', '--paused', 'crashed');
    const young = await addCheckpoint('crashed', { vda: true, vdb: true });
    await libvirt.killQemu('crashed');
    const inUse = { bitmap: stored, isInconsistent: true };
    expect((await probe(source)).vda.records).toEqual([inUse]);
    const broken = [
      { name: stored, isBroken: true },
      { name: young, isBroken: true },
    ];
    expect((await source.discover({ signal })).facts.changeRecords).toMatchObject(broken);
    await libvirt.virsh('start', '--paused', 'crashed');
    expect((await probe(source)).vda.records).toEqual([inUse, { bitmap: young, isInconsistent: true }]);
    expect((await source.discover({ signal })).facts.changeRecords).toMatchObject(broken);
  });

  it('of our form in an image that libvirt does not know of are told too', async () => {
    const path = await qcow2('stray');
    const name = bitmapNameFor(newId<PointId>());
    await addBitmap(path, name);
    await addBitmap(path, 'somebody-else');
    const uuid = await defineDomain('stray', [{ target: 'vda', path }]);
    const { facts } = await sourceOf(uuid).discover({ signal });
    expect(facts.changeRecords).toMatchObject([{ name, isBroken: false }]);
  });
});
