import type { ExportListenerStatus, ListenAddress, OwnAddress } from '../exports/index.js';
import { CleanupStack } from '../lib/cleanup.js';
import { AppError, toAppError } from '../lib/errors.js';
import { QmpError } from '../lib/qmp.js';
import type { ExportdConfig, TlsSettings } from './config.js';
import { fingerprint, identityCredentials, sharedCredentials } from './credentials.js';
import { isSound, type Entry, type SoundEntry } from './entry.js';
import type { BlockNode } from './image.js';
import { Listener, type ListenerSettings } from './listener.js';
import type { DaemonPlace } from './storage-daemon.js';

/** Enough to keep the storage daemons busy. */
const ADDS_AT_ONCE = 32;

export interface ExportServerOptions {
  config: ExportdConfig;
  place: DaemonPlace;
  /** A storage daemon ended without being asked. */
  onEnded: (listener: Listener, message: string) => void;
}

/**
 * All listeners and what they offer. A read-only image is opened by the storage daemon of each shared address. A
 * writable one can be open only once: the first has it, and the other passes requests on to the first. Its
 * methods are called one after another; `onEnded` comes at any time.
 */
export class ExportServer {
  readonly #options: ExportServerOptions;
  /** In the order in which an export is added to them: the Unix socket first. */
  readonly #shared: Listener[] = [];
  readonly #own = new Map<string, Listener>();

  private constructor(options: ExportServerOptions) {
    this.#options = options;
  }

