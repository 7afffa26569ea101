import { mkdir, rm, writeFile } from 'node:fs/promises';
import path from 'node:path';
import type { ListenAddress } from '../exports/index.js';
import { CleanupStack } from '../lib/cleanup.js';
import { cancelled, pollUntil } from '../lib/deadline.js';
import { AppError } from '../lib/errors.js';
import { newUlid } from '../lib/id.js';
import { startServer, type ChildRegistry, type ChildServer } from '../lib/process.js';
import { connectQmp, isQemuGone, QmpError, type QmpClient } from '../lib/qmp.js';
import { z } from 'zod';
import { nameNode, streamNode, type BlockStreamOptions } from './block-stream.js';
import type { Credentials } from './credentials.js';
import type { BlockNode } from './image.js';
import { prepareSocket, shareSocket } from './socket-file.js';

/** Where storage daemons have their control sockets and keys: a directory that only we may enter. */
export interface DaemonPlace {
  privateDirectory: string;
  registry: ChildRegistry;
}

export interface OfferedExport {
  name: string;
  node: BlockNode;
  isReadOnly: boolean;
  description: string | null;
}

interface Offered {
  /** In the ids of its node and export. */
  number: number;
  node: BlockNode;
  /** Ends the copying under way, and resolves when it has ended. */
  endStream?: () => Promise<unknown>;
}

const READY_TIMEOUT_MS = 20_000;
/** Opening an image stands in line behind the others. */
const COMMAND_TIMEOUT_MS = 60_000;
/** It flushes what clients wrote. */
const STOP_TIMEOUT_MS = 30_000;
const REMOVE_TIMEOUT_MS = 30_000;

/**
 * One `qemu-storage-daemon` with its NBD server at one address (QEMU 7.2 has one NBD server in a process, and
 * that listens on one address). Exports run in its main loop: with an iothread, 7.2 aborts when a client leaves.
 * It dies with us. Whoever started it stops it.
 */
export class StorageDaemon {
  readonly #server: ChildServer;
  readonly #qmp: QmpClient;
  readonly #cleanup: CleanupStack;
  readonly #offered = new Map<string, Offered>();
  #lastNumber = 0;

  private constructor(server: ChildServer, qmp: QmpClient, cleanup: CleanupStack) {
    this.#server = server;
    this.#qmp = qmp;
    this.#cleanup = cleanup;
  }

  /** Resolves when it listens. CONFLICT when the address is taken, CONFIG_INVALID when QEMU refuses the credentials. */
  static async start(
    address: ListenAddress,
    credentials: Credentials | null,
    place: DaemonPlace,
  ): Promise<StorageDaemon> {
    await using undo = new CleanupStack();
    const base = path.join(place.privateDirectory, newUlid().slice(-12));
    if (address.kind === 'unix') {
      await prepareSocket(address.path);
      undo.defer(() => rm(address.path, { force: true }));
    }
    const { server, qmp } = await startProcess(`${base}.qmp`, { place, undo });
    if (credentials !== null) await addCredentials(qmp, credentials, { directory: `${base}.tls`, undo });
    await listen(qmp, address, credentials);
    if (address.kind === 'unix') await shareSocket(address.path);
    return new StorageDaemon(server, qmp, undo.move());
  }

  get pid(): number {
    return this.#server.pid;
  }

  /** Settles when the process has ended, however; never rejects. */
  get exited(): ChildServer['exited'] {
    return this.#server.exited;
  }

  has(name: string): boolean {
    return this.#offered.has(name);
  }

