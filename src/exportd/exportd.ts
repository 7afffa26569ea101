import { mkdir, rm } from 'node:fs/promises';
import path from 'node:path';
import { hostMonotonicMs, type ExportDaemonEvent, type ExportStatus } from '../exports/index.js';
import { CleanupStack } from '../lib/cleanup.js';
import { systemClock, toTimestamp } from '../lib/clock.js';
import { pollUntil } from '../lib/deadline.js';
import { AppError, toAppError } from '../lib/errors.js';
import type { Logger } from '../lib/log.js';
import { ChildRegistry, isSameProcess, processStartTime } from '../lib/process.js';
import type { ExportdConfig } from './config.js';
import { lockDirectory } from './directory-lock.js';
import { entryStatus, isSound, type Entry } from './entry.js';
import { ExportServer } from './export-server.js';
import { readImage } from './image.js';
import type { Listener } from './listener.js';
import { Materializer } from './materializer.js';
import { planReload } from './plan.js';
import { scanDirectory, type ScannedFile } from './scan.js';
import { replaceFile } from './status-file.js';
import type { DaemonPlace } from './storage-daemon.js';

const MAX_EVENTS = 50;
/** Headers read at the same time; as many as Node has threads for files. */
const READS_AT_ONCE = 16;
/** How often the status tells the progress of what is under way. */
const PROGRESS_INTERVAL_MS = 1000;
const REAP_TIMEOUT_MS = 10_000;

/** The export daemon. Whoever started it disposes it: clients are disconnected and images closed then. */
export interface Exportd extends AsyncDisposable {
  /** Reads the directory again, soon. Calls that come before it is read again are one. */
  readonly reload: () => void;
  /** Rejects when the daemon cannot go on; never resolves. */
  readonly failed: Promise<never>;
}

/**
 * Starts the daemon: takes its directories, listens, and serves what the directory holds; resolves when that is
 * served. CONFLICT when another one has the directories, or an address is taken.
 */
export async function startExportd(config: ExportdConfig, logger: Logger): Promise<Exportd> {
  await using undo = new CleanupStack();
  await mkdir(config.runtimeDirectory, { recursive: true });
  undo.use(await lockDirectory(config.runtimeDirectory, 'runtime directory'));
  undo.use(await lockExports(config.exportsDirectory));
  const place = await preparePlace(config.runtimeDirectory);
  const daemon = new Daemon(config, logger);
  undo.defer(() => daemon.close());
  await daemon.start(place);
  const cleanup = undo.move();
  return {
    reload: () => {
      daemon.reload();
    },
    failed: daemon.failed,
    [Symbol.asyncDispose]: () => cleanup.run(),
  };
}

async function lockExports(directory: string): Promise<AsyncDisposable> {
  try {
    return await lockDirectory(directory, 'directory');
  } catch (error) {
    if (error instanceof AppError) throw error;
    throw new AppError('CONFIG_INVALID', `exportsDirectory ${directory} cannot be opened`, { cause: error });
  }
}

/** Ends what a crash left behind, so that addresses and images are free. */
async function preparePlace(runtimeDirectory: string): Promise<DaemonPlace> {
  const privateDirectory = path.join(runtimeDirectory, 'private');
  const registry = new ChildRegistry(path.join(runtimeDirectory, 'children'));
  for (const child of await registry.reap()) {
    await pollUntil(async () => ((await isSameProcess(child)) ? undefined : true), {
      timeoutMs: REAP_TIMEOUT_MS,
      what: `the end of an earlier ${child.tool}`,
    });
  }
  await rm(privateDirectory, { recursive: true, force: true });
  await mkdir(privateDirectory, { mode: 0o700 });
  return { privateDirectory, registry };
}

