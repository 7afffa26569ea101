import { cp, readdir } from 'node:fs/promises';
import { expect } from 'vitest';
import type { RepositoryView, RunView, VmView } from '../../src/engine/types.js';
import { pollUntil } from '../../src/lib/deadline.js';
import { errnoOf } from '../../src/lib/errors.js';
import { newUlid } from '../../src/lib/id.js';
import { KIB, MIB } from '../../src/lib/units.js';
import { makeQcow2, makeRaw, qemuIo, type SeededRandom, type Region } from '../lab/disk-image.js';
import { domainXml, type LabDisk, type LabDomain } from '../lab/domain-xml.js';
import { findBlockLeftovers } from '../lab/leftovers.js';
import { startLibvirt, type LabLibvirt } from '../lab/libvirt.js';
import { startQemuGuest, type LabQemu, type QemuDisk } from '../lab/qemu-guest.js';
import { mountTmpfs } from '../lab/tmpfs.js';
import { restart } from './crash.js';
import type { Daemon, Settings, Setup } from './daemon.js';
import { startRig, stopRig, type Rig } from './rig.js';

export const DISK_BYTES = 8 * MIB;

/** A daemon beside a private libvirtd; scratch directory inside the lab. */
export interface LiveRig extends Rig {
  libvirt: LabLibvirt;
  scratch: string;
  /** What ends the machines that run without libvirt. */
  machines: (() => Promise<void>)[];
  /** After a crash of the daemon: another one on its state, with its settings. */
  restart(): Promise<void>;
  /** Of the scratch directory, when it is a filesystem of its own. */
  unmount(): Promise<void>;
}

export async function startLiveRig(
  settings: Settings = {},
  options: { scratchBytes?: number } = {},
): Promise<LiveRig> {
  let scratch = '';
  let all: Settings = {};
  const rig = await startRig((lab) => {
    scratch = lab.file('scratch');
    const snapshot = { scratchDirectory: scratch, ...(settings['snapshot'] as object | undefined) };
    return (all = { ...settings, snapshot });
  });
  // libvirtd keeps the mounts that it begins with.
  const tmpfs =
    options.scratchBytes === undefined
      ? null
      : await mountTmpfs({ path: scratch, sizeBytes: options.scratchBytes });
  const libvirt = await startLibvirt(rig.lab);
  const live: LiveRig = {
    ...rig,
    libvirt,
    scratch,
    machines: [],
    restart: () => restart(live, all),
    unmount: async () => tmpfs?.unmount(),
  };
  return live;
}

export async function stopLiveRig(rig: LiveRig): Promise<void> {
  for (const stop of rig.machines) await stop();
  await rig.libvirt[Symbol.asyncDispose]();
  await rig.unmount();
  await stopRig(rig);
}

/** A machine without a guest system, written to from outside, and for each disk a file that holds what it must hold. */
export interface LiveDomain {
  name: string;
  /** By target. */
  images: Record<string, string>;
  truths: Record<string, string>;
  /** One qemu-io command, done to the disk and to its truth. */
  write(target: string, command: string): Promise<void>;
  /** Some seeded writes, zeroings and discards on every disk. */
  work(random: SeededRandom, count: number): Promise<void>;
  /** Copies of the truths as they are now. */
  remember(): Promise<Record<string, string>>;
  start(): Promise<void>;
  stop(): Promise<void>;
  /** SIGKILL of its QEMU, when what was written is on its disks: only records of changes are lost with it. */
  kill(): Promise<void>;
  /** What a monitor command returns. */
  qmp(command: string, args?: Record<string, unknown>): Promise<unknown>;
  discover(daemon: Daemon): Promise<VmView>;
  /** Begins a record of changes on vda, as somebody else would. */
  addRecord(name: string): Promise<void>;
  /** Records of changes that the hypervisor knows, anybody's. */
  records(): Promise<string[]>;
}

export interface LiveDomainOptions extends Partial<LabDomain> {
  name: string;
  /** Formats by target; default: vda and vdb, both qcow2. */
  formats?: Record<string, 'raw' | 'qcow2'>;
  /** Content the disks begin with. */
  regions?: readonly Region[];
  sizeBytes?: number;
}

type Facts = Pick<LiveDomain, 'name' | 'images' | 'truths'> & { sizeBytes: number };

/** What differs between the hypervisors. */
type Controls = Pick<
  LiveDomain,
  'write' | 'start' | 'stop' | 'kill' | 'qmp' | 'discover' | 'addRecord' | 'records'
>;

/** Makes disks, defines the domain and starts it paused. */
export async function makeDomain(rig: LiveRig, options: LiveDomainOptions): Promise<LiveDomain> {
  const { facts, disks } = await makeDisks(rig, options);
  await rig.libvirt.define(domainXml({ ...options, disks: [...disks, ...(options.disks ?? [])] }));
  const domain = withTruths(facts, domainControls(rig, options.name));
  await domain.start();
  return domain;
}

/** The same domain, as another host has it after a migration. */
export function domainOn(rig: LiveRig, { name, images, truths }: LiveDomain): LiveDomain {
  return withTruths({ name, images, truths, sizeBytes: DISK_BYTES }, domainControls(rig, name));
}

