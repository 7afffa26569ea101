import type { ExportDefinition } from '../exports/index.js';
import { cancelled } from '../lib/deadline.js';
import { AppError, toAppError } from '../lib/errors.js';
import { syncFile } from './block-stream.js';
import { isSound, type Entry, type Materialization, type SoundEntry } from './entry.js';
import type { ExportImage } from './image.js';
import type { Listener } from './listener.js';

interface Task {
  abort: AbortController;
  ended: Promise<void>;
}

export interface MaterializerOptions {
  /** The listener that has the image of an entry open. */
  holderOf: (entry: SoundEntry) => Listener | undefined;
  readImage: (definition: ExportDefinition) => Promise<ExportImage>;
  /** Called after each task. */
  onEnded: (entry: SoundEntry) => void;
}

/**
 * Makes the images of exports whose files ask for it stand alone, while they are served. A task that its storage
 * daemon leaves by dying is begun again by the next `start`.
 */
export class Materializer {
  readonly #options: MaterializerOptions;
  readonly #tasks = new Map<Entry, Task>();

  constructor(options: MaterializerOptions) {
    this.#options = options;
  }

  get isBusy(): boolean {
    return this.#tasks.size > 0;
  }

  /** Ends the tasks of all but these entries, and of those of them that do not ask for it; resolves when they have ended. */
  async keepOnly(entries: readonly Entry[]): Promise<void> {
    const wanted = new Set<Entry>(entries.filter(isWanted));
    for (const entry of entries) if (!wanted.has(entry)) entry.materialization = null;
    const unwanted = [...this.#tasks].filter(([entry]) => !wanted.has(entry));
    for (const [, { abort }] of unwanted)
      abort.abort(cancelled('the export file does not ask for it any more'));
    await Promise.all(unwanted.map(([, { ended }]) => ended));
  }

  /** Begins what is asked for and neither under way nor done nor failed, where the image is open. */
  start(entries: Iterable<Entry>): void {
    for (const entry of entries) {
      if (!isWanted(entry) || this.#tasks.has(entry)) continue;
      entry.materialization ??= {
        ...{ state: 'running', doneBytes: 0, totalBytes: entry.image?.sizeBytes ?? 0, error: null },
      };
      const holder = this.#options.holderOf(entry);
      if (entry.materialization.state !== 'running' || holder?.offers(entry.definition.name) !== true)
        continue;
      const abort = new AbortController();
      const ended = this.#run(entry, entry.materialization, { holder, signal: abort.signal });
      this.#tasks.set(entry, { abort, ended });
    }
  }

  async #run(
    entry: SoundEntry,
    progress: Materialization,
    { holder, signal }: { holder: Listener; signal: AbortSignal },
  ): Promise<void> {
    try {
      await this.#materialize(entry, progress, { holder, signal });
    } catch (error) {
      // An export that is removed takes its task along.
      if (!signal.aborted && toAppError(error).code !== 'CANCELLED') {
        progress.state = 'failed';
        progress.error = toAppError(error);
      }
    } finally {
      this.#tasks.delete(entry);
      this.#options.onEnded(entry);
    }
  }

  async #materialize(
    entry: SoundEntry,
    progress: Materialization,
    { holder, signal }: { holder: Listener; signal: AbortSignal },
  ): Promise<void> {
    const { readImage } = this.#options;
    const { definition } = entry;
    const { name, imagePath } = definition;
    // Its storage daemon may have died with the work done.
    if ((await readImage(definition)).isStandalone) await syncFile(imagePath, signal);
    else {
      const onProgress = (doneBytes: number): void => {
        progress.doneBytes = doneBytes;
      };
      if (!(await holder.stream(name, { imagePath, onProgress, signal }))) return;
    }
    const image = await readImage(definition);
    if (!image.isStandalone) {
      throw new AppError('INTERNAL', `QEMU is done, and ${imagePath} still names a backing file`);
    }
    entry.image = image;
    progress.state = 'completed';
    progress.doneBytes = progress.totalBytes;
  }
}

function isWanted(entry: Entry): entry is SoundEntry {
  return isSound(entry) && entry.definition.materialize;
}
