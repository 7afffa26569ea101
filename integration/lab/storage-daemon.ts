import { once } from 'node:events';
import { rm } from 'node:fs/promises';
import net from 'node:net';
import { createInterface } from 'node:readline';
import { pollUntil, withDeadline } from '../../src/lib/deadline.js';
import { nbdUnixUri } from './nbd-server.js';
import { pathExists, startLabServer, type LabServer } from './server.js';

const COMMAND_TIMEOUT_MS = 15_000;

/** A connection to QEMU's control protocol; commands run one after another. */
export interface QmpClient extends AsyncDisposable {
  execute(command: string, args?: Record<string, unknown>): Promise<unknown>;
}

interface QmpAnswer {
  return?: unknown;
  error?: { class: string; desc: string };
  event?: string;
  QMP?: unknown;
}

export async function connectQmp(socketPath: string): Promise<QmpClient> {
  const socket = net.connect(socketPath);
  await withDeadline(once(socket, 'connect'), { timeoutMs: COMMAND_TIMEOUT_MS, what: 'connecting to QMP' });
  const reader = createInterface({ input: socket });
  // QEMU that ends may reset the connection; whoever waits for an answer then finds it closed.
  socket.on('error', () => undefined);
  reader.on('error', () => undefined);
  const lines = reader[Symbol.asyncIterator]();
  const nextAnswer = async (): Promise<QmpAnswer> => {
    for (;;) {
      const line = await lines.next();
      if (line.done === true) throw new Error('the QMP connection was closed');
      const answer = JSON.parse(line.value) as QmpAnswer;
      if (answer.event === undefined) return answer;
    }
  };
  let last: Promise<unknown> = Promise.resolve();
  const execute = (command: string, args: Record<string, unknown> = {}): Promise<unknown> => {
    const turn = last.then(async () => {
      socket.write(`${JSON.stringify({ execute: command, arguments: args })}\n`);
      const answer = await withDeadline(nextAnswer(), { timeoutMs: COMMAND_TIMEOUT_MS, what: command });
      if (answer.error !== undefined) throw new Error(`${command}: ${answer.error.desc}`);
      return answer.return;
    });
    // The next command runs whether this one failed or not; its caller has the error.
    last = turn.catch(() => undefined);
    return turn;
  };
  await withDeadline(nextAnswer(), { timeoutMs: COMMAND_TIMEOUT_MS, what: 'the QMP greeting' });
  await execute('qmp_capabilities');
  return {
    execute,
    [Symbol.asyncDispose]: async () => {
      socket.destroy();
    },
  };
}

export interface LabStorageDaemon extends LabServer {
  readonly qmp: QmpClient;
  readonly uri: string;
  readonly socketPath: string;
  /** A new bitmap that records every write from now on; offered to clients that connect after it. */
  addBitmap(name: string): Promise<void>;
  removeBitmap(name: string): Promise<void>;
  /** Clears it, as another backup tool would. */
  clearBitmap(name: string): Promise<void>;
  resizeDisk(sizeBytes: number): Promise<void>;
}

/**
 * A qemu-storage-daemon with one QCOW2 disk, served read-write on a Unix socket, as a running machine's disk
 * would be: writes over NBD land in it and in its bitmaps. Adding a bitmap re-creates the export, so connected
 * clients are cut off then.
 */
export async function startStorageDaemon(options: {
  image: string;
  socketPath: string;
  exportName?: string;
  bitmaps?: readonly string[];
}): Promise<LabStorageDaemon> {
  const { image, socketPath, exportName = 'disk0' } = options;
  const qmpPath = `${socketPath}.qmp`;
  await rm(qmpPath, { force: true });
  const server = await startLabServer(
    'qemu-storage-daemon',
    [
      ...[
        '--blockdev',
        JSON.stringify({ driver: 'file', 'node-name': 'file0', filename: image, discard: 'unmap' }),
      ],
      ...[
        '--blockdev',
        JSON.stringify({ driver: 'qcow2', 'node-name': 'disk0', file: 'file0', discard: 'unmap' }),
      ],
      ...['--nbd-server', `addr.type=unix,addr.path=${socketPath},max-connections=0`],
      ...['--chardev', `socket,path=${qmpPath},server=on,wait=off,id=qmp0`, '--monitor', 'chardev=qmp0'],
    ],
    {
      isReady: async () => (await pathExists(qmpPath)) && (await pathExists(socketPath)),
      stopTimeoutMs: 10_000,
    },
  );
  try {
    const qmp = await connectQmp(qmpPath);
    const bitmaps = new Set(options.bitmaps ?? []);
    await addExport(qmp, exportName, bitmaps);
    return Object.assign(withQmp(server, qmp), bitmapCommands(qmp, exportName, bitmaps), {
      uri: nbdUnixUri(socketPath, exportName),
      socketPath,
    });
  } catch (error) {
    await server.stop();
    throw error;
  }
}

function withQmp(server: LabServer, qmp: QmpClient): LabServer & { qmp: QmpClient } {
  const stop = async (): Promise<void> => {
    await qmp[Symbol.asyncDispose]();
    await server.stop();
  };
  return {
    pid: server.pid,
    exited: server.exited,
    get hasExited() {
      return server.hasExited;
    },
    kill: () => server.kill(),
    freeze: () => {
      server.freeze();
    },
    thaw: () => {
      server.thaw();
    },
    qmp,
    stop,
    [Symbol.asyncDispose]: stop,
  };
}

async function addExport(qmp: QmpClient, name: string, bitmaps: Set<string>): Promise<void> {
  await qmp.execute('block-export-add', {
    type: 'nbd',
    id: 'export0',
    'node-name': 'disk0',
    name,
    writable: true,
    bitmaps: [...bitmaps],
  });
}

type BitmapCommands = Pick<LabStorageDaemon, 'addBitmap' | 'removeBitmap' | 'clearBitmap' | 'resizeDisk'>;

function bitmapCommands(qmp: QmpClient, exportName: string, bitmaps: Set<string>): BitmapCommands {
  // A bitmap or a disk that is exported is busy: the export goes first and comes back after.
  const whileNotExported = async (command: string, args: Record<string, unknown>): Promise<void> => {
    await qmp.execute('block-export-del', { id: 'export0', mode: 'hard' });
    await pollUntil(async () => (isEmptyList(await qmp.execute('query-block-exports')) ? true : undefined), {
      timeoutMs: COMMAND_TIMEOUT_MS,
      what: 'the removal of the export',
    });
    await qmp.execute(command, args);
  };
  return {
    addBitmap: async (name) => {
      await whileNotExported('block-dirty-bitmap-add', { node: 'disk0', name, persistent: true });
      bitmaps.add(name);
      await addExport(qmp, exportName, bitmaps);
    },
    removeBitmap: async (name) => {
      await whileNotExported('block-dirty-bitmap-remove', { node: 'disk0', name });
      bitmaps.delete(name);
      await addExport(qmp, exportName, bitmaps);
    },
    clearBitmap: async (name) => {
      await whileNotExported('block-dirty-bitmap-clear', { node: 'disk0', name });
      await addExport(qmp, exportName, bitmaps);
    },
    resizeDisk: async (sizeBytes) => {
      await whileNotExported('block_resize', { 'node-name': 'disk0', size: sizeBytes });
      await addExport(qmp, exportName, bitmaps);
    },
  };
}

function isEmptyList(answer: unknown): boolean {
  return Array.isArray(answer) && answer.length === 0;
}
