import { createHash } from 'node:crypto';
import { mkdir, rm } from 'node:fs/promises';
import path from 'node:path';
import { AppError, toAppError } from '../../../src/lib/errors.js';
import { runTool } from '../../../src/lib/process.js';
import type { ApiBackup, ApiRun, Schemas } from '../api-client.js';
import { startDaemon, stopDaemon, type RunningDaemon } from '../daemon.js';
import { Account } from './account.js';
import { exportSettings, startExportDaemon, type ExportPlaces } from './export-daemon.js';
import { HoldfastCommand } from './holdfast-command.js';
import { parseQuickstartOptions, type QuickstartOptions } from './options.js';
import { demoScene, ownScene, type Scene } from './scene.js';

const REPOSITORY = 'quickstart';
const DISK = 'disk0';
const COMPARE_TIMEOUT_MS = 600_000;

interface Places {
  directory: string;
  state: string;
  repository: string;
  source: string;
  restored: string;
  exportDaemon: ExportPlaces;
  /** Sockets: short, and only root's. */
  runtime: string;
}

function placesOf(directory: string): Places {
  const name = `holdfast-quickstart-${createHash('sha256').update(directory).digest('hex').slice(0, 8)}`;
  const isRoot = process.getuid?.() === 0;
  const runtimeParent = isRoot ? '/run' : (process.env['XDG_RUNTIME_DIR'] ?? directory);
  const runtime = path.join(runtimeParent, name);
  return {
    directory,
    state: path.join(directory, 'state'),
    repository: path.join(directory, 'repository'),
    source: path.join(directory, 'source'),
    restored: path.join(directory, 'restored'),
    exportDaemon: { exports: path.join(directory, 'exports.d'), runtime: path.join(runtime, 'exportd') },
    runtime,
  };
}

async function run(options: QuickstartOptions): Promise<void> {
  const places = placesOf(options.directory);
  const account = new Account();
  if (options.isStop) {
    const wasRunning = await stopDaemon(places.state);
    await rm(places.runtime, { recursive: true, force: true });
    account.line(wasRunning ? 'Holdfast is stopped.' : `No Holdfast runs on ${places.state}.`);
    return;
  }
  for (const directory of [places.directory, places.source, places.restored, places.runtime]) {
    await mkdir(directory, { recursive: true, mode: 0o700 });
  }
  account.step('Start Holdfast on its embedded defaults: SQLite, a private Redis, loopback');
  const daemon = await startDaemon({
    stateDirectory: places.state,
    runtimeDirectory: path.join(places.runtime, 'daemon'),
    port: options.port,
    settings: { exports: exportSettings(places.exportDaemon) },
  });
  account.facts({ daemon: `pid ${daemon.pid} at ${daemon.url}`, state: places.state });

  account.step('Have a disk to back up');
  await using scene =
    options.source === null
      ? await demoScene(
          { directory: places.source, socketPath: path.join(places.runtime, 'demo.sock') },
          account,
        )
      : ownScene(options.source, account);
  await protect({ places, account, scene, holdfast: new HoldfastCommand(daemon) });
  printEnd(daemon, places);
}

interface Work {
  places: Places;
  account: Account;
  scene: Scene;
  holdfast: HoldfastCommand;
}

/** Full, change, incremental; both restored and compared. */
async function protect(work: Work): Promise<void> {
  const { account, scene, holdfast, places } = work;
  if (scene.expectedMethod === null) account.line(JSON.stringify(scene.source));

  account.step('Record a repository, a machine and its disk');
  await ensureRepository(holdfast, places.repository);
  const vm = await ensureVm(holdfast, scene);
  account.facts({ repository: places.repository, machine: `${vm.name} (${vm.id})` });

  account.step('Full backup');
  const full = await backUp(work, 'full');

  account.step('Change files on the disk');
  await scene.change(full.id);

  account.step('Incremental backup');
  const incremental = await backUp(work, 'incremental');
  const method = incremental.layers[0]?.method;
  if (scene.expectedMethod !== null && method !== scene.expectedMethod) {
    throw new AppError(
      'INTERNAL',
      `the incremental was taken by ${method ?? 'nothing'}, not by ${scene.expectedMethod}`,
    );
  }

  for (const [number, point] of [[1, full] as const, [2, incremental] as const]) {
    account.step(`Restore point ${number} and compare it with the source, byte for byte`);
    const file = path.join(places.restored, `point-${number}.raw`);
    await restore(work, point, file);
    await scene.compare(number, file);
    account.line('equal');
  }

  await publish(work, incremental);

  account.step('What is stored: plain QCOW2, readable with Holdfast switched off');
  const chains = await holdfast.json<Schemas['ChainList']>('backup', 'chain', incremental.id);
  for (const chain of chains.items) {
    const top = chain.layers[0]?.path;
    if (top !== undefined) await account.chain(top);
  }
}

