import { mkdir, mkdtemp, rm } from 'node:fs/promises';
import os from 'node:os';
import path from 'node:path';
import type { ExportRow } from '../../src/db/index.js';
import type { EngineContext } from '../../src/engine/context.js';
import type { ExportSpec } from '../../src/engine/export-publisher.js';
import type { ExportFacts } from '../../src/engine/export-record.js';
import { newId, type PointId } from '../../src/lib/id.js';
import { exportRow, time } from '../contract/database-fixture.js';
import { openEngineContext, SETTINGS } from './engine-context.js';

export const PUBLISH_TIMEOUT_MS = 1000;
export const FACTS: ExportFacts = {
  layerId: null,
  imagePath: '/srv/layer.qcow2',
  format: 'qcow2',
  isReadOnly: true,
  sizeBytes: 1000,
  description: 'web, disk sda',
  identity: null,
  at: null,
  overlay: null,
  materialization: null,
  workerId: 'this worker',
};
export const SPEC: ExportSpec = {
  ...{ kind: 'point', pointId: newId<PointId>(), diskId: null, runId: null, volumeId: null, layerId: null },
  ...{ name: 'disk', imagePath: '/srv/layer.qcow2', format: 'qcow2', isReadOnly: true, sizeBytes: 1000 },
  ...{ description: null, identity: null, expiresAt: null, overlay: null },
};

/** An engine with nothing but a database and directories; `clock.nowMs` can be set. */
export interface ExportLab extends AsyncDisposable {
  readonly directory: string;
  readonly context: EngineContext;
  readonly clock: { nowMs: number };
  insert(change?: Partial<ExportRow>, facts?: Partial<ExportFacts>): Promise<ExportRow>;
}

export async function openExportLab(): Promise<ExportLab> {
  const directory = await mkdtemp(path.join(os.tmpdir(), 'hf-exports-'));
  for (const name of ['exports.d', 'identities']) await mkdir(path.join(directory, name));
  const clock = { nowMs: Date.parse(time(0)) };
  const exports = {
    ...SETTINGS.exports,
    directory: path.join(directory, 'exports.d'),
    statusFile: path.join(directory, 'status.json'),
    pidFile: path.join(directory, 'pid'),
    identitiesDirectory: path.join(directory, 'identities'),
    ...{ ownPortsFrom: 65_534, ownPorts: 4, publishTimeoutMs: PUBLISH_TIMEOUT_MS },
  };
  const context = await openEngineContext(directory, {
    clock: { nowMs: () => clock.nowMs, monotonicMs: () => clock.nowMs },
    settings: { ...SETTINGS, exports },
  });
  return {
    directory,
    context,
    clock,
    async insert(change = {}, facts = {}) {
      const made = publishedRow(change, facts);
      await context.db.exports.insert(made);
      return made;
    },
    async [Symbol.asyncDispose]() {
      await context.db[Symbol.asyncDispose]();
      await rm(directory, { recursive: true });
    },
  };
}

export function publishedRow(change: Partial<ExportRow> = {}, facts: Partial<ExportFacts> = {}): ExportRow {
  return exportRow({ state: 'published', ...change, facts: { ...FACTS, ...facts } });
}
