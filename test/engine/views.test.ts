import { describe, expect, it } from 'vitest';
import { toRunView } from '../../src/engine/views.js';
import { newId, type DiskId, type RunId } from '../../src/lib/id.js';
import { runRow, time } from '../contract/database-fixture.js';

const FACTS = { nowMs: Date.parse(time(0)), stalledAfterMs: 1000 };
const DISK_PROGRESS = { diskId: newId<DiskId>(), totalBytes: 8, bytesRead: 4, bytesWritten: 2 };

describe('the view of a run', () => {
  it('is complete for a run that has not begun', () => {
    expect(toRunView(runRow({ progress: null }), FACTS).progress).toEqual({
      share: null,
      bytesPerSecond: 0,
      etaSeconds: null,
      disks: [],
      push: null,
    });
  });

  it('is complete for a run of a release that knew no pushes', () => {
    const older = { share: 0.5, bytesPerSecond: 7, etaSeconds: 3, disks: [DISK_PROGRESS] };
    const { progress } = toRunView(runRow({ state: 'running', progress: older }), FACTS);
    expect(progress).toEqual({ ...older, push: null });
  });

  it('keeps what the agent of a push works with', () => {
    const push = {
      exports: 'sda=nbd://h/x',
      hash: 'xxh3-128',
      clusterBytes: 65_536,
      silenceMs: 1,
      disks: [],
    };
    const progress = { share: 0.5, bytesPerSecond: 7, etaSeconds: null, disks: [DISK_PROGRESS], push };
    expect(toRunView(runRow({ progress }), FACTS).progress).toEqual(progress);
  });

  it('has what older backups and restores were asked for, and came to, without these fields', () => {
    const backup = { kind: 'backup', type: 'full', bitmaps: [], bytesPerSecond: 0 };
    const restore = { kind: 'restore', disks: [], overwrite: false, acceptDamage: false };
    const older = { state: 'completed', result: { kind: 'restore', disks: [] } };
    expect(toRunView(runRow({ request: backup }), FACTS).request).toEqual({
      ...backup,
      consistency: 'prefer',
      disks: { include: [], exclude: [] },
    });
    const restored = toRunView(runRow({ kind: 'restore', request: restore, ...older }), FACTS);
    expect(restored.request).toEqual({ ...restore, machine: null });
    expect(restored.result).toEqual({ kind: 'restore', disks: [], machine: null });
  });

  it('has nothing of a backup in the request of a push', () => {
    const request = { kind: 'push', type: 'auto', consistency: 'crash', identity: null, disks: [] };
    expect(toRunView(runRow({ kind: 'backup', request }), FACTS).request).toEqual(request);
  });

  it('is stalled only while it runs and moves nothing for long enough', () => {
    const row = { state: 'running', progressAt: time(-1001), id: newId<RunId>() };
    expect(toRunView(runRow(row), FACTS).isStalled).toBe(true);
    expect(toRunView(runRow({ ...row, progressAt: time(-1000) }), FACTS).isStalled).toBe(false);
    expect(toRunView(runRow({ ...row, state: 'failed' }), FACTS).isStalled).toBe(false);
    expect(toRunView(runRow({ ...row, progressAt: null }), FACTS).isStalled).toBe(false);
  });
});