class Daemon {
  readonly #config: ExportdConfig;
  readonly #logger: Logger;
  readonly #startedAt = toTimestamp(systemClock.nowMs());
  readonly #events: ExportDaemonEvent[] = [];
  readonly #timers = new Set<NodeJS.Timeout>();
  readonly failed: Promise<never>;
  #fail: (error: unknown) => void = () => undefined;
  #server: ExportServer | undefined;
  readonly #materializer: Materializer;
  #isProgressDue = false;
  #entries = new Map<string, Entry>();
  #processStartTime = '';
  #generation = 0;
  #readAtMs = 0;
  #appliedAt = this.#startedAt;
  #isReloadDue = false;
  #isClosed = false;
  /** One thing is done after another: reloads, restarts of storage daemons. */
  #tail: Promise<void> = Promise.resolve();

  constructor(config: ExportdConfig, logger: Logger) {
    this.#config = config;
    this.#logger = logger;
    this.#materializer = new Materializer({
      holderOf: (entry) => this.#running().holderOf(entry),
      readImage: (definition) => readImage(definition, config.imageDirectories),
      onEnded: (entry) => {
        this.#noteMaterialized(entry);
      },
    });
    this.failed = new Promise((_resolve, reject) => {
      this.#fail = reject;
    });
    // Whoever waits for it sees it; nobody does while the daemon starts.
    this.failed.catch(() => undefined);
  }

  async start(place: DaemonPlace): Promise<void> {
    this.#processStartTime = (await processStartTime(process.pid)) ?? '';
    this.#server = await ExportServer.start({
      config: this.#config,
      place,
      onEnded: (listener, message) => {
        this.#note('storage-daemon-ended', listener.id, message);
        this.#reviveLater(listener);
      },
    });
    await this.#writeStatus();
    await replaceFile(this.#config.pidFile, `${process.pid}\n`);
    this.reload();
    await this.#tail;
    if (this.#generation === 0) throw await this.failed.catch(toAppError);
  }

  reload(): void {
    if (this.#isReloadDue) return;
    this.#isReloadDue = true;
    this.#enqueue(async () => {
      this.#isReloadDue = false;
      await this.#apply();
    });
  }

  async close(): Promise<void> {
    this.#isClosed = true;
    for (const timer of this.#timers) clearTimeout(timer);
    // What is under way ends with the storage daemons.
    await this.#server?.close();
    await this.#tail;
    await rm(this.#config.pidFile, { force: true });
    await rm(this.#config.statusFile, { force: true });
  }

  #enqueue(task: () => Promise<void> | void): void {
    this.#tail = this.#tail.then(async () => {
      if (this.#isClosed) return;
      try {
        await task();
      } catch (error) {
        this.#fail(error);
        return;
      }
      await this.#publishStatus();
      this.#publishProgressLater();
    });
  }

  #publishProgressLater(): void {
    if (this.#isProgressDue || !this.#materializer.isBusy) return;
    this.#isProgressDue = true;
    this.#later(PROGRESS_INTERVAL_MS, () => {
      this.#isProgressDue = false;
    });
  }

  /** Does something in turn, after a while, unless the daemon is closed before. */
  #later(ms: number, task: () => Promise<void> | void): void {
    if (this.#isClosed) return;
    const timer = setTimeout(() => {
      this.#timers.delete(timer);
      this.#enqueue(task);
    }, ms);
    this.#timers.add(timer);
  }

  async #apply(): Promise<void> {
    const readAtMs = hostMonotonicMs();
    const files = await this.#scan();
    if (files === undefined) return;
    const server = this.#running();
    const { entries, remove, add } = planReload(this.#entries, files);
    this.#entries = entries;
    await this.#materializer.keepOnly([...entries.values()]);
    await server.remove(remove);
    await server.arrangeOwn(entries.values());
    await this.#readImages(add);
    await server.offer(entries.values());
    this.#materializer.start(entries.values());
    this.#generation += 1;
    this.#readAtMs = readAtMs;
    this.#appliedAt = toTimestamp(systemClock.nowMs());
    const failed = [...entries.values()].filter((entry) => !isSound(entry));
    const { length: added } = add.filter(isSound);
    this.#logger.info(
      { generation: this.#generation, added, removed: remove.length, failed: failed.length },
      'exports applied',
    );
    for (const { file, error } of failed) {
      this.#logger.warn({ file, code: error?.code, reason: error?.message }, 'export not served');
    }
  }

  /** A directory that cannot be listed says nothing about what is to be served: all stays as it is. */
  async #scan(): Promise<ScannedFile[] | undefined> {
    try {
      return await scanDirectory(this.#config.exportsDirectory);
    } catch (error) {
      if (this.#generation === 0) throw error;
      this.#note('directory-unreadable', null, toAppError(error).message);
      return undefined;
    }
  }

  #reviveLater(listener: Listener): void {
    this.#later(listener.restartDelayMs, () => this.#revive(listener));
  }

  async #revive(listener: Listener): Promise<void> {
    try {
      const server = this.#running();
      const isWrittenBy = (entry: Entry): boolean =>
        isSound(entry) && !entry.definition.isReadOnly && server.holderOf(entry) === listener;
      // An image may have lost its backing file there; with it again, it would show what clients discarded since.
      await this.#readImages([...this.#entries.values()].filter(isWrittenBy));
      await server.revive(listener, this.#entries.values());
      this.#materializer.start(this.#entries.values());
      this.#note('storage-daemon-restarted', listener.id, 'all its exports are offered again');
    } catch (error) {
      this.#note('restart-failed', listener.id, toAppError(error).message);
      this.#reviveLater(listener);
    }
  }

  #noteMaterialized({ file, materialization }: Entry): void {
    const { state, error } = materialization ?? {};
    this.#logger.info({ file, state, code: error?.code, reason: error?.message }, 'materializing ended');
    this.#enqueue(() => {
      this.#materializer.start(this.#entries.values());
    });
  }

  /** Fills in how each entry's image is opened, or its error. */
  async #readImages(entries: readonly Entry[]): Promise<void> {
    const queue = [...entries];
    const work = async (): Promise<void> => {
      for (let entry = queue.shift(); entry !== undefined; entry = queue.shift()) {
        if (!isSound(entry)) continue;
        try {
          const image = await readImage(entry.definition, this.#config.imageDirectories);
          Object.assign(entry, { image });
        } catch (error) {
          Object.assign(entry, { error: toAppError(error) });
        }
      }
    };
    await Promise.all(Array.from({ length: READS_AT_ONCE }, work));
  }

  #running(): ExportServer {
    if (this.#server === undefined) throw new AppError('INTERNAL', 'the export server was not started');
    return this.#server;
  }

  #note(kind: ExportDaemonEvent['kind'], listener: string | null, message: string): void {
    this.#events.push({ at: toTimestamp(systemClock.nowMs()), kind, listener, message });
    if (this.#events.length > MAX_EVENTS) this.#events.shift();
    this.#logger.warn({ kind, listener, reason: message }, 'event');
  }

  /** Exports go on when the status cannot be told, e.g. because its filesystem is full: clients come first. */
  async #publishStatus(): Promise<void> {
    try {
      await this.#writeStatus();
    } catch (error) {
      this.#logger.error({ err: error, statusFile: this.#config.statusFile }, 'status not written');
    }
  }

  async #writeStatus(): Promise<void> {
    const server = this.#running();
    const status: ExportStatus = {
      version: 1,
      pid: process.pid,
      processStartTime: this.#processStartTime,
      startedAt: this.#startedAt,
      exportsDirectory: this.#config.exportsDirectory,
      generation: this.#generation,
      appliedAt: this.#appliedAt,
      readAtMs: this.#readAtMs,
      listeners: server.listenerStatus(),
      files: [...this.#entries.values()].map((entry) => entryStatus(entry, server.listeners)),
      events: this.#events,
    };
    await replaceFile(this.#config.statusFile, `${JSON.stringify(status)}\n`);
  }
}
