import { readFile, readdir } from 'node:fs/promises';
import path from 'node:path';
import { expect } from 'vitest';
import { CleanupStack } from '../../src/lib/cleanup.js';
import { pollUntil } from '../../src/lib/deadline.js';
import { AppError } from '../../src/lib/errors.js';
import {
  newId,
  type DiskId,
  type PointId,
  type RepositoryId,
  type RunId,
  type VmId,
} from '../../src/lib/id.js';
import { runTool } from '../../src/lib/process.js';
import { MIB } from '../../src/lib/units.js';
import { parseDomain } from '../../src/libvirt/domain.js';
import { openLibvirtGuest } from '../../src/source/libvirt/libvirt-guest.js';
import { openLocalHost } from '../../src/source/libvirt/local-host.js';
import { takeLiveSnapshot, type LiveDomain } from '../../src/source/libvirt/live-snapshot.js';
import { domainXml, type LabDomain } from '../lab/domain-xml.js';
import { makeLabDirectory, type LabDirectory } from '../lab/directory.js';
import { startLibvirt, type LabLibvirt } from '../lab/libvirt.js';
import { mountTmpfs, type LabTmpfs } from '../lab/tmpfs.js';
import type { SourceSettings } from '../../src/source/source-settings.js';
import type {
  SnapshotDiskRequest,
  SnapshotRequest,
  SourceNote,
  SourceSnapshot,
} from '../../src/source/source.js';

const TIMEOUT_MS = 30_000;
export const DISK_BYTES = 16 * MIB;

export interface RigDisk {
  target: string;
  format: 'qcow2' | 'raw';
  /** More attributes of `<driver>`. */
  driver?: string;
  /** Default DISK_BYTES. */
  sizeBytes?: number;
}

export interface RigWrite {
  target: string;
  value: number;
  offset: number;
  length: number;
}

/** A private libvirtd and what live snapshots of its domains need. */
export interface LiveLab extends AsyncDisposable {
  readonly directory: LabDirectory;
  readonly libvirt: LabLibvirt;
  readonly settings: SourceSettings;
  /** A small filesystem. */
  readonly small: LabTmpfs;
  start(disks?: RigDisk[], xml?: Partial<LabDomain>): Promise<{ domain: RigDomain; live: LiveDomain }>;
  /** A snapshot that `endAll` ends when the test did not. */
  take(live: LiveDomain, request: SnapshotRequest): Promise<SourceSnapshot>;
  endAll(): Promise<void>;
  /** Nothing of a snapshot of this domain is left. */
  expectNothing(domain: RigDomain): Promise<void>;
}

const TWO: RigDisk[] = [
  { target: 'vda', format: 'qcow2' },
  { target: 'vdb', format: 'qcow2' },
];

export async function startLiveLab(): Promise<LiveLab> {
  await using undo = new CleanupStack();
  const directory = undo.use(await makeLabDirectory());
  // Before libvirtd starts: its mounts are its own from then on.
  const small = undo.use(await mountTmpfs({ path: directory.file('small'), sizeBytes: 192 * MIB }));
  const libvirt = undo.use(await startLibvirt(directory));
  const settings = liveSettings(directory.file('scratch'));
  const steps = undo.move();
  const taken: SourceSnapshot[] = [];
  let count = 0;
  return {
    directory,
    libvirt,
    settings,
    small,
    start: async (disks = TWO, xml = {}) => {
      count += 1;
      const name = `live${count}`;
      const domain = await RigDomain.start(libvirt, { directory: directory.path, name, disks, xml });
      return { domain, live: await domain.live(settings, directory.path) };
    },
    take: async (live, request) => {
      const snapshot = await takeLiveSnapshot(live, request);
      taken.push(snapshot);
      return snapshot;
    },
    endAll: async () => {
      for (const snapshot of taken.splice(0)) await snapshot[Symbol.asyncDispose]();
    },
    expectNothing: async (domain) => {
      expect(await domain.hasJob()).toBe(false);
      expect(await readdir(settings.snapshot.scratchDirectory)).toEqual([]);
      expect((await readdir(directory.path)).filter((name) => name.endsWith('.xml'))).toEqual([]);
    },
    [Symbol.asyncDispose]: () => steps.run(),
  };
}