/** The same without libvirt: a QEMU of its own, paused, asked over its QMP socket. */
export async function makeQemu(rig: LiveRig, options: LiveDomainOptions): Promise<LiveDomain> {
  const { facts, disks } = await makeDisks(rig, options);
  const named = disks.map((disk) => ({ ...disk, id: disk.target }));
  const machine = withTruths(facts, qemuControls(rig, options.name, named));
  await machine.start();
  return machine;
}

/** A test that holds for every hypervisor is run over each. */
export const HYPERVISORS = [
  { kind: 'libvirt', make: makeDomain },
  { kind: 'qemu', make: makeQemu },
];

interface MadeDisk extends LabDisk {
  path: string;
}

async function makeDisks(
  rig: LiveRig,
  options: LiveDomainOptions,
): Promise<{ facts: Facts; disks: MadeDisk[] }> {
  const { name, formats = { vda: 'qcow2', vdb: 'qcow2' }, sizeBytes = DISK_BYTES } = options;
  const facts: Facts = { name, images: {}, truths: {}, sizeBytes };
  const disks: MadeDisk[] = [];
  for (const [target, format] of Object.entries(formats)) {
    const { image } = await makeDisk(rig, facts, { target, format, sizeBytes, regions: options.regions });
    const serial = `${name}-${target}`;
    disks.push({ target, format, path: image, serial, driver: "discard='unmap'" });
  }
  return { facts, disks };
}

/** A new image and its truth, known to the machine's facts as the one of this target. */
export async function makeDisk(
  rig: LiveRig,
  facts: Pick<LiveDomain, 'name' | 'images' | 'truths'>,
  disk: {
    target: string;
    format?: 'raw' | 'qcow2';
    sizeBytes?: number;
    regions?: readonly Region[] | undefined;
  },
): Promise<{ image: string; truth: string }> {
  const { target, format = 'qcow2', sizeBytes = DISK_BYTES } = disk;
  const stem = rig.lab.file(`${facts.name}-${target}-${Object.keys(facts.images).length}`);
  const [image, truth] = [`${stem}.${format}`, `${stem}.truth`];
  const regions = (disk.regions ?? [{ offset: 0, length: 2 * MIB }]).map((region) => ({
    ...region,
    seed: target.charCodeAt(2),
  }));
  if (format === 'qcow2') await makeQcow2({ path: image, sizeBytes, regions });
  else await makeRaw({ path: image, sizeBytes, regions });
  await makeRaw({ path: truth, sizeBytes, regions });
  facts.images[target] = image;
  facts.truths[target] = truth;
  return { image, truth };
}

function withTruths(facts: Facts, controls: Controls): LiveDomain {
  const { truths } = facts;
  const writeTruth = (target: string, commands: string[]): Promise<void> =>
    // A discarded raw range may keep its bytes; as a write of zeroes it holds what a QCOW2 disk shows.
    qemuIo({
      path: truths[target] ?? '',
      format: 'raw',
      commands: commands.map((command) => command.replace(/^discard/, 'write -z')),
    });
  return {
    ...facts,
    ...controls,
    async write(target, command) {
      await controls.write(target, command);
      await writeTruth(target, [command]);
    },
    async work(random, count) {
      const done = new Map<string, string[]>();
      for (let round = 0; round < count; round += 1) {
        const target = random.pick(Object.keys(truths));
        const command = randomCommand(random, facts.sizeBytes);
        await controls.write(target, command);
        done.set(target, [...(done.get(target) ?? []), command]);
      }
      for (const [target, commands] of done) await writeTruth(target, commands);
    },
    async remember() {
      const copy = newUlid();
      const remembered: Record<string, string> = {};
      for (const [target, file] of Object.entries(truths)) {
        remembered[target] = `${file}.${copy}`;
        await cp(file, remembered[target]);
      }
      return remembered;
    },
  };
}

function randomCommand(random: SeededRandom, sizeBytes: number): string {
  const length = random.pick([512, 4 * KIB, 64 * KIB, 192 * KIB]);
  const offset = random.between(0, (sizeBytes - length) / 512) * 512;
  const where = `${offset} ${length}`;
  const write = `write -P ${random.between(1, 255)} ${where}`;
  return random.pick([write, write, `write -z ${where}`, `write -zu ${where}`]);
}

/** Also of a machine that is paused: all disks are flushed. */
const FLUSH = 'stop';

function domainControls({ libvirt }: LiveRig, name: string): Controls {
  const virsh = async (...args: string[]): Promise<void> => {
    await libvirt.virsh(...args);
  };
  return {
    write: (target, command) => libvirt.write(name, target, command),
    start: () => virsh('start', '--paused', name),
    stop: () => virsh('destroy', name),
    kill: async () => {
      await libvirt.qmp(name, FLUSH);
      await libvirt.killQemu(name);
    },
    qmp: (command, args) => libvirt.qmp(name, command, args),
    discover: (daemon) => discoverOne(daemon, libvirt.uri, name),
    addRecord: (record) => virsh('checkpoint-create-as', name, record, '--diskspec', 'vda,checkpoint=bitmap'),
    records: async () => namesOf(await libvirt.virsh('checkpoint-list', name, '--name')),
  };
}

