import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { readFile, truncate, writeFile } from 'node:fs/promises';
import net from 'node:net';
import { createInterface } from 'node:readline';
import { runTool } from '../../src/lib/process.js';
import {
  newId,
  type DiskId,
  type PointId,
  type RepositoryId,
  type RunId,
  type VmId,
} from '../../src/lib/id.js';
import { MIB } from '../../src/lib/units.js';
import { connectNbd } from '../../src/nbd/index.js';
import { openQemuSource } from '../../src/source/qemu/qemu-source.js';
import type { SourceSettings } from '../../src/source/source-settings.js';
import type {
  MachineSource,
  SnapshotDisk,
  SnapshotRequest,
  SourceDisk,
  SourceNote,
} from '../../src/source/source.js';
import { makeLabDirectory, type LabDirectory } from '../lab/directory.js';
import { pathExists, startLabServer, type LabServer } from '../lab/server.js';
import { connectQmp, type QmpClient } from '../lab/storage-daemon.js';

export const DISK_BYTES = 32 * MIB;
const CLUSTER = 64 * 1024;
const TOOL = { timeoutMs: 20_000 };

/*
 * A guest of one sector: counts, and writes the count to a sector of the first disk, then of the second.
 * Written the 1,024 slots over, in turn. A write that fails makes it write `F` to the debug port.
 *
 *   fa 31c0 8ed8 8ec0 8ed0 bc007c fb   cli; ax = ds = es = ss = 0; sp = 0x7c00; sti
 *   again:
 *   66ff060080                         inc dword [0x8000]
 *   66a10080 6625ff030000 66c1e005     eax = ([0x8000] & 0x3ff) << 5
 *   660500080000 66a34e7c              eax += 2048; packet.lba = eax
 *   b280 e80700 b281 e80200 ebd7       dl = 0x80; call put; dl = 0x81; call put; jmp again
 *   put:
 *   be467c b443 b000 cd13 7304         si = packet; ax = 0x4300; int 0x13 (extended write); jnc done
 *   b046 e6e9                          out 0xe9, 'F'
 *   done: c3                           ret
 *   packet: 10 00 0100 0080 0000 …     one sector from 0000:8000
 */
const BOOT_SECTOR = Buffer.from(
  'fa31c08ed88ec08ed0bc007cfb66ff06008066a100806625ff03000066c1e005660500080000' +
    '66a34e7cb280e80700b281e80200ebd7be467cb443b000cd137304b046e6e9c3' +
    '10000100008000000000000000000000',
  'hex',
);
const SLOTS = 1024;
const slotOffset = (slot: number): number => (2048 + (slot << 5)) * 512;

export interface RigDisk {
  file: string;
  format: 'qcow2' | 'raw';
  sizeBytes: number;
}

export interface Machine {
  server: LabServer;
  /** A monitor of the test's own. */
  monitor: QmpClient;
  /** A command of qemu-io on a disk of the guest, e.g. `write -P 1 0 64k`. A write that failed shows when the disk is read. */
  io(target: string, command: string): Promise<string>;
  graph(): Promise<unknown>;
  failedGuestWrites(): Promise<number>;
  isRunning(): Promise<boolean>;
  stop(): Promise<void>;
}

interface StartOptions {
  isPaused?: boolean;
  /** More arguments. */
  args?: string[];
  /** More properties of the disks' devices. */
  device?: string;
}

export interface Rig extends AsyncDisposable {
  directory: LabDirectory;
  socket: string;
  scratch: string;
  source: MachineSource;
  settings: SourceSettings;
  disks: RigDisk[];
  notes: SourceNote[];
  start(options?: StartOptions): Promise<Machine>;
  sourceDisks: SourceDisk[];
  open(options?: { scratchDirectory?: string; socket?: string; commandTimeoutMs?: number }): MachineSource;
}

export async function makeRig(formats: ('qcow2' | 'raw')[], options: { guest?: boolean } = {}): Promise<Rig> {
  const directory = await makeLabDirectory({ wantBytes: 512 * MIB });
  const disks: RigDisk[] = [];
  for (const [index, format] of formats.entries()) {
    const file = directory.file(`disk${index}.${format}`);
    await makeImage(file, format, options.guest === true && index === 0);
    disks.push({ file, format, sizeBytes: DISK_BYTES });
  }
  const settings = makeSettings(directory.file('s'));
  const socket = directory.file('qmp.sock');
  const machines: Machine[] = [];
  const open: Rig['open'] = ({ socket: at = socket, ...snapshot } = {}) =>
    openQemuSource(
      { kind: 'qemu', socket: at, agentSocket: null },
      {
        settings: { ...settings, snapshot: { ...settings.snapshot, ...snapshot } },
        place: { runtimeDirectory: directory.path, owner: 'test' },
      },
    );
  return {
    directory,
    socket,
    scratch: settings.snapshot.scratchDirectory,
    source: open(),
    settings,
    disks,
    notes: [],
    open,
    sourceDisks: disks.map((_, index) => ({
      diskId: newId<DiskId>(),
      name: `disk${index}`,
      source: { kind: 'qemu', target: `d${index}`, serial: null, changeTracking: 'auto' },
    })),
    start: async (start = {}) => {
      const machine = await startMachine({ directory, socket, disks, start });
      machines.push(machine);
      return machine;
    },
    [Symbol.asyncDispose]: async () => {
      for (const machine of machines) await machine.stop();
      await directory[Symbol.asyncDispose]();
    },
  };
}

