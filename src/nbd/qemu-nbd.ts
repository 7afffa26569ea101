import { readFile, rm } from 'node:fs/promises';
import path from 'node:path';
import { CleanupStack } from '../lib/cleanup.js';
import { errnoOf } from '../lib/errors.js';
import { newUlid } from '../lib/id.js';
import { startServer, type ChildRegistry, type ChildServer } from '../lib/process.js';

/** Where private servers put their sockets, and who remembers them. */
export interface ServerPlace {
  /** Directory of the sockets; only its owner may enter it. */
  runtimeDirectory: string;
  registry?: ChildRegistry | undefined;
  /** Run id or component that owns the servers. */
  owner: string;
}

export interface QemuNbdOptions extends ServerPlace {
  imagePath: string;
  format: 'raw' | 'qcow2';
  isReadOnly: boolean;
  /** Connections that will come; qemu-nbd's own default of 1 makes the second wait for ever. */
  connections: number;
  /** Persistent bitmap of a QCOW2 image to export. */
  bitmap?: string | null;
  signal?: AbortSignal | undefined;
}

export interface QemuNbd extends AsyncDisposable {
  readonly uri: string;
  readonly server: ChildServer;
  /** Ends the server; the image is flushed and closed when this resolves. Idempotent. */
  stop(): Promise<void>;
}

const READY_TIMEOUT_MS = 10_000;
/** A writer flushes its caches when it ends, which takes time on slow disks: killing it early would leave a dirty image. */
const STOP_TIMEOUT_MS = 60_000;
/** Connections beyond the copy's own: one that is just closing, one that only looks. */
const SPARE_CONNECTIONS = 2;

/**
 * A private `qemu-nbd` over one image on a Unix socket, with the format stated and the image locked
 * by qemu (a second writer is refused). It accepts work when this resolves, and dies with us.
 */
export async function startQemuNbd(options: QemuNbdOptions): Promise<QemuNbd> {
  await using undo = new CleanupStack();
  const base = path.join(options.runtimeDirectory, `n-${newUlid().slice(-12)}`);
  const socket = `${base}.sock`;
  const pidFile = `${base}.pid`;
  const removeFiles = async (): Promise<void> => {
    await rm(socket, { force: true });
    await rm(pidFile, { force: true });
  };
  undo.defer(removeFiles);
  const server = await startServer(
    'qemu-nbd',
    [
      ...(options.isReadOnly ? ['--read-only'] : ['--discard=unmap']),
      ...(options.bitmap === undefined || options.bitmap === null ? [] : [`--bitmap=${options.bitmap}`]),
      '--persistent',
      `--shared=${options.connections + SPARE_CONNECTIONS}`,
      `--format=${options.format}`,
      `--socket=${socket}`,
      `--pid-file=${pidFile}`,
      '--export-name=disk',
      '--',
      options.imagePath,
    ],
    {
      owner: options.owner,
      registry: options.registry,
      isReady: () => isWritten(pidFile),
      readyTimeoutMs: READY_TIMEOUT_MS,
      stopTimeoutMs: STOP_TIMEOUT_MS,
      signal: options.signal,
    },
  );
  undo.release();
  const stop = async (): Promise<void> => {
    await server.stop();
    await removeFiles();
  };
  return {
    uri: `nbd+unix:///disk?socket=${encodeURIComponent(socket)}`,
    server,
    stop,
    [Symbol.asyncDispose]: stop,
  };
}

/** qemu-nbd writes its pid file once it listens. */
async function isWritten(file: string): Promise<boolean> {
  try {
    return (await readFile(file, 'utf8')).endsWith('\n');
  } catch (error) {
    if (errnoOf(error) === 'ENOENT') return false;
    throw error;
  }
}
