import { mkdtemp, readlink, rm, stat } from 'node:fs/promises';
import os from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { VolumeRow } from '../../src/db/index.js';
import type { EngineContext } from '../../src/engine/context.js';
import { definitionOf } from '../../src/engine/export-record.js';
import { createVolumeWatch, RELEASE_AFTER_MS, type VolumeWatch } from '../../src/engine/volume-orphans.js';
import { lookForVolume, recordMapping, type VolumeFacts } from '../../src/engine/volume-device.js';
import { volumeLinkPath } from '../../src/engine/volume-link.js';
import { recoverVolumeRun } from '../../src/engine/volume-runs.js';
import { requireVolumeFree, type VolumeUse } from '../../src/engine/volume-users.js';
import { createExportFile, readExportFile } from '../../src/exports/index.js';
import { toTimestamp } from '../../src/lib/clock.js';
import type { RunId, VolumeId } from '../../src/lib/id.js';
import type { BlockDevice } from '../../src/volume/index.js';
import { exportRow, runRow, vmRow, volumeRow } from '../contract/database-fixture.js';
import { openEngineContext, SETTINGS } from './engine-context.js';

const SIZE = 2 ** 30;

function device(letter: string, change: Partial<BlockDevice> = {}): BlockDevice {
  return {
    devicePath: `/dev/sd${letter}`,
    deviceNumber: `8:${letter.charCodeAt(0) * 16}`,
    type: 'disk',
    sizeBytes: SIZE,
    isReadOnly: false,
    model: null,
    identities: [],
    instance: `boot/${letter}`,
    pathOf: null,
    problem: null,
    ...change,
  };
}

