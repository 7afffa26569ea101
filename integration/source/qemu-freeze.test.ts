import { writeFile } from 'node:fs/promises';
import { expect, test } from 'vitest';
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
import { openQemuSource } from '../../src/source/qemu/qemu-source.js';
import type { SourceDisk, SourceNote } from '../../src/source/source.js';
import { makeLabDirectory } from '../lab/directory.js';
import { GuestConsole, makeGuestDisk } from '../lab/guest.js';
import { startQemuGuest } from '../lab/qemu-guest.js';
import { makeSettings, readDisk } from './qemu-rig.js';

const CONTROL = { signal: new AbortController().signal };

test('a guest with an agent is frozen: its filesystems are clean at the instant', async () => {
  await using lab = await makeLabDirectory();
  const disks = ['a', 'b'].map((name) => ({ id: name, path: lab.file(`${name}.qcow2`), serial: name }));
  for (const { path } of disks) await makeGuestDisk({ path, sizeBytes: 64 * MIB });
  await using qemu = await startQemuGuest(lab, { disks, mode: 'writer' });
  const console = new GuestConsole(qemu.serialFile);
  await console.waitFor(/record 20/);
  const source = openQemuSource(
    { kind: 'qemu', socket: qemu.qmpSocket, agentSocket: qemu.agentSocket },
    { settings: makeSettings(lab.file('s')), place: { runtimeDirectory: lab.path, owner: 'test' } },
  );
  const sourceDisks = disks.map(({ id }): SourceDisk => {
    return {
      diskId: newId<DiskId>(),
      name: id,
      source: { kind: 'qemu', target: id, serial: null, changeTracking: 'auto' },
    };
  });
  const probes = await source.probe(sourceDisks, CONTROL);
  const notes: SourceNote[] = [];
  await using snapshot = await source.snapshot({
    vmId: newId<VmId>(),
    repositoryId: newId<RepositoryId>(),
    runId: newId<RunId>(),
    pointId: newId<PointId>(),
    disks: sourceDisks.map((disk) => ({ disk, probe: probes.get(disk.diskId)!, bitmap: null })),
    consistency: 'require',
    brokenRecords: [],
    note: (note) => notes.push(note),
    signal: CONTROL.signal,
  });
  expect(snapshot.consistency).toBe('application');
  expect(notes.filter(({ level }) => level === 'warning')).toEqual([]);
  const last = await console.lastRecord();
  await expect.poll(() => console.lastRecord(), { timeout: 5000 }).toBeGreaterThan(last);
  for (const [index, disk] of [...snapshot.disks.values()].entries()) {
    const image = lab.file(`copy${index}`);
    await writeFile(image, (await readDisk(disk)).content);
    const { stdout } = await runTool('dumpe2fs', ['-h', image], { timeoutMs: 10_000 });
    expect(stdout).toContain('has_journal');
    expect(stdout).not.toContain('needs_recovery');
  }
  await snapshot.close();
});