  /** Listens on the shared addresses. Rejects when one of them cannot be had. */
  static async start(options: ExportServerOptions): Promise<ExportServer> {
    const server = new ExportServer(options);
    await using undo = new CleanupStack();
    undo.defer(() => server.close());
    for (const settings of await sharedListeners(options.config)) {
      server.#shared.push(server.#makeListener(settings));
    }
    const starts = await Promise.allSettled(server.#shared.map((listener) => listener.start()));
    const failed = starts.find((start) => start.status === 'rejected');
    if (failed !== undefined) throw toAppError(failed.reason);
    undo.release();
    return server;
  }

  get listeners(): Listener[] {
    return [...this.#shared, ...this.#own.values()];
  }

  listenerStatus(): ExportListenerStatus[] {
    return this.listeners.map((listener) => listener.status());
  }

  /** Stops offering exports; their clients are disconnected. */
  async remove(entries: readonly Entry[]): Promise<void> {
    const names = entries.flatMap(({ definition }) => definition?.name ?? []);
    // Those that pass requests on go first.
    for (const listener of this.listeners.reverse()) await listener.remove(names);
  }

  /**
   * Brings the addresses of exports with an identity in line with the entries: closes those that nobody wants or
   * whose credentials changed, and makes new ones, which open with their first export. An entry that cannot have
   * its address gets its error.
   */
  async arrangeOwn(entries: Iterable<Entry>): Promise<void> {
    const wanted = new Map<string, ListenerSettings>();
    for (const entry of entries) {
      if (!isSound(entry) || entry.definition.own === null) continue;
      try {
        const settings = await ownListener(entry.definition.own, this.#options.config);
        const first = wanted.get(settings.id);
        if (first === undefined) wanted.set(settings.id, settings);
        else if (fingerprint(first.credentials) !== fingerprint(settings.credentials)) {
          throw new AppError('CONFLICT', `${settings.id} is for another identity`);
        }
      } catch (error) {
        await this.#fail(entry, error);
      }
    }
    for (const [id, listener] of this.#own) {
      const next = wanted.get(id)?.credentials;
      if (next !== undefined && fingerprint(next) === fingerprint(listener.settings.credentials)) continue;
      await listener.close();
      this.#own.delete(id);
    }
    for (const [id, settings] of wanted) {
      if (!this.#own.has(id)) this.#own.set(id, this.#makeListener(settings));
    }
  }

  /** Offers what is sound wherever it is not offered yet. What QEMU refuses gets its error. */
  async offer(entries: Iterable<Entry>): Promise<void> {
    const queue = [...entries].filter((entry) => isSound(entry));
    const work = async (): Promise<void> => {
      for (let entry = queue.shift(); entry !== undefined; entry = queue.shift()) await this.#offerOne(entry);
    };
    await Promise.all(Array.from({ length: ADDS_AT_ONCE }, work));
  }

  /** The listener whose storage daemon has a writable image open. */
  holderOf({ definition: { own } }: SoundEntry): Listener | undefined {
    return own === null ? this.#shared[0] : this.#own.get(ownId(own));
  }

  /** Starts a listener again whose storage daemon ended, and offers on it what it had. Rejects when it cannot listen. */
  async revive(listener: Listener, entries: Iterable<Entry>): Promise<void> {
    if (!this.listeners.includes(listener) || listener.isUp) return;
    const all = [...entries];
    if (listener === this.#shared[0]) {
      // What was written and not flushed is lost with the process. Clients of the other address must see
      // that as an error: they are cut off before there is anything to reconnect to.
      const writable = all.filter(({ definition }) => definition?.isReadOnly === false);
      for (const other of this.#shared.slice(1)) await other.remove(writable.map((entry) => nameOf(entry)));
    }
    await listener.start();
    await this.offer(all);
  }

  /** Disconnects everybody and ends all storage daemons. Idempotent. */
  async close(): Promise<void> {
    const [first, ...others] = this.#shared;
    await Promise.all([...others, ...this.#own.values()].map((listener) => listener.close()));
    await first?.close();
  }

  #makeListener(settings: ListenerSettings): Listener {
    return new Listener(settings, this.#options.place, this.#options.onEnded);
  }

  async #offerOne(entry: SoundEntry): Promise<void> {
    const { definition, image } = entry;
    const { name, isReadOnly, description, own } = definition;
    if (image === null) return;
    try {
      for (const [index, listener] of (await this.#listenersOf(own)).entries()) {
        if (listener.offers(name)) continue;
        const node = isReadOnly || index === 0 ? image.node : this.#passOn(name);
        const isOffered = node !== null && (await listener.add({ name, node, isReadOnly, description }));
        // Without the daemon that has the image there is nothing to pass requests on to.
        if (!isOffered && !isReadOnly) return;
      }
    } catch (error) {
      await this.#fail(entry, error);
    }
  }

  async #listenersOf(own: OwnAddress | null): Promise<Listener[]> {
    if (own === null) return this.#shared;
    const listener = this.#own.get(ownId(own));
    if (listener === undefined) return [];
    // One that ended is started again by `revive`.
    if (!listener.wasUp) await this.#startOnce(listener);
    return [listener];
  }

  /** Several exports of one identity come at once; the first starts the listener. */
  readonly #starting = new Map<Listener, Promise<void>>();
  async #startOnce(listener: Listener): Promise<void> {
    const start = this.#starting.get(listener) ?? listener.start();
    this.#starting.set(listener, start);
    try {
      await start;
    } finally {
      this.#starting.delete(listener);
    }
  }

  /** Not reconnecting: see `revive`. */
  #passOn(name: string): BlockNode | null {
    const address = this.#shared[0]?.settings.address;
    if (address?.kind !== 'unix') return null;
    return {
      driver: 'nbd',
      server: { type: 'unix', path: address.path },
      export: name,
      'reconnect-delay': 0,
      discard: 'unmap',
    };
  }

  /** An export is offered everywhere or nowhere. */
  async #fail(entry: Entry, error: unknown): Promise<void> {
    entry.error = error instanceof QmpError ? refused(error) : toAppError(error);
    await this.remove([entry]);
  }
}

function refused(cause: QmpError): AppError {
  const { description } = cause;
  const isHeld = /\block$/.test(description);
  const problem = isHeld ? `another process has its image open (${description})` : description;
  return new AppError('EXPORT_REFUSED', `QEMU does not serve it: ${problem}`, { cause });
}

function nameOf({ definition }: Entry): string {
  return definition?.name ?? '';
}

async function sharedListeners({ unix, tcp, tls }: ExportdConfig): Promise<ListenerSettings[]> {
  const listeners: ListenerSettings[] = [];
  if (unix !== null) {
    listeners.push({ id: 'unix', address: { kind: 'unix', path: unix.path }, credentials: null });
  }
  if (tcp !== null) {
    const { host, port } = tcp;
    const credentials = await sharedCredentials(tcp.tls, tls);
    listeners.push({ id: 'tcp', address: { kind: 'tcp', host, port }, credentials });
  }
  return listeners;
}

async function ownListener(
  own: OwnAddress,
  { tcp, tls }: { tcp: ExportdConfig['tcp']; tls: TlsSettings },
): Promise<ListenerSettings> {
  const address: ListenAddress =
    'port' in own.at
      ? { kind: 'tcp', host: tcp?.host ?? '127.0.0.1', port: own.at.port }
      : { kind: 'unix', path: own.at.socket };
  return { id: ownId(own), address, credentials: await identityCredentials(own.identity, tls) };
}

function ownId({ at }: OwnAddress): string {
  return 'port' in at ? `own:${at.port}` : `own:${at.socket}`;
}
