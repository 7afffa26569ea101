import { mkdir, readFile, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { expect } from 'vitest';
import { CleanupStack } from '../../src/lib/cleanup.js';
import { newId, type DiskId, type RunId } from '../../src/lib/id.js';
import { KIB, MIB } from '../../src/lib/units.js';
import { parseDomain, type Domain } from '../../src/libvirt/domain.js';
import { DOMAIN_FILE, MACHINE_FILE, type MachineFile } from '../../src/libvirt/machine-file.js';
import { openLibvirtMachineTarget } from '../../src/target/libvirt/libvirt-machine-target.js';
import type {
  MachineTargetRequest,
  MachineTargetSpec,
  PreparedMachine,
  RestoredMachine,
} from '../../src/target/machine-target.js';
import { openTarget } from '../../src/target/open-target.js';
import type { OpenTarget, TargetSpec } from '../../src/target/target.js';
import { firstDifference, makeQcow2, makeRaw, qemuImg } from '../lab/disk-image.js';
import { makeLabDirectory, type LabDirectory } from '../lab/directory.js';
import { startLibvirt, type LabLibvirt } from '../lab/libvirt.js';

export const UUID = '11111111-2222-3333-4444-555555555555';
export const MAC = '52:54:00:11:22:33';
export const DISK_BYTES = { vda: 8 * MIB, vdb: 4 * MIB };
const FIRMWARE = '/usr/share/OVMF/OVMF_CODE_4M.fd';
const VARIABLES = '/usr/share/OVMF/OVMF_VARS_4M.fd';

export type DiskTarget = keyof typeof DISK_BYTES;
export const TARGETS: readonly DiskTarget[] = ['vda', 'vdb'];

/** An error with this code whose message matches. */
export const refused = (code: string, message: RegExp): unknown =>
  expect.objectContaining({ code, message: expect.stringMatching(message) as string });

/** A private libvirt with one domain, of which there is a point. Dispose it after the last test. */
export class MachineLab implements AsyncDisposable {
  readonly ids: Record<DiskTarget, DiskId> = { vda: newId<DiskId>(), vdb: newId<DiskId>() };
  /** Where the domain's disks are now, with other content than at the point. */
  old = '';
  /** An empty directory. */
  out = '';
  /** Of a restore of the domain as it was. */
  request: MachineTargetRequest = {
    configFiles: [],
    disks: [],
    signal: new AbortController().signal,
  };
  #rounds = 0;

  private constructor(
    readonly lab: LabDirectory,
    readonly libvirt: LabLibvirt,
    /** What each disk held at the point. */
    readonly truths: Record<DiskTarget, string>,
  ) {}

  static async start(): Promise<MachineLab> {
    await using undo = new CleanupStack();
    const lab = undo.use(await makeLabDirectory());
    const libvirt = undo.use(await startLibvirt(lab));
    const truths = { vda: lab.file('truth-vda.raw'), vdb: lab.file('truth-vdb.raw') };
    for (const target of TARGETS) {
      const regions = [{ offset: MIB, length: MIB, seed: target === 'vda' ? 1 : 2 }];
      await makeRaw({ path: truths[target], sizeBytes: DISK_BYTES[target], regions });
    }
    await mkdir(lab.file('sockets'), { mode: 0o700 });
    undo.release();
    return new MachineLab(lab, libvirt, truths);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await using last = new CleanupStack();
    last.use(this.lab);
    last.use(this.libvirt);
  }

  /** Directories of its own, and the domain, off. */
  async begin(): Promise<void> {
    this.#rounds += 1;
    this.old = this.lab.file(`old-${this.#rounds}`);
    this.out = this.lab.file(`out-${this.#rounds}`);
    await mkdir(this.old);
    await mkdir(this.out);
    for (const target of TARGETS) {
      await makeQcow2({ path: path.join(this.old, `${target}.qcow2`), sizeBytes: DISK_BYTES[target] });
    }
    await writeFile(path.join(this.old, 'VARS.fd'), await readFile(VARIABLES), { mode: 0o600 });
    await writeFile(path.join(this.old, 'medium.iso'), Buffer.alloc(64 * KIB));
    await this.define(this.domainXml());
    this.request = await this.pointOf();
  }

  /** No domain is left. */
  async end(): Promise<void> {
    for (const uuid of await this.listUuids()) {
      if ((await this.virsh('domstate', uuid)) !== 'shut off') await this.virsh('destroy', uuid);
      const keep = ['--nvram', '--managed-save', '--snapshots-metadata', '--checkpoints-metadata'];
      await this.virsh('undefine', uuid, ...keep);
    }
  }

  async virsh(...args: string[]): Promise<string> {
    return (await this.libvirt.virsh(...args)).trim();
  }

  async listUuids(): Promise<string[]> {
    return (await this.virsh('list', '--all', '--uuid')).split('\n').filter((line) => line !== '');
  }

  xmlOf(uuid: string): Promise<string> {
    return this.virsh('dumpxml', uuid, '--inactive', '--security-info');
  }

  async domainOf(uuid: string): Promise<Domain> {
    return parseDomain(await this.xmlOf(uuid));
  }

  define(xml: string): Promise<void> {
    return this.libvirt.define(xml);
  }

  /** Where libvirt's own directory of TPM states is for us. */
  swtpm(...names: string[]): string {
    return path.join(this.libvirt.directory, 'lib/swtpm', ...names);
  }

  domainXml(change: { devices?: string; vda?: string } = {}): string {
    const disk = (target: DiskTarget): string => `<disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/><source file='${this.old}/${target}.qcow2'/><target dev='${target}' bus='virtio'/></disk>`;
    return `<domain type='qemu'><name>db one</name><uuid>${UUID}</uuid><genid/>
      <memory unit='MiB'>64</memory><vcpu>1</vcpu>
      <os><type arch='x86_64' machine='q35'>hvm</type><loader readonly='yes' type='pflash'>${FIRMWARE}</loader>
        <nvram template='${VARIABLES}'>${this.old}/VARS.fd</nvram></os>
      <features><acpi/></features>
      <devices><emulator>/usr/bin/qemu-system-x86_64</emulator>
        ${change.vda ?? disk('vda')}${disk('vdb')}
        <disk type='file' device='cdrom'><source file='${this.old}/medium.iso'/><target dev='sda' bus='sata'/></disk>
        <interface type='user'><mac address='${MAC}'/><target dev='wire0'/><model type='virtio'/></interface>
        <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
        <graphics type='vnc' port='5999' autoport='no'/>${change.devices ?? ''}
        <memballoon model='none'/><video><model type='none'/></video></devices></domain>`;
  }

  /** What a point of the domain keeps, with firmware variables of its own. */
  async pointOf(change: Partial<MachineFile> = {}): Promise<MachineTargetRequest> {
    const machine: MachineFile = {
      kind: 'libvirt',
      name: 'db one',
      uuid: UUID,
      disks: TARGETS.map((target) => ({ diskId: this.ids[target], target })),
      files: [
        { name: DOMAIN_FILE, role: 'domain', path: null },
        { name: 'nvram', role: 'nvram', path: `${this.old}/VARS.fd` },
      ],
      notes: [],
      ...change,
    };
    const nvram = await readFile(VARIABLES);
    nvram.write('point', 1000);
    return {
      configFiles: [
        { name: DOMAIN_FILE, content: Buffer.from(await this.xmlOf(UUID)) },
        { name: MACHINE_FILE, content: Buffer.from(JSON.stringify(machine)) },
        { name: 'nvram', content: nvram },
      ],
      disks: TARGETS.map((name) => ({
        diskId: this.ids[name],
        name,
        sizeBytes: DISK_BYTES[name],
        leastBytes: MIB,
      })),
      signal: new AbortController().signal,
    };
  }

  prepare(change: Partial<MachineTargetSpec>, of = this.request): Promise<PreparedMachine> {
    const spec: MachineTargetSpec = {
      kind: 'libvirt',
      uri: this.libvirt.uri,
      name: null,
      identity: 'same',
      place: { kind: 'directory', path: this.out },
      format: 'qcow2',
      start: false,
      ...change,
    };
    return openLibvirtMachineTarget(spec, {
      place: this.#place(),
      commandTimeoutMs: 30_000,
      forbiddenDirectories: [this.lab.file('repository')],
      swtpmDirectory: this.swtpm(),
    }).prepare(of);
  }

  /** As the engine does it: all disks are written, then they appear, then the machine is there. */
  async restore(
    change: Partial<MachineTargetSpec>,
    of = this.request,
  ): Promise<RestoredMachine & { notes: readonly string[] }> {
    await using cleanup = new CleanupStack();
    const prepared = cleanup.use(await this.prepare(change, of));
    const opened: OpenTarget[] = [];
    for (const disk of prepared.disks) {
      opened.push(cleanup.use(await this.#write(disk, { overwrite: prepared.isInPlace, signal: of.signal })));
    }
    await prepared.confirm();
    for (const target of opened) await target.complete();
    const { machine, notes } = await prepared.complete();
    if (change.start === true) await prepared.start();
    return { ...machine, notes: [...prepared.notes, ...notes] };
  }

  async #write(
    disk: { diskId: DiskId; target: TargetSpec },
    options: { overwrite: boolean; signal: AbortSignal },
  ): Promise<OpenTarget> {
    const name = TARGETS.find((target) => this.ids[target] === disk.diskId) as DiskTarget;
    const target = openTarget(disk.target, {
      place: this.#place(),
      limits: { connections: 1, connectTimeoutMs: 5000, requestTimeoutMs: 5000 },
      forbiddenDirectories: [],
    });
    const request = { sizeBytes: DISK_BYTES[name], ...options };
    await target.check(request);
    const open = await target.open(request);
    const { sink } = open;
    const into = sink.kind === 'file' ? sink.path : sink.kind === 'nbd' ? sink.uri : '';
    await qemuImg(['convert', '-n', '-f', 'raw', '-O', 'raw', this.truths[name], into]);
    return open;
  }

  async expectDisks(domain: Domain): Promise<void> {
    for (const target of TARGETS) {
      const disk = domain.disks.find((candidate) => candidate.target === target);
      const file = disk?.location.path ?? '';
      await qemuImg(['convert', '-f', disk?.format ?? '', '-O', 'raw', file, this.lab.file('read.raw')]);
      expect(await firstDifference(this.lab.file('read.raw'), this.truths[target])).toBeNull();
    }
  }

  #place(): { runtimeDirectory: string; owner: string } {
    return { runtimeDirectory: this.lab.file('sockets'), owner: newId<RunId>() };
  }
}