  /**
   * Opens the image and offers it. May be called for many exports at once: QEMU takes them in turn. Rejects with
   * QmpError when QEMU refuses, and nothing of it stays; with anything else when the daemon is beyond use.
   */
  async add({ name, node, isReadOnly, description }: OfferedExport): Promise<void> {
    const number = (this.#lastNumber += 1);
    const nodeName = `n${number}`;
    await this.#qmp.execute('blockdev-add', nameNode(node, nodeName));
    try {
      await this.#qmp.execute('block-export-add', {
        type: 'nbd',
        id: `e${number}`,
        'node-name': nodeName,
        name,
        writable: !isReadOnly,
        ...(description === null ? {} : { description }),
      });
    } catch (error) {
      if (error instanceof QmpError) await this.#qmp.execute('blockdev-del', { 'node-name': nodeName });
      throw error;
    }
    this.#offered.set(name, { number, node });
  }

  /** Makes the image of an offered export stand alone, as `streamNode` does; CANCELLED when the export is removed. */
  async stream(name: string, options: BlockStreamOptions): Promise<void> {
    const offered = this.#offered.get(name);
    if (offered === undefined) throw cancelled(`${name} is not offered any more`);
    const removal = new AbortController();
    const signal = AbortSignal.any([options.signal, removal.signal]);
    const node = { node: offered.node, name: `n${offered.number}` };
    const work = streamNode(this.#qmp, node, { ...options, signal });
    offered.endStream = () => {
      removal.abort(cancelled(`${name} is removed`));
      return Promise.allSettled([work]);
    };
    await work;
  }

  /**
   * Stops offering these exports: their clients are disconnected, nobody else's, and their images closed when
   * this resolves. Names that are not offered are passed over. When it rejects, the daemon is beyond use.
   */
  async remove(names: readonly string[]): Promise<void> {
    const offered = names.flatMap((name) => this.#offered.get(name) ?? []);
    if (offered.length === 0) return;
    for (const name of names) this.#offered.delete(name);
    await Promise.all(offered.flatMap(({ endStream }) => endStream?.() ?? []));
    const numbers = offered.map(({ number }) => number);
    const ids = new Set(numbers.map((number) => `e${number}`));
    await Promise.all([...ids].map((id) => this.#qmp.execute('block-export-del', { id, mode: 'hard' })));
    // Requests under way end first; only then does the export let go of the image.
    await pollUntil(async () => ((await this.#listExports()).some((id) => ids.has(id)) ? undefined : true), {
      timeoutMs: REMOVE_TIMEOUT_MS,
      what: 'the removal of exports',
    });
    await Promise.all(
      numbers.map((number) => this.#qmp.execute('blockdev-del', { 'node-name': `n${number}` })),
    );
  }

  /** Ends it at once, for when it does not answer. */
  kill(): void {
    if (!this.#server.hasExited) process.kill(this.#server.pid, 'SIGKILL');
  }

  /** Lets clients go, flushes and closes the images, ends. Idempotent. */
  stop(): Promise<void> {
    return this.#cleanup.run();
  }

  async #listExports(): Promise<string[]> {
    const exports = z.array(z.object({ id: z.string() }));
    return exports.parse(await this.#qmp.execute('query-block-exports')).map(({ id }) => id);
  }
}

async function startProcess(
  qmpSocket: string,
  { place, undo }: { place: DaemonPlace; undo: CleanupStack },
): Promise<{ server: ChildServer; qmp: QmpClient }> {
  undo.defer(() => rm(qmpSocket, { force: true }));
  let qmp: QmpClient | undefined;
  const server = await startServer(
    'qemu-storage-daemon',
    [
      // A comma in a value of QEMU's option syntax is written twice.
      ...['--chardev', `socket,path=${qmpSocket.replaceAll(',', ',,')},server=on,wait=off,id=qmp`],
      ...['--monitor', 'chardev=qmp'],
    ],
    {
      owner: 'exportd',
      registry: place.registry,
      isReady: async () => (qmp = await tryConnect(qmpSocket)) !== undefined,
      readyTimeoutMs: READY_TIMEOUT_MS,
      stopTimeoutMs: STOP_TIMEOUT_MS,
    },
  );
  undo.use(server);
  if (qmp === undefined) throw new AppError('INTERNAL', 'the storage daemon is ready, and has no monitor');
  undo.use(qmp);
  return { server, qmp };
}

async function tryConnect(qmpSocket: string): Promise<QmpClient | undefined> {
  try {
    return await connectQmp(qmpSocket, { timeoutMs: COMMAND_TIMEOUT_MS });
  } catch (error) {
    if (isQemuGone(error)) return undefined;
    throw error;
  }
}

async function addCredentials(
  qmp: QmpClient,
  credentials: Credentials,
  { directory, undo }: { directory: string; undo: CleanupStack },
): Promise<void> {
  const common = { id: 'tls0', endpoint: 'server' };
  try {
    if (credentials.kind === 'psk') {
      undo.defer(() => rm(directory, { recursive: true, force: true }));
      await mkdir(directory, { mode: 0o700 });
      await writeFile(path.join(directory, 'keys.psk'), credentials.keys, { mode: 0o600 });
      await qmp.execute('object-add', { 'qom-type': 'tls-creds-psk', ...common, dir: directory });
      return;
    }
    const { directory: dir, clientNames } = credentials;
    await qmp.execute('object-add', { 'qom-type': 'tls-creds-x509', ...common, dir, 'verify-peer': true });
    if (clientNames === null) return;
    const rules = clientNames.map((match) => ({ match, policy: 'allow', format: 'exact' }));
    await qmp.execute('object-add', { 'qom-type': 'authz-list', id: 'authz0', policy: 'deny', rules });
  } catch (error) {
    if (!(error instanceof QmpError)) throw error;
    throw new AppError('CONFIG_INVALID', `QEMU refuses the TLS credentials: ${error.description}`, {
      cause: error,
    });
  }
}

async function listen(
  qmp: QmpClient,
  address: ListenAddress,
  credentials: Credentials | null,
): Promise<void> {
  const isListed = credentials?.kind === 'x509' && credentials.clientNames !== null;
  try {
    await qmp.execute('nbd-server-start', {
      addr:
        address.kind === 'unix'
          ? { type: 'unix', data: { path: address.path } }
          : { type: 'inet', data: { host: address.host, port: String(address.port) } },
      // The default of 100 leaves the next client waiting for ever.
      'max-connections': 0,
      ...(credentials === null ? {} : { 'tls-creds': 'tls0' }),
      ...(isListed ? { 'tls-authz': 'authz0' } : {}),
    });
  } catch (error) {
    if (!(error instanceof QmpError)) throw error;
    const where = address.kind === 'unix' ? address.path : `${address.host} port ${address.port}`;
    throw new AppError('CONFLICT', `cannot listen on ${where}: ${error.description}`, {
      cause: error,
      details: { address },
    });
  }
}