async function ensureRepository(holdfast: HoldfastCommand, root: string): Promise<void> {
  const known = await holdfast.json<Schemas['RepositoryPage']>('repository', 'list');
  if (known.items.some((item) => item.name === REPOSITORY)) return;
  await holdfast.json('repository', 'create', REPOSITORY, root);
}

async function ensureVm(holdfast: HoldfastCommand, scene: Scene): Promise<Schemas['Vm']> {
  const known = await holdfast.json<Schemas['VmPage']>('vm', 'list');
  const found = known.items.find((item) => item.name === scene.vmName);
  if (found !== undefined) return found;
  const disk = JSON.stringify({ name: DISK, source: scene.source });
  return holdfast.json<Schemas['Vm']>('vm', 'add', scene.vmName, '--disk-json', disk);
}

async function backUp({ holdfast, scene, account }: Work, type: 'full' | 'incremental'): Promise<ApiBackup> {
  const run = await holdfast.json<ApiRun>(
    ...['backup', 'run', scene.vmName, '--repository', REPOSITORY, '--type', type],
  );
  if (run.result?.kind !== 'backup') throw new AppError('INTERNAL', `run ${run.id} made no point`);
  const point = await holdfast.json<ApiBackup>('backup', 'show', run.result.pointId);
  account.backup(run, point);
  return point;
}

async function restore({ holdfast, account }: Work, point: ApiBackup, file: string): Promise<void> {
  await rm(file, { force: true });
  const target = `${DISK}=${file},format=raw`;
  const run = await holdfast.json<ApiRun>('restore', 'run', point.id, '--disk', target);
  account.restore(run, file);
}

/** Of point 2, which was restored and compared before. */
async function publish({ holdfast, account, places }: Work, point: ApiBackup): Promise<void> {
  account.step('Publish point 2 over NBD, and read it with qemu-img');
  await using _exportDaemon = await startExportDaemon(places.exportDaemon);
  const made = await holdfast.json<Schemas['Export']>('export', 'publish', point.id, '--ttl', '1h');
  const [uri = ''] = made.uris;
  const restored = path.join(places.restored, 'point-2.raw');
  await runTool('qemu-img', ['compare', '-q', '-f', 'raw', '-F', 'raw', uri, restored], {
    timeoutMs: COMPARE_TIMEOUT_MS,
  });
  account.facts({ export: made.name, at: uri, read: 'equal to what was restored' });
  await holdfast.json('export', 'remove', made.id);
  account.line('removed again; the export daemon is stopped (docs/reference/exportd.md)');
}

function printEnd(daemon: RunningDaemon, places: Places): void {
  process.stdout.write(`
Done: two points made, restored and compared. Holdfast goes on running.

   address      ${daemon.url} (API under /api/v1, its description under /docs)
   admin token  in the file ${daemon.tokenFile}
   log          ${daemon.logFile}
   repository   ${places.repository}
   restored     ${places.restored}

   export HOLDFAST_URL=${daemon.url} HOLDFAST_TOKEN_FILE=${daemon.tokenFile}
   bin/holdfast backup list
   scripts/quickstart --stop${places.directory.endsWith('/quickstart-data') ? '' : ` --directory ${places.directory}`}
`);
}

try {
  await run(parseQuickstartOptions(process.argv.slice(2), process.cwd()));
} catch (error) {
  const { code, message, remedy } = toAppError(error);
  const isFault = !(error instanceof AppError) && error instanceof Error;
  process.stderr.write(`\nquickstart: ${message}\n${isFault ? (error.stack ?? '') : remedy}\n`);
  process.exitCode = code === 'INVALID_INPUT' ? 2 : 1;
}