export function liveSettings(scratchDirectory: string): SourceSettings {
  return {
    nbd: { connections: 2, connectTimeoutMs: 10_000, requestTimeoutMs: 30_000 },
    snapshot: {
      scratchDirectory,
      scratchKeepFreePercent: 20,
      scratchKeepFreeBytes: 64 * 1024 * 1024,
      commandTimeoutMs: 20_000,
      agentTimeoutMs: 1000,
      freezeLimitMs: 5000,
      cbwTimeoutMs: 5000,
    },
  };
}

/** Ends a snapshot as a run that made its point does. */
export async function complete(snapshot: SourceSnapshot, obsolete: string[] = []): Promise<void> {
  await snapshot.close();
  await snapshot.commit(obsolete);
  await snapshot[Symbol.asyncDispose]();
}

/** The code that a call fails with. */
export async function codeOf(work: Promise<unknown>): Promise<string> {
  const error: unknown = await work.then(
    () => new Error('it succeeded'),
    (reason: unknown) => reason,
  );
  return error instanceof AppError ? error.code : String(error);
}

/** Waits until the snapshot is lost; the code of why. */
export async function lostCode(snapshot: SourceSnapshot): Promise<string> {
  await pollUntil(() => (snapshot.lost.aborted ? true : undefined), { timeoutMs: 10_000, what: 'the loss' });
  return (snapshot.lost.reason as AppError).code;
}

/** A paused domain without a guest system, written to from outside, with a model of what its disks hold. */
export class RigDomain {
  readonly contents = new Map<string, Buffer>();
  readonly notes: SourceNote[] = [];
  readonly vmId = newId<VmId>();
  readonly #ids = new Map<string, DiskId>();

  private constructor(
    readonly libvirt: LabLibvirt,
    readonly name: string,
    readonly directory: string,
    readonly disks: readonly RigDisk[],
  ) {}

  /** Defines and starts it, with disks full of zeroes in `directory`. */
  static async start(
    libvirt: LabLibvirt,
    options: { directory: string; name: string; disks: RigDisk[]; xml?: Partial<LabDomain> },
  ): Promise<RigDomain> {
    const { directory, name, disks } = options;
    const domain = new RigDomain(libvirt, name, directory, disks);
    for (const { target, format, sizeBytes = DISK_BYTES } of disks) {
      const create = ['create', '-q', '-f', format, '--', domain.image(target), String(sizeBytes)];
      await runTool('qemu-img', create, { timeoutMs: TIMEOUT_MS });
      domain.contents.set(target, Buffer.alloc(sizeBytes));
      domain.#ids.set(target, newId<DiskId>());
    }
    const labDisks = disks.map((disk) => ({ ...disk, path: domain.image(disk.target) }));
    await libvirt.define(domainXml({ name, disks: labDisks, ...options.xml }));
    await domain.start();
    return domain;
  }

  image(target: string): string {
    return path.join(this.directory, `${this.name}-${target}`);
  }

  async start(): Promise<void> {
    await this.libvirt.virsh('start', this.name, '--paused');
  }

  run(command: string, ...args: string[]): Promise<string> {
    return this.libvirt.virsh(command, '--domain', this.name, ...args);
  }

  /** One write of the "guest", of a byte repeated; rejects when it fails. */
  async write(target: string, value: number, offset: number, length: number): Promise<void> {
    await this.libvirt.write(this.name, target, `write -P ${value} ${offset} ${length}`);
    this.contents.get(target)?.fill(value, offset, offset + length);
  }

  /** Many writes in one go, as fast as they can be; answers what QEMU said of those that failed. */
  async writeAll(writes: readonly RigWrite[]): Promise<string[]> {
    const { disks } = parseDomain(await this.run('dumpxml'));
    const log = path.join(this.libvirt.directory, 'log/qemu', `${this.name}.log`);
    const before = (await readFile(log)).length;
    const commands = writes.map(({ target, value, offset, length }) => {
      const index = disks.findIndex((disk) => disk.target === target);
      const device = `/machine/peripheral/virtio-disk${index}/virtio-backend`;
      return `qemu-monitor-command ${this.name} --hmp 'qemu-io -d ${device} "write -P ${value} ${offset} ${length}"'`;
    });
    await this.libvirt.virsh(commands.join('; '));
    for (const { target, value, offset, length } of writes) {
      this.contents.get(target)?.fill(value, offset, offset + length);
    }
    // What qemu-io prints goes to QEMU's standard output, each write in two lines, each failure in one.
    const lines = (await readFile(log)).subarray(before).toString().trim().split('\n');
    const failures = lines.filter((line) => line.includes('failed'));
    const successes = lines.filter((line) => line.startsWith('wrote ')).length;
    if (successes + failures.length !== writes.length) throw new Error(lines.join('\n'));
    return failures;
  }

