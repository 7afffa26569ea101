import { mkdir, rm, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { readExportStatus } from '../../../src/exports/index.js';
import { startServer } from '../../../src/lib/process.js';

const START_TIMEOUT_MS = 30_000;
const STOP_TIMEOUT_MS = 60_000;

/** What the two daemons share; `runtime` for sockets. */
export interface ExportPlaces {
  exports: string;
  runtime: string;
}

/** The section `exports` of holdfastd's configuration. */
export function exportSettings({ exports, runtime }: ExportPlaces): Record<string, string> {
  return {
    directory: exports,
    pidFile: path.join(runtime, 'exportd.pid'),
    statusFile: path.join(runtime, 'status.json'),
    overlayDirectory: path.join(exports, 'overlays'),
  };
}

/** A holdfast-exportd on a Unix socket alone. It ends with this process; whoever started it disposes it. */
export async function startExportDaemon(places: ExportPlaces): Promise<AsyncDisposable> {
  const { exports, runtime } = places;
  await rm(runtime, { recursive: true, force: true });
  await mkdir(runtime, { recursive: true, mode: 0o700 });
  await mkdir(exports, { recursive: true, mode: 0o700 });
  const configFile = path.join(exports, 'exportd.yaml');
  // JSON is YAML.
  const settings = { exportsDirectory: exports, runtimeDirectory: runtime, tcp: null };
  await writeFile(configFile, `${JSON.stringify(settings, undefined, 2)}\n`);
  const program = path.resolve(import.meta.dirname, '../../../bin/holdfast-exportd');
  return startServer(process.execPath, [program, '--config', configFile], {
    owner: 'quickstart',
    readyTimeoutMs: START_TIMEOUT_MS,
    stopTimeoutMs: STOP_TIMEOUT_MS,
    isReady: async () => ((await readExportStatus(path.join(runtime, 'status.json')))?.generation ?? 0) > 0,
  });
}