describe('attached volumes', () => {
  let directory: string;
  let context: EngineContext;
  let devices: BlockDevice[];
  let nowMs: number;
  let watch: VolumeWatch;

  beforeEach(async () => {
    directory = await mkdtemp(path.join(os.tmpdir(), 'hf-volumes-'));
    devices = [];
    nowMs = Date.UTC(2026, 10, 21);
    context = await openEngineContext(directory, {
      settings: structuredClone(SETTINGS),
      clock: { nowMs: () => nowMs, monotonicMs: () => nowMs },
      volumeProvider: { name: 'host', list: () => Promise.resolve(devices) },
    });
    watch = createVolumeWatch(context);
  });
  afterEach(async () => {
    await context.db[Symbol.asyncDispose]();
    await rm(directory, { recursive: true });
  });

  async function attached(identity: string, on: BlockDevice): Promise<VolumeId> {
    const facts: VolumeFacts = { type: 'disk', model: null, identities: [], instance: null, goneSince: null };
    const { mapping, ...row } = volumeRow({ identity, sizeBytes: SIZE, facts });
    await context.db.volumes.insert(row);
    devices = [...devices.filter(({ devicePath }) => devicePath !== on.devicePath), on];
    await recordMapping(context, { ...row, mapping }, { device: on, devices });
    return row.id;
  }

  const row = async (id: VolumeId): Promise<VolumeRow> => (await context.db.volumes.get(id))!;
  const placeOf = async (id: VolumeId): Promise<string | undefined> => (await row(id)).mapping?.devicePath;
  const checkLater = async (ms: number): Promise<void> => {
    nowMs += ms;
    await watch.check();
  };

  it('a device that is gone is noted, and its volume released when it stays away', async () => {
    const id = await attached('wwn:0x1', device('a', { identities: ['wwn:0x1'] }));
    expect(await readlink(volumeLinkPath(context, id))).toBe('/dev/sda');
    devices = [];
    await watch.check();
    expect((await row(id)).facts).toMatchObject({ goneSince: toTimestamp(nowMs) });
    await expect(readlink(volumeLinkPath(context, id))).rejects.toThrow('ENOENT');
    await checkLater(RELEASE_AFTER_MS - 1);
    expect(await placeOf(id)).toBe('/dev/sda');
    await checkLater(1);
    expect(await placeOf(id)).toBeUndefined();
    const { rows } = await context.db.auditLog.list({ limit: 5, cursor: null });
    expect(rows).toMatchObject([{ action: 'volume.release', subject: id, actor: 'holdfastd' }]);
  });

  it('a device that comes back in time is the volume again', async () => {
    const id = await attached('wwn:0x1', device('a', { identities: ['wwn:0x1'] }));
    devices = [];
    await watch.check();
    devices = [device('b', { identities: ['wwn:0x1'] })];
    await checkLater(60_000);
    expect(await row(id)).toMatchObject({
      mapping: { devicePath: '/dev/sdb', verifiedAt: toTimestamp(nowMs) },
      facts: { goneSince: null, instance: 'boot/b' },
    });
    expect(await readlink(volumeLinkPath(context, id))).toBe('/dev/sdb');
  });

  it.each(['an export', 'a run'])('is not released while %s uses it', async (what) => {
    const id = await attached('wwn:0x1', device('a', { identities: ['wwn:0x1'] }));
    if (what === 'an export') await context.db.exports.insert(exportRow({ kind: 'volume', volumeId: id }));
    else {
      const target = { kind: 'volume', volumeId: id };
      const request = { kind: 'restore', disks: [{ diskId: 'd', target }] };
      await context.db.runs.insert(runRow({ kind: 'restore', state: 'running', request }), { turn: 'none' });
    }
    devices = [];
    await watch.check();
    await checkLater(60_000);
    await checkLater(60_000);
    expect(await placeOf(id)).toBe('/dev/sda');
  });

  it('is released when another device is in its place, and kept when its own has lost its identity', async () => {
    const replaced = await attached('fs-uuid:1', device('a', { identities: ['fs-uuid:1'] }));
    const formatted = await attached('fs-uuid:2', device('b', { identities: ['fs-uuid:2'] }));
    devices = [
      device('a', { identities: ['fs-uuid:8'], instance: 'boot/a2' }),
      device('b', { identities: ['fs-uuid:9'] }),
    ];
    await watch.check();
    await checkLater(60_000);
    expect([await placeOf(replaced), await placeOf(formatted)]).toEqual([undefined, '/dev/sdb']);
  });

  it('is not released while a device that may be it cannot be looked into', async () => {
    const id = await attached('fs-uuid:1', device('a', { identities: ['fs-uuid:1'] }));
    devices = [device('c', { problem: 'blkid did not end' })];
    await watch.check();
    await checkLater(60_000);
    expect(await placeOf(id)).toBe('/dev/sda');
    expect(lookForVolume(await row(id), devices)).toMatchObject({
      error: { code: 'VOLUME_GONE', details: { unread: ['/dev/sdc'] } },
    });
  });

  it('three that changed places in a circle are followed', async () => {
    const ids = [];
    for (const [letter, identity] of [
      ['a', 'wwn:0x1'],
      ['b', 'wwn:0x2'],
      ['c', 'wwn:0x3'],
    ] as const) {
      ids.push(await attached(identity, device(letter, { identities: [identity] })));
    }
    devices = [
      device('a', { identities: ['wwn:0x3'], instance: 'boot/x' }),
      device('b', { identities: ['wwn:0x1'], instance: 'boot/y' }),
      device('c', { identities: ['wwn:0x2'], instance: 'boot/z' }),
    ];
    await watch.check();
    await watch.check();
    expect(await Promise.all(ids.map(placeOf))).toEqual(['/dev/sdb', '/dev/sdc', '/dev/sda']);
  });

  it('a copy with the same identity does not take the place of the device that was attached', async () => {
    const id = await attached('fs-uuid:1', device('a', { identities: ['fs-uuid:1'] }));
    devices = [device('a', { identities: ['fs-uuid:1'] }), device('b', { identities: ['fs-uuid:1'] })];
    expect(lookForVolume(await row(id), devices).device?.devicePath).toBe('/dev/sda');
    // After a restart of the host nothing says any more which of them it was.
    devices = devices.map((each) => ({ ...each, instance: `later/${each.devicePath}` }));
    expect(lookForVolume(await row(id), devices)).toMatchObject({
      error: { code: 'VOLUME_MISMATCH', message: expect.stringContaining('/dev/sda and /dev/sdb') as string },
      isLost: false,
    });
  });

  it('a device that holds a copy of another volume stays what it is', async () => {
    const lost = await attached('fs-uuid:1', device('a', { identities: ['fs-uuid:1'] }));
    const target = await attached('wwn:0x2', device('b', { identities: ['wwn:0x2', 'fs-uuid:7'] }));
    devices = [device('b', { identities: ['wwn:0x2', 'fs-uuid:1'] })];
    await watch.check();
    expect(await placeOf(target)).toBe('/dev/sdb');
    expect((await row(lost)).facts).toMatchObject({ instance: 'boot/a' });
    devices = [...devices, device('c', { identities: ['fs-uuid:1'], instance: 'boot/c' })];
    expect(lookForVolume(await row(lost), devices)).toMatchObject({ error: { code: 'VOLUME_MISMATCH' } });
  });

  it('an export is opened again when another appearance of its device took the place of the one it has open', async () => {
    const id = await attached('wwn:0x1', device('a', { identities: ['wwn:0x1'] }));
    const { settings } = context;
    settings.exports.directory = directory;
    const facts = {
      imagePath: volumeLinkPath(context, id),
      format: 'raw',
      isReadOnly: true,
      sizeBytes: SIZE,
      description: 'volume x',
      identity: null,
      at: null,
      overlay: null,
      materialization: null,
    };
    const published = exportRow({ kind: 'volume', state: 'published', volumeId: id, facts });
    await context.db.exports.insert(published);
    const { file } = await createExportFile(directory, definitionOf(published));
    const before = await stat(path.join(directory, file));
    await watch.check();
    expect((await stat(path.join(directory, file))).mtimeMs).toBe(before.mtimeMs);
    devices = [device('b', { identities: ['wwn:0x1'] })];
    await watch.check();
    expect((await stat(path.join(directory, file))).mtimeMs).toBeGreaterThan(before.mtimeMs);
    expect(await readExportFile(directory, published.name)).toEqual(definitionOf(published));
  });

  it('a device that two volumes would have is the first one’s', async () => {
    const both = device('a', { identities: ['wwn:0x1', 'fs-uuid:1'] });
    await attached('wwn:0x1', both);
    await expect(attached('fs-uuid:1', both)).rejects.toMatchObject({ code: 'VOLUME_IN_USE' });
  });

  it('a run that died says what had happened', async () => {
    const id = await attached('wwn:0x1', device('a', { identities: ['wwn:0x1'] }));
    const attach = runRow({ kind: 'attach-volume', request: { kind: 'attach-volume', volumeId: id } });
    const detach = runRow({ kind: 'detach-volume', request: { kind: 'detach-volume', volumeId: id } });
    expect(await recoverVolumeRun(context, attach)).toEqual({
      kind: 'attach-volume',
      volumeId: id,
      devicePath: '/dev/sda',
    });
    expect(await recoverVolumeRun(context, detach)).toBeNull();
    await context.db.volumes.detach(id);
    expect(await recoverVolumeRun(context, attach)).toBeNull();
    expect(await recoverVolumeRun(context, detach)).toEqual({ kind: 'detach-volume', volumeId: id });
  });

  it.each<[string, VolumeUse, boolean]>([
    ['backup', 'read', true],
    ['backup', 'export', true],
    ['backup', 'write', false],
    ['backup', 'detach', false],
    ['push', 'detach', true],
    ['restore', 'read', false],
    ['restore', 'export', false],
    ['restore', 'write', false],
    ['restore', 'detach', false],
    ['detach-volume', 'read', false],
    ['detach-volume', 'export', false],
    ['detach-volume', 'detach', false],
    ['check', 'write', true],
    ['restore that ended', 'write', true],
    ['restore of another', 'write', true],
    ['restore of its own', 'write', true],
  ])('beside a %s, it may be used to %s: %s', async (other, use, isAllowed) => {
    const id = await attached('wwn:0x1', device('a', { identities: ['wwn:0x1'] }));
    const vm = vmRow();
    vm.disks[0]!.source = { kind: 'volume', volumeId: id, changeTracking: 'auto' };
    await context.db.vms.insert(vm);
    const volumeId = other === 'restore of another' ? volumeRow().id : id;
    const kind = other.includes('restore') ? 'restore' : other;
    const requests: Record<string, unknown> = {
      restore: { kind, disks: [{ diskId: 'd', target: { kind: 'volume', volumeId } }] },
      'detach-volume': { kind, volumeId },
    };
    const run = runRow({
      kind: kind === 'push' ? 'backup' : kind,
      state: other.endsWith('ended') ? 'completed' : 'running',
      vmId: vm.id,
      request: requests[kind] ?? { kind },
    });
    await context.db.runs.insert(run, { turn: 'none' });
    const self = other === 'restore of its own' ? run.id : (volumeRow().id as unknown as RunId);
    const asked = requireVolumeFree(context, id, { use, self });
    if (isAllowed) await asked;
    else await expect(asked).rejects.toMatchObject({ code: 'VOLUME_IN_USE', details: { runIds: [run.id] } });
  });
});
