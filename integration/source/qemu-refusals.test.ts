import { chmod, stat } from 'node:fs/promises';
import { expect, test } from 'vitest';
import { MIB } from '../../src/lib/units.js';
import { runTool } from '../../src/lib/process.js';
import { connectQmp } from '../lab/storage-daemon.js';
import { makeRequest, makeRig, readDisk, startProxy } from './qemu-rig.js';

const CONTROL = { signal: new AbortController().signal };
const TOOL = { timeoutMs: 20_000 };

test("somebody else's work on the machine goes first, and stays", async () => {
  await using rig = await makeRig(['qcow2']);
  const machine = await rig.start({ isPaused: true });
  const { monitor } = machine;
  const before = await machine.graph();
  const refusal = async (): Promise<unknown> => {
    const request = await makeRequest(rig);
    return rig.source.snapshot(request).then(
      async (snapshot) => snapshot[Symbol.asyncDispose](),
      (error: unknown) => error,
    );
  };

  const server = { addr: { type: 'unix', data: { path: rig.directory.file('theirs.sock') } } };
  await monitor.execute('nbd-server-start', server);
  expect(await refusal()).toMatchObject({ code: 'SOURCE_BUSY' });
  await expect(monitor.execute('nbd-server-start', server)).rejects.toThrow('already running');
  await monitor.execute('nbd-server-stop');
  expect(await machine.graph()).toEqual(before);

  await monitor.execute('blockdev-add', { driver: 'null-co', 'node-name': 'sink', size: 32 * MIB });
  await monitor.execute('blockdev-mirror', { 'job-id': 'm', device: 'n0', target: 'sink', sync: 'none' });
  expect(await refusal()).toMatchObject({ code: 'SOURCE_BUSY', details: { job: 'm' } });
  expect(await monitor.execute('query-jobs')).toMatchObject([{ id: 'm', type: 'mirror' }]);
  await monitor.execute('block-job-cancel', { device: 'm', force: true });
  await expect.poll(() => monitor.execute('query-jobs')).toEqual([]);

  const first = await makeRequest(rig);
  const second = await makeRequest(rig);
  await using held = await rig.source.snapshot(first);
  await expect(rig.source.snapshot(second)).rejects.toMatchObject({ code: 'SOURCE_BUSY' });
  await readDisk([...held.disks.values()][0]!);
  await held.close();
  expect(await refusal()).toBeUndefined();
});

test('a monitor that serves somebody else is busy, one that is gone is unreachable', async () => {
  await using rig = await makeRig(['qcow2']);
  const source = rig.open({ commandTimeoutMs: 1000 });
  await expect(source.discover(CONTROL)).rejects.toMatchObject({ code: 'SOURCE_UNREACHABLE' });
  await rig.start({ isPaused: true });
  {
    await using theirs = await connectQmp(rig.socket);
    await expect(source.discover(CONTROL)).rejects.toMatchObject({ code: 'SOURCE_BUSY', retryable: true });
    await theirs.execute('query-status');
  }
  expect((await source.discover(CONTROL)).name).toBe('rig');
});

test('many at once take their turns at the monitor', async () => {
  await using rig = await makeRig(['qcow2']);
  await rig.start({ isPaused: true });
  const found = await Promise.all(Array.from({ length: 8 }, () => rig.source.discover(CONTROL)));
  expect(found.map(({ name }) => name)).toEqual(new Array<string>(8).fill('rig'));
});

test('a disk with an iothread is refused before anything is touched: QEMU 7.2 would die of its readers', async () => {
  await using rig = await makeRig(['qcow2']);
  const machine = await rig.start({
    isPaused: true,
    args: ['-object', 'iothread,id=io0'],
    device: ',iothread=io0',
  });
  const before = await machine.graph();
  await expect(rig.source.probe(rig.sourceDisks, CONTROL)).rejects.toMatchObject({
    code: 'SOURCE_REFUSED',
    details: { target: 'd0' },
  });
  expect(await machine.graph()).toEqual(before);
});

test('a SCSI disk has its iothread at the controller', async () => {
  await using rig = await makeRig([]);
  await rig.start({
    isPaused: true,
    args: [
      ...['-object', 'iothread,id=io0', '-device', 'virtio-scsi-pci,id=c0,iothread=io0'],
      ...['-device', 'virtio-scsi-pci,id=c1'],
      ...[
        '-blockdev',
        'driver=null-co,node-name=a,size=1048576',
        '-device',
        'scsi-hd,drive=a,bus=c0.0,id=d0',
      ],
      ...[
        '-blockdev',
        'driver=null-co,node-name=b,size=1048576',
        '-device',
        'scsi-hd,drive=b,bus=c1.0,id=d1',
      ],
    ],
  });
  const disk = (target: string) => ({
    diskId: target as never,
    name: target,
    source: { kind: 'qemu' as const, target, serial: null, changeTracking: 'auto' as const },
  });
  await expect(rig.source.probe([disk('d0')], CONTROL)).rejects.toMatchObject({ code: 'SOURCE_REFUSED' });
  expect((await rig.source.probe([disk('d1')], CONTROL)).size).toBe(1);
});