export function makeSettings(scratchDirectory: string): SourceSettings {
  return {
    nbd: { connections: 2, connectTimeoutMs: 5000, requestTimeoutMs: 10_000 },
    snapshot: {
      scratchDirectory,
      scratchKeepFreePercent: 20,
      scratchKeepFreeBytes: 8 * MIB,
      commandTimeoutMs: 20_000,
      agentTimeoutMs: 2000,
      freezeLimitMs: 5000,
      cbwTimeoutMs: 5000,
    },
  };
}

async function makeImage(file: string, format: 'qcow2' | 'raw', isBootable: boolean): Promise<void> {
  const sector = Buffer.alloc(512);
  if (isBootable) {
    BOOT_SECTOR.copy(sector);
    sector.writeUInt16BE(0x55aa, 510);
  }
  const raw = `${file}.tmp`;
  await writeFile(raw, sector);
  await truncate(raw, DISK_BYTES);
  await runTool('qemu-img', ['convert', '-f', 'raw', '-O', format, raw, file], TOOL);
  await runTool('rm', [raw], TOOL);
}

async function startMachine(options: {
  directory: LabDirectory;
  socket: string;
  disks: RigDisk[];
  start: StartOptions;
}): Promise<Machine> {
  const { directory, socket, disks, start } = options;
  const monitorSocket = directory.file('own.sock');
  const debug = directory.file('debug');
  await runTool('rm', ['-f', socket, monitorSocket, debug], TOOL);
  const server = await startLabServer(
    'qemu-system-x86_64',
    [
      ...['-machine', 'q35,accel=tcg', '-m', '32', '-nodefaults', '-display', 'none', '-name', 'guest=rig'],
      ...['-uuid', '6ad3cbe2-36a1-4b5d-9d0b-1d1b36a1f7a5', '-debugcon', `file:${debug}`],
      ...['-qmp', `unix:${socket},server=on,wait=off`, '-qmp', `unix:${monitorSocket},server=on,wait=off`],
      ...disks.flatMap(({ file, format }, n) => [
        ...['-blockdev', `driver=file,node-name=f${n},filename=${file},discard=unmap`],
        ...['-blockdev', `driver=${format},node-name=n${n},file=f${n},discard=unmap`],
        ...[
          '-device',
          `virtio-blk-pci,drive=n${n},id=d${n},serial=S${n},bootindex=${n}${start.device ?? ''}`,
        ],
      ]),
      ...(start.isPaused === true ? ['-S'] : []),
      ...(start.args ?? []),
    ],
    { isReady: async () => (await pathExists(socket)) && (await pathExists(monitorSocket)) },
  );
  const monitor = await connectQmp(monitorSocket);
  return {
    server,
    monitor,
    io: async (target, command) => {
      const line = `qemu-io -d /machine/peripheral/${target}/virtio-backend "${command}"`;
      const said = await monitor.execute('human-monitor-command', { 'command-line': line });
      if (typeof said !== 'string' || said !== '') throw new Error(`${command}: ${String(said)}`);
      return said;
    },
    graph: async () => {
      const nodes = (await monitor.execute('query-named-block-nodes', { flat: true })) as Record<
        string,
        unknown
      >[];
      const block = (await monitor.execute('query-block')) as Record<string, unknown>[];
      return {
        nodes: nodes.map((node) => [node['node-name'], node['drv'], namesOf(node['dirty-bitmaps'])]),
        block: block.map((one) => [
          one['qdev'],
          (one['inserted'] as Record<string, unknown> | undefined)?.['node-name'],
        ]),
        exports: await monitor.execute('query-block-exports'),
      };
    },
    failedGuestWrites: async () => (await readFile(debug, 'latin1')).length,
    isRunning: async () => ((await monitor.execute('query-status')) as { running: boolean }).running,
    stop: async () => {
      await monitor[Symbol.asyncDispose]();
      await server.stop();
    },
  };
}

function namesOf(bitmaps: unknown): string[] {
  return ((bitmaps ?? []) as { name?: string }[]).map(({ name }) => name ?? '').sort();
}

/** A request over all disks of the rig; `bitmaps` by disk. */
export async function makeRequest(
  rig: Rig,
  options: Partial<SnapshotRequest> & { bitmaps?: (string | null)[]; disks?: never } = {},
): Promise<SnapshotRequest> {
  const { bitmaps = [], ...rest } = options;
  const signal = new AbortController().signal;
  const probes = await rig.source.probe(rig.sourceDisks, { signal });
  return {
    vmId: newId<VmId>(),
    repositoryId: newId<RepositoryId>(),
    runId: newId<RunId>(),
    pointId: newId<PointId>(),
    consistency: 'never',
    brokenRecords: [],
    note: (note) => rig.notes.push(note),
    signal,
    ...rest,
    disks: rig.sourceDisks.map((disk, index) => ({
      disk,
      probe: probes.get(disk.diskId)!,
      bitmap: bitmaps[index] ?? null,
    })),
  };
}