  /** A copy of what the disk holds now. */
  now(target: string): Buffer {
    return Buffer.from(this.contents.get(target) ?? []);
  }

  async checkpoints(): Promise<string[]> {
    return (await this.run('checkpoint-list', '--name')).split('\n').filter((line) => line !== '');
  }

  async hasJob(): Promise<boolean> {
    return !/^Job type:\s*None/m.test(await this.run('domjobinfo'));
  }

  async live(settings: SourceSettings, runtimeDirectory: string): Promise<LiveDomain> {
    const { uri } = this.libvirt;
    const { commandTimeoutMs: timeoutMs, agentTimeoutMs } = settings.snapshot;
    const domain = parseDomain(await this.run('dumpxml'));
    const link = { uri, isLocal: true, lost: null, uuid: domain.uuid, timeoutMs };
    const openGuest: LiveDomain['openGuest'] = (run) => openLibvirtGuest({ ...link, agentTimeoutMs, run });
    const host = openLocalHost({ timeoutMs });
    return { link, host, runtimeDirectory, domain, openGuest, settings, configFiles: [] };
  }

  request(
    options: {
      targets?: string[];
      since?: Record<string, string>;
      brokenRecords?: string[];
      repositoryId?: RepositoryId;
    } = {},
  ): SnapshotRequest {
    const chosen = this.disks.filter(({ target }) => options.targets?.includes(target) ?? true);
    return {
      vmId: this.vmId,
      repositoryId: options.repositoryId ?? newId<RepositoryId>(),
      runId: newId<RunId>(),
      pointId: newId<PointId>(),
      disks: chosen.map(({ target, format, sizeBytes = DISK_BYTES }): SnapshotDiskRequest => ({
        disk: {
          diskId: this.diskId(target),
          name: target,
          source: { kind: 'libvirt', target, serial: null, changeTracking: 'auto' },
        },
        probe: {
          sizeBytes,
          lineage: `lab:${target}`,
          records: [],
          recordKeeper: 'managed',
          noRecordReason: format === 'raw' ? 'raw' : null,
        },
        bitmap: options.since?.[target] ?? null,
      })),
      consistency: 'never',
      brokenRecords: options.brokenRecords ?? [],
      note: (note) => this.notes.push(note),
      signal: AbortSignal.timeout(60_000),
    };
  }

  diskId(target: string): DiskId {
    const id = this.#ids.get(target);
    if (id === undefined) throw new Error(`no disk ${target}`);
    return id;
  }

  /** What a snapshot shows of a disk, read over NBD by a tool that is not ours. */
  async read(snapshot: SourceSnapshot, target: string): Promise<Buffer> {
    const file = path.join(this.directory, `read-${target}`);
    await runTool('nbdcopy', [this.endpoint(snapshot, target).uri, file], { timeoutMs: TIMEOUT_MS });
    return readFile(file);
  }

  endpoint(snapshot: SourceSnapshot, target: string): { uri: string; dirtyContext: string | null } {
    const disk = snapshot.disks.get(this.diskId(target));
    if (disk === undefined) throw new Error(`the snapshot has no disk ${target}`);
    return { uri: disk.endpoint.uri, dirtyContext: disk.dirtyContext };
  }

  /** Dirty ranges of the snapshot, in 64 KiB blocks. */
  async dirtyBlocks(snapshot: SourceSnapshot, target: string): Promise<number[]> {
    const { uri, dirtyContext } = this.endpoint(snapshot, target);
    if (dirtyContext === null) throw new Error(`no changes of ${target} were asked for`);
    const { stdout } = await runTool('nbdinfo', ['--json', `--map=${dirtyContext}`, uri], {
      timeoutMs: TIMEOUT_MS,
    });
    const extents = JSON.parse(stdout) as { offset: number; length: number; type: number }[];
    return extents
      .filter(({ type }) => type === 1)
      .flatMap(({ offset, length }) =>
        Array.from({ length: Math.ceil(length / 65536) }, (_, index) => offset / 65536 + index),
      );
  }
}