test.each([
  ['a filter that cannot be inserted', 'qom-set', '{"execute":"qom-set","arguments":{}}'],
  ['a bitmap that cannot be begun', 'transaction', '{"execute":"transaction","arguments":{}}'],
  ['an export that cannot be added', 'block-export-add', '{"execute":"block-export-add","arguments":{}}'],
])('%s: the guest goes on, nothing is left', async (_, command, instead) => {
  await using rig = await makeRig(['qcow2', 'qcow2'], { guest: true });
  const machine = await rig.start();
  const before = await machine.graph();
  const socket = rig.directory.file('proxy.sock');
  let seen = 0;
  await using _proxy = await startProxy({ path: socket, upstream: rig.socket }, (line) => {
    const { execute, id } = JSON.parse(line) as { execute: string; id: number };
    // The second of them, where there are several.
    if (execute !== command || (seen += 1) !== (command === 'transaction' ? 1 : 2)) return line;
    return JSON.stringify({ ...(JSON.parse(instead) as object), id });
  });
  const request = await makeRequest(rig);
  const probes = request.disks.map((disk) => ({ ...disk, probe: { ...disk.probe } }));
  await expect(rig.open({ socket }).snapshot({ ...request, disks: probes })).rejects.toMatchObject({
    code: 'SOURCE_REFUSED',
    details: { command },
  });
  expect(seen).toBeGreaterThan(0);
  expect(await machine.isRunning()).toBe(true);
  expect(await machine.graph()).toEqual(before);
  expect(await machine.failedGuestWrites()).toBe(0);
});

test('an abort ends the taking of a snapshot soon, and leaves nothing', async () => {
  await using rig = await makeRig(['qcow2', 'qcow2'], { guest: true });
  const machine = await rig.start();
  const before = await machine.graph();
  for (const delayMs of [0, 20, 40, 60, 80, 120]) {
    const abort = new AbortController();
    const request = await makeRequest(rig, { signal: abort.signal });
    setTimeout(() => abort.abort(), delayMs);
    const startMs = performance.now();
    const result = await rig.source.snapshot(request).catch((error: unknown) => error);
    expect(performance.now() - startMs).toBeLessThan(2500);
    if (typeof result === 'object' && result !== null && Symbol.asyncDispose in result) {
      await (result as AsyncDisposable)[Symbol.asyncDispose]();
    } else {
      expect(result).toMatchObject({ code: 'CANCELLED' });
    }
    expect(await machine.isRunning()).toBe(true);
    expect(await machine.graph()).toEqual(before);
  }
});

test('a paused machine with two disks stays paused', async () => {
  await using rig = await makeRig(['qcow2', 'qcow2']);
  const machine = await rig.start({ isPaused: true });
  await using snapshot = await rig.source.snapshot(await makeRequest(rig, { consistency: 'prefer' }));
  expect(snapshot.consistency).toBe('crash');
  expect(rig.notes.map(({ code }) => code)).toEqual(['NOT_FROZEN']);
  await snapshot.close();
  expect(await machine.isRunning()).toBe(false);
  await expect(rig.source.snapshot(await makeRequest(rig, { consistency: 'require' }))).rejects.toMatchObject(
    { code: 'FREEZE_FAILED' },
  );
});

test('a QEMU that runs as another user can use its scratch space', async () => {
  await using rig = await makeRig(['qcow2']);
  await chmod(rig.directory.path, 0o711);
  const machine = await rig.start({ isPaused: true, args: ['-runas', 'nobody'] });
  await machine.io('d0', 'write -P 1 0 64k');
  await using snapshot = await rig.source.snapshot(await makeRequest(rig));
  const { uid } = await stat(`/proc/${machine.server.pid}`);
  const [directory] = await runTool('ls', [rig.scratch], TOOL).then(({ stdout }) =>
    stdout.trim().split('\n'),
  );
  expect((await stat(`${rig.scratch}/${directory}`)).uid).toBe(uid);
  expect(uid).not.toBe(0);
  await machine.io('d0', 'write -P 2 0 64k');
  const { content } = await readDisk([...snapshot.disks.values()][0]!);
  expect(content[0]).toBe(1);
  await snapshot.close();
});