export interface ReadDisk {
  content: Buffer;
  dirty: boolean[] | null;
}

/** What a disk of a snapshot reads as, and, of each cluster, whether it is dirty. */
export async function readDisk(disk: SnapshotDisk): Promise<ReadDisk> {
  await using handle = await connectNbd({
    uri: disk.endpoint.uri,
    metaContexts: disk.endpoint.metaContexts ?? [],
    connectTimeoutMs: 5000,
    requestTimeoutMs: 10_000,
  });
  const { sizeBytes } = handle.info;
  const parts: Buffer[] = [];
  for (let offset = 0; offset < sizeBytes; offset += MIB) {
    parts.push(await handle.pread(offset, Math.min(MIB, sizeBytes - offset)));
  }
  const content = Buffer.concat(parts);
  const base = (await handle.blockStatus(0, sizeBytes))['base:allocation']!;
  for (let i = 0, offset = 0; i < base.length; offset += base[i]!, i += 2) {
    const extent = content.subarray(offset, offset + base[i]!);
    if ((base[i + 1]! & 2) !== 0 && !extent.equals(Buffer.alloc(extent.length))) {
      throw new Error(`block status says zero at ${offset}, which is not`);
    }
  }
  if (disk.dirtyContext === null) return { content, dirty: null };
  const dirty: boolean[] = new Array<boolean>(Math.ceil(sizeBytes / CLUSTER)).fill(false);
  for (let offset = 0; offset < sizeBytes;) {
    const extents = (await handle.blockStatus(offset, sizeBytes - offset))[disk.dirtyContext]!;
    for (let i = 0; i < extents.length; i += 2) {
      const end = offset + extents[i]!;
      if (extents[i + 1]! & 1) dirty.fill(true, Math.floor(offset / CLUSTER), Math.ceil(end / CLUSTER));
      offset = end;
    }
  }
  return { content, dirty };
}

/** The parent with every dirty cluster replaced: what a restore of full + incremental gives. */
export function applyDirty(parent: Buffer, child: ReadDisk): Buffer {
  const result = Buffer.from(parent);
  child.dirty!.forEach((isDirty, cluster) => {
    if (isDirty) child.content.copy(result, cluster * CLUSTER, cluster * CLUSTER, (cluster + 1) * CLUSTER);
  });
  return result;
}

/**
 * The count up to which the writing guest had come on this disk. Throws when the disk is not as it was after
 * exactly that write: every slot must hold the last count that belongs there.
 */
export function guestCount(content: Buffer): number {
  const counts = Array.from({ length: SLOTS }, (_, slot) => content.readUInt32LE(slotOffset(slot)));
  const last = Math.max(...counts);
  counts.forEach((count, slot) => {
    const back = (((last - slot) % SLOTS) + SLOTS) % SLOTS;
    const expected = Math.max(last - back, 0);
    if (count !== (expected === 0 && slot !== 0 ? 0 : expected)) {
      throw new Error(`slot ${slot} holds ${count}, but the last write was ${last}`);
    }
  });
  return last;
}

/** Deterministic numbers for one seed. */
export function randomOf(seed: number): (below: number) => number {
  let state = seed >>> 0 || randomBytes(4).readUInt32LE();
  return (below) => {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0;
    return Math.floor((state / 2 ** 32) * below);
  };
}

/**
 * A QMP socket in front of the machine's. The commands of one connection (`hold`, counted from 0) are handed to `onCommand`, which answers
 * what is sent on in their place, null to keep this and all later ones back; other connections just pass.
 */
export async function startProxy(
  options: { path: string; upstream: string; hold?: number },
  onCommand: (line: string) => string | null,
): Promise<AsyncDisposable> {
  const sockets = new Set<net.Socket>();
  let connections = 0;
  const server = net.createServer((client) => {
    const upstream = net.connect(options.upstream);
    for (const socket of [client, upstream]) {
      sockets.add(socket);
      socket.on('error', () => undefined);
    }
    client.on('close', () => upstream.destroy());
    upstream.on('close', () => client.destroy());
    upstream.pipe(client);
    if (connections++ !== (options.hold ?? 0)) {
      client.pipe(upstream);
      return;
    }
    let isHolding = false;
    const lines = createInterface({ input: client });
    // It repeats what its input says: a client that was killed.
    lines.on('error', () => undefined);
    lines.on('line', (line) => {
      const passed = isHolding ? null : onCommand(line);
      isHolding ||= passed === null;
      if (passed !== null) upstream.write(`${passed}\n`);
    });
  });
  server.listen(options.path);
  await once(server, 'listening');
  return {
    [Symbol.asyncDispose]: async () => {
      for (const socket of sockets) socket.destroy();
      server.close();
      await once(server, 'close');
    },
  };
}