function qemuControls(rig: LiveRig, name: string, disks: readonly QemuDisk[]): Controls {
  let running: LabQemu | undefined;
  const qemu = (): LabQemu => {
    if (running === undefined) throw new Error(`${name} is off`);
    return running;
  };
  const stop = async (): Promise<void> => {
    await running?.stop();
    running = undefined;
  };
  rig.machines.push(stop);
  return {
    write: (target, command) => qemu().write(target, command),
    async start() {
      running = await startQemuGuest(rig.lab, { name, disks, isPaused: true });
    },
    stop,
    async kill() {
      await qemu().qmp.execute(FLUSH);
      await qemu().kill();
      await stop();
    },
    qmp: (command, args) => qemu().qmp.execute(command, args),
    async discover(daemon) {
      const socket = qemu().qmpSocket;
      return firstOf(
        await daemon.expect<{ items: VmView[] }>(200, 'POST', '/vms/discover', { kind: 'qemu', socket }),
      );
    },
    async addRecord(record) {
      const bitmap = { node: 'vda-format', name: record, persistent: true };
      await qemu().qmp.execute('block-dirty-bitmap-add', bitmap);
    },
    records: () => bitmapsIn((command) => qemu().qmp.execute(command)),
  };
}

/** Names of the bitmaps of a running QEMU. */
async function bitmapsIn(qmp: (command: string) => Promise<unknown>): Promise<string[]> {
  const found = (await findBlockLeftovers(qmp)).flatMap((line) => /^bitmap .*\/(.*)$/.exec(line)?.[1] ?? []);
  return [...new Set(found)];
}

/** Discovers the domain and gives it a repository. */
export async function setUpDomain(
  rig: LiveRig,
  domain: LiveDomain,
  root = `repository-${domain.name}`,
): Promise<Setup> {
  const repository = await rig.daemon.expect<RepositoryView>(201, 'POST', '/repositories', {
    name: root,
    root: rig.lab.file(root),
  });
  return { repository, vm: await domain.discover(rig.daemon) };
}

export async function discoverOne(daemon: Daemon, uri: string, name: string): Promise<VmView> {
  return firstOf(
    await daemon.expect<{ items: VmView[] }>(200, 'POST', '/vms/discover', {
      kind: 'libvirt',
      uri,
      names: [name],
    }),
  );
}

function firstOf({ items: [vm] }: { items: VmView[] }): VmView {
  if (vm === undefined) throw new Error('nothing was discovered');
  return vm;
}

/** Names of the checkpoints a domain has. */
export async function checkpointsOf(rig: LiveRig, name: string): Promise<string[]> {
  return namesOf(await rig.libvirt.virsh('checkpoint-list', name, '--name'));
}

const namesOf = (lines: string): string[] => lines.split('\n').filter((line) => line !== '');

/** No backup job, no scratch file, and of the checkpoints exactly these. */
export async function expectCleanSource(rig: LiveRig, name: string, checkpoints: string[]): Promise<void> {
  expect(await rig.libvirt.virsh('domjobinfo', name)).toContain('None');
  expect((await checkpointsOf(rig, name)).sort()).toEqual([...checkpoints].sort());
  expect(await namesIn(rig.scratch)).toEqual([]);
}

/** What a backup has under way in a running machine: jobs, exports, filter nodes. */
export async function traces(domain: LiveDomain): Promise<string[]> {
  const found = await findBlockLeftovers((command) => domain.qmp(command));
  return found.filter((line) => !line.startsWith('bitmap '));
}

/**
 * Of a running machine: no job, export, server, filter node or scratch file, and of the records of changes
 * exactly these, for libvirt and for QEMU.
 */
export async function expectNoTrace(rig: LiveRig, domain: LiveDomain, records: string[]): Promise<void> {
  expect(await traces(domain)).toEqual([]);
  const expected = [...records].sort();
  expect((await bitmapsIn((command) => domain.qmp(command))).sort()).toEqual(expected);
  expect((await domain.records()).sort()).toEqual(expected);
  await expect(domain.qmp('nbd-server-stop')).rejects.toThrow(/not running/);
  expect(await namesIn(rig.scratch)).toEqual([]);
}

async function namesIn(directory: string): Promise<string[]> {
  try {
    return await readdir(directory);
  } catch (error) {
    if (errnoOf(error) === 'ENOENT') return [];
    throw error;
  }
}

export const recordOf = (run: RunView): string => `holdfast-${run.pointId ?? ''}`;

/** Waits until the run has its snapshot: what is written from now on is not in its point. */
export async function waitPastInstant(daemon: Daemon, runId: string): Promise<void> {
  await pollUntil(
    async () => {
      const run = await daemon.expect<RunView>(200, 'GET', `/runs/${runId}`);
      return run.endedAt !== null || run.stage === 'transfer' || run.stage === 'finalize' ? true : undefined;
    },
    { timeoutMs: 20_000, intervalMs: 20, what: `the snapshot of run ${runId}` },
  );
}