test('what a machine with everything is found to have', async () => {
  await using rig = await makeRig(['qcow2']);
  await runTool('cp', ['/usr/share/OVMF/OVMF_VARS.fd', rig.directory.file('vars.fd')], TOOL);
  await runTool(
    'qemu-img',
    ['create', '-q', '-f', 'qcow2', '-o', 'compat=0.10', rig.directory.file('old'), '1M'],
    TOOL,
  );
  await runTool('truncate', ['-s', '1000001', rig.directory.file('odd')], TOOL);
  const drive = (name: string, options: string) => ['-blockdev', `node-name=${name},${options}`];
  const machine = await rig.start({
    isPaused: true,
    args: [
      ...['-drive', 'if=pflash,unit=0,format=raw,readonly=on,file=/usr/share/OVMF/OVMF_CODE.fd'],
      ...['-drive', `if=pflash,unit=1,format=raw,file=${rig.directory.file('vars.fd')}`],
      ...['-object', 'throttle-group,id=tg', '-device', 'virtio-scsi-pci,id=c'],
      ...drive('old', `driver=qcow2,file.driver=file,file.filename=${rig.directory.file('old')}`),
      ...drive('slow', 'driver=throttle,throttle-group=tg,file=old'),
      ...['-device', 'scsi-hd,drive=slow,bus=c.0,serial=OLD'],
      ...drive('odd', `driver=raw,file.driver=file,file.filename=${rig.directory.file('odd')}`),
      ...['-device', 'virtio-blk-pci,drive=odd,id=odd'],
      ...drive('ro', 'driver=null-co,size=1048576,read-only=on'),
      ...['-device', 'virtio-blk-pci,drive=ro,id=ro'],
      ...['-device', 'ide-cd,id=cd'],
      ...['-drive', `if=none,id=named,format=raw,file=${rig.directory.file('odd')},file.locking=off`],
      ...['-device', 'scsi-hd,drive=named,bus=c.0,share-rw=on'],
    ],
  });
  const { name, key, source, facts, disks } = await rig.source.discover(CONTROL);
  expect({ name, key, source }).toEqual({
    name: 'rig',
    key: `qemu:${rig.socket}`,
    source: { kind: 'qemu', socket: rig.socket, agentSocket: null },
  });
  expect(facts).toMatchObject({ isPresent: true, state: 'paused', changeRecords: [] });
  const seen = disks.map(({ facts: disk, sizeBytes, lineage }) => ({
    target: disk.target,
    serial: disk.serial,
    format: disk.format,
    skip: disk.skip?.code ?? null,
    isPossible: disk.incremental.isPossible,
    sizeBytes,
    lineage,
  }));
  const lineage = (file: string) => `qemu:6ad3cbe2-36a1-4b5d-9d0b-1d1b36a1f7a5:${file}`;
  const odd = { serial: null, format: 'raw', skip: null, isPossible: false, sizeBytes: 1_000_448 };
  const ours = lineage(rig.directory.file('odd'));
  expect(seen).toHaveLength(6);
  expect(seen).toEqual(
    expect.arrayContaining([
      {
        ...{ target: 'd0', serial: 'S0', format: 'qcow2', skip: null, isPossible: true },
        ...{ sizeBytes: 32 * MIB, lineage: lineage(rig.disks[0]!.file) },
      },
      {
        ...{ target: '/machine/peripheral-anon/device[0]', serial: 'OLD', format: 'qcow2', skip: null },
        ...{ isPossible: false, sizeBytes: MIB, lineage: lineage(rig.directory.file('old')) },
      },
      { ...odd, target: 'odd', lineage: ours },
      { ...odd, target: 'named', lineage: ours },
      expect.objectContaining({ target: 'ro', skip: 'READ_ONLY', sizeBytes: MIB }),
      expect.objectContaining({ target: 'cd', skip: 'REMOVABLE', sizeBytes: 0 }),
    ]),
  );

  // Two of them at one instant, one below a throttle; the firmware's variables come along.
  const before = await machine.graph();
  rig.sourceDisks.push({
    ...rig.sourceDisks[0]!,
    diskId: 'second' as never,
    source: { ...rig.sourceDisks[0]!.source, target: '/machine/peripheral-anon/device[0]' } as never,
  });
  await using snapshot = await rig.source.snapshot(await makeRequest(rig));
  const [machineFile, variables] = snapshot.configFiles;
  expect(JSON.parse(machineFile!.content.toString())).toMatchObject({
    kind: 'qemu',
    name: 'rig',
    uuid: '6ad3cbe2-36a1-4b5d-9d0b-1d1b36a1f7a5',
    disks: [{ target: 'd0' }, { diskId: 'second', target: '/machine/peripheral-anon/device[0]' }],
    files: [{ name: 'nvram-0.fd', role: 'nvram', path: rig.directory.file('vars.fd') }],
  });
  expect(variables).toMatchObject({ name: 'nvram-0.fd' });
  expect(variables!.content).toHaveLength(131_072);
  for (const disk of snapshot.disks.values()) await readDisk(disk);
  await snapshot.close();
  await snapshot[Symbol.asyncDispose]();
  expect(await machine.graph()).toEqual(before);
});
