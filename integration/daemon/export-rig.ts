import { createHash } from 'node:crypto';
import { mkdir, readdir, readFile } from 'node:fs/promises';
import path from 'node:path';
import { expect } from 'vitest';
import type { ChainView, ExportView } from '../../src/engine/types.js';
import { CleanupStack } from '../../src/lib/cleanup.js';
import { pollUntil } from '../../src/lib/deadline.js';
import { connect, startExportd, type ExportdRig } from '../exportd/rig.js';
import { makeLabDirectory } from '../lab/directory.js';
import { findLeftovers } from '../lab/leftovers.js';
import { restart } from './crash.js';
import { startDaemon, type Daemon, type Settings } from './daemon.js';
import type { Rig } from './rig.js';

/** Below the ports that the kernel hands out; each test process has its own. */
const OWN_PORTS = 20;
const ownPortsFrom = (): number => 21_000 + (process.pid % 500) * OWN_PORTS;

/** holdfastd and the holdfast-exportd it publishes through, with their directories under `lab`. */
export interface ExportRig extends Rig {
  exportd: ExportdRig;
  overlayDirectory: string;
  identitiesDirectory: string;
  /** What `restart` of crash.ts must be given. */
  settings: Settings;
  exportdSettings: Record<string, unknown>;
}

export async function startExportRig(
  options: { settings?: Settings; exportd?: Record<string, unknown> } = {},
): Promise<ExportRig> {
  await using undo = new CleanupStack();
  const lab = undo.use(await makeLabDirectory());
  const identitiesDirectory = lab.file('identities');
  const overlayDirectory = lab.file('overlays');
  await mkdir(identitiesDirectory, { mode: 0o700 });
  const exportdSettings = { tls: { psk: { identitiesDirectory } }, ...options.exportd };
  const exportd = undo.use(await startExportd({ directory: lab.file('exportd'), settings: exportdSettings }));
  const { exportsDirectory: directory, pidFile, statusFile } = exportd;
  const settings = {
    ...options.settings,
    exports: {
      ...{ directory, pidFile, statusFile, identitiesDirectory, overlayDirectory },
      ...{ ownPortsFrom: ownPortsFrom(), ownPorts: OWN_PORTS, publishTimeoutMs: 10_000 },
      ...(options.settings?.['exports'] as Settings | undefined),
    },
  };
  const daemon = await startDaemon({ directory: lab.file('daemon'), settings });
  undo.release();
  return { lab, daemon, exportd, overlayDirectory, identitiesDirectory, settings, exportdSettings };
}

/** Stops both; nothing of them may be left. */
export async function stopExportRig(rig: ExportRig): Promise<void> {
  await rig.daemon.stop();
  await rig.exportd.stop();
  expect(await findLeftovers(rig.lab.path)).toEqual([]);
  await rig.lab[Symbol.asyncDispose]();
}

/** Another export daemon on the directories of the one that was stopped or killed. */
export async function restartExportd(rig: ExportRig): Promise<void> {
  const { port } = rig.exportd;
  rig.exportd = await startExportd({
    directory: rig.lab.file('exportd'),
    settings: rig.exportdSettings,
    port,
  });
}

/** Another holdfastd on the state of the one that was stopped or killed. */
export const restartHoldfastd = (rig: ExportRig): Promise<void> => restart(rig, rig.settings);

/** Publishes what the body of POST /exports says; a read-only point by default. */
export async function publish(daemon: Daemon, body: Record<string, unknown>): Promise<ExportView> {
  const made = await daemon.expect<ExportView>(201, 'POST', '/exports', body);
  expect([made.state, made.problem, made.uris.length > 0]).toEqual(['published', null, true]);
  return made;
}

export function show(daemon: Daemon, id: string): Promise<ExportView> {
  return daemon.expect<ExportView>(200, 'GET', `/exports/${id}`);
}

export async function listed(daemon: Daemon): Promise<ExportView[]> {
  return (await daemon.expect<{ items: ExportView[] }>(200, 'GET', '/exports?limit=100')).items;
}

/** Names of the files in the directory of exports, partial ones too. */
export async function exportFiles(rig: ExportRig): Promise<string[]> {
  return (await readdir(rig.exportd.exportsDirectory)).sort();
}

/** Neither row, file nor overlay of an export is there, nor is one served; but for these foreign files. */
export async function expectNoExports(rig: ExportRig, foreign: readonly string[] = []): Promise<void> {
  expect(await listed(rig.daemon)).toEqual([]);
  expect(await exportFiles(rig)).toEqual([...foreign].sort());
  expect((await rig.exportd.status()).files.map(({ file }) => file).sort()).toEqual([...foreign].sort());
  expect(await filesBelow(rig.overlayDirectory)).toEqual([]);
}

/** Waits until the reaper has removed all of ours. */
export async function waitForNoExports(rig: ExportRig, foreign: readonly string[] = []): Promise<void> {
  await pollUntil(async () => ((await listed(rig.daemon)).length === 0 ? true : undefined), {
    timeoutMs: 20_000,
    intervalMs: 100,
    what: 'the reaper removing all exports',
  });
  await expectNoExports(rig, foreign);
}

export async function filesBelow(directory: string): Promise<string[]> {
  await mkdir(directory, { recursive: true });
  return readdir(directory);
}

/** Digest of the layer files under a disk of a point: what no client may ever change. */
export async function hashLayers(daemon: Daemon, pointId: string): Promise<string> {
  const { items } = await daemon.expect<{ items: ChainView[] }>(200, 'GET', `/backups/${pointId}/chain`);
  const hash = createHash('sha256');
  for (const { layers } of items) {
    for (const layer of layers) {
      hash.update(path.basename(layer.path));
      hash.update(await readFile(layer.path));
    }
  }
  return hash.digest('hex');
}

/** The file of the top layer of a point's only disk, or of the one named. */
export async function topLayer(daemon: Daemon, pointId: string, disk?: string): Promise<string> {
  const { items } = await daemon.expect<{ items: ChainView[] }>(200, 'GET', `/backups/${pointId}/chain`);
  const chain = items.find(({ diskName }) => disk === undefined || diskName === disk);
  const file = chain?.layers[0]?.path;
  if (file === undefined) throw new Error(`point ${pointId} has no disk ${disk ?? ''}`);
  return file;
}

/** Whether a client can connect; the connection is closed again. */
export async function isServed(uri: string): Promise<boolean> {
  try {
    await using _handle = await connect(uri);
    return true;
  } catch {
    return false;
  }
}
