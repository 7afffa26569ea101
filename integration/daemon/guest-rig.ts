import { mkdir } from 'node:fs/promises';
import { expect } from 'vitest';
import type { BackupView, RunEvent, RunView } from '../../src/engine/types.js';
import { MIB } from '../../src/lib/units.js';
import type { LabDirectory } from '../lab/directory.js';
import {
  GuestConsole,
  makeGuestDisk,
  readVerdict,
  startGuest,
  type DiskVerdict,
  type LabGuest,
} from '../lab/guest.js';
import type { LabDisk } from '../lab/domain-xml.js';
import { startBackup, type BackupOptions, type Daemon, type Setup } from './daemon.js';
import { waitPastInstant, type LiveRig } from './live-rig.js';

const DISK_BYTES = 64 * MIB;
/** Slow enough that the guest writes much while it is copied. */
const BYTES_PER_SECOND = 4 * MIB;
/** The guest tells of every 25th record only; one more may be under way on each disk. */
const UNTOLD_RECORDS = 26;

export interface GuestVerdict {
  vda: DiskVerdict;
  vdb: DiskVerdict;
}

/** Two disks with an empty filesystem each, `<name>-vda` and `<name>-vdb`. */
export async function makeGuestDisks(
  lab: LabDirectory,
  name: string,
): Promise<(LabDisk & { path: string; serial: string })[]> {
  const disks = ['vda', 'vdb'].map((target) => {
    return { target, path: lab.file(`${name}-${target}.qcow2`), serial: `${name}-${target}` };
  });
  for (const { path } of disks) await makeGuestDisk({ path, sizeBytes: DISK_BYTES });
  return disks;
}

/** Boots a domain that writes records to two disks until it is ended. */
export async function startWriter(rig: LiveRig, name: string): Promise<LabGuest> {
  const guest = await startGuest(rig.libvirt, {
    name,
    disks: await makeGuestDisks(rig.lab, name),
    serialFile: rig.lab.file(`${name}.log`),
    mode: 'writer',
  });
  await waitForContent(guest.console);
  return guest;
}

/** Until the guest has written so much that a copy of it takes a while. */
export async function waitForContent(console: GuestConsole): Promise<void> {
  await console.waitFor(/^hf: record 500$/m);
}

/** Rejects when it does not, also when one of its writes failed. */
export async function expectWritesOn(console: GuestConsole): Promise<void> {
  const last = await console.lastRecord();
  await expect.poll(() => console.lastRecord(), { timeout: 30_000 }).toBeGreaterThan(last);
  await console.waitFor(/^hf: record/m);
}

export interface GuestPoint {
  run: RunView;
  /** Between these lies the last record of the instant. */
  records: { least: number; most: number };
  /** Whether the guest had written later records before all was copied. */
  isWrittenMeanwhile: boolean;
}

/** A backup of a guest that writes before, during and after it. */
export async function backUpWriter(
  daemon: Daemon,
  setup: Setup,
  { console, ...options }: BackupOptions & { console: GuestConsole },
): Promise<GuestPoint> {
  const least = await console.lastRecord();
  const { id } = await startBackup(daemon, setup, { bytesPerSecond: BYTES_PER_SECOND, ...options });
  await waitPastInstant(daemon, id);
  const most = (await console.lastRecord()) + UNTOLD_RECORDS;
  await console.waitFor(new RegExp(`^hf: record ${nextTold(most)}$`, 'm'));
  const { stage } = await daemon.expect<RunView>(200, 'GET', `/runs/${id}`);
  const run = await daemon.waitForRun(id);
  expect([run.state, run.error]).toEqual(['completed', null]);
  await expectWritesOn(console);
  return { run, records: { least, most }, isWrittenMeanwhile: stage === 'transfer' };
}

const nextTold = (record: number): number => Math.ceil(record / 25) * 25;

/** What the daemon knows of the run's point, and what the run's log says. */
export async function pointOf(daemon: Daemon, run: RunView): Promise<{ point: BackupView; log: RunEvent[] }> {
  const point = await daemon.expect<BackupView>(200, 'GET', `/backups/${run.pointId ?? ''}`);
  const { items } = await daemon.expect<{ items: RunEvent[] }>(200, 'GET', `/runs/${run.id}/log`);
  return { point, log: items };
}

/**
 * Restores the point as a new machine and boots that: its own kernel line says what it does, and is changed so
 * that it checks its disks and says what stands on them.
 */
export async function restoreAndBoot(rig: LiveRig, run: RunView, name: string): Promise<GuestVerdict> {
  const directory = rig.lab.file(`restored-${name}`);
  await mkdir(directory);
  const restore = await rig.daemon.expect<RunView>(202, 'POST', '/restore/vms', {
    pointId: run.pointId,
    uri: rig.libvirt.uri,
    name,
    identity: 'new',
    place: { kind: 'directory', path: directory },
  });
  const ended = await rig.daemon.waitForRun(restore.id);
  expect([ended.state, ended.error]).toEqual(['completed', null]);
  const machine = ended.result?.kind === 'restore' ? ended.result.machine : null;
  expect(machine).toMatchObject({ name, isStarted: false });
  const serialFile = rig.lab.file(`${name}.log`);
  const xml = await rig.libvirt.virsh('dumpxml', '--inactive', '--security-info', machine?.uuid ?? '');
  await rig.libvirt.define(
    xml
      .replace('hf.mode=writer', 'hf.mode=verify')
      .replace(/(<serial type='file'>\s*<source path=')[^']*/, `$1${serialFile}`),
  );
  await rig.libvirt.virsh('start', name);
  return readVerdict(new GuestConsole(serialFile));
}

/** Both disks hold one instant, that of the point, and nothing of it is torn or missing. */
export function expectOneInstant({ vda, vdb }: GuestVerdict, { records }: GuestPoint): void {
  for (const disk of [vda, vdb]) expect(disk).toMatchObject({ missingRecords: 0, fsckReplayed: 0 });
  // A record goes to the second disk when it is safe on the first.
  expect([0, 1]).toContain(vda.lastRecord - vdb.lastRecord);
  expect(vda.lastRecord).toBeGreaterThanOrEqual(records.least);
  expect(vda.lastRecord).toBeLessThanOrEqual(records.most);
}

/** The filesystems need nothing, not even their journals: they were frozen at the instant. */
export function expectFrozen({ vda, vdb }: GuestVerdict): void {
  for (const disk of [vda, vdb]) expect(disk).toMatchObject({ fsck: 0, isJournalClean: true });
}
