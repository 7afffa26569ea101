import { pause, pollUntil } from '../../lib/deadline.js';
import { AppError, isErrorCode } from '../../lib/errors.js';
import type { RunId } from '../../lib/id.js';
import type { DomainLink } from './domain-link.js';
import { endBackup, isBackupThere } from './domain-job.js';
import type { HypervisorHost } from './hypervisor-host.js';
import { watchScratch, type ScratchLimits } from './scratch-watch.js';

/** Where a run's backup job has its server and its scratch files, on the hypervisor's host. */
export interface JobPlace {
  link: DomainLink;
  host: HypervisorHost;
  /** The run's directory is `<base>/<runId>`. */
  base: string;
  runId: RunId;
}

const LOOK_INTERVAL_MS = 2000;
/**
 * A job that somebody aborts is still told of for a while (some 50 ms here), in which QEMU no longer keeps old data and
 * still serves reads: only a job that is there a while after the last read was whole during it.
 */
const ABORT_MS = 250;

/** The socket of a run's job; whatever listens there was started for that run. */
export function socketOf({ base, runId }: Pick<JobPlace, 'base' | 'runId'>): string {
  return `${base}/${runId}/nbd.sock`;
}

/**
 * Watches over a backup job and the scratch space that it fills. Made before the job begins, so that the guest
 * is never without; ends the job by itself when the scratch space comes to its limit.
 */
export class BackupJob {
  readonly #place: JobPlace;
  readonly #lost = new AbortController();
  readonly #stopped = new AbortController();
  readonly #scratch: { stop: () => Promise<void> };
  #looking: Promise<void> = Promise.resolve();
  #emergency: Promise<void> = Promise.resolve();
  #isEnded = false;

  constructor(place: JobPlace, limits: ScratchLimits) {
    this.#place = place;
    const directory = `${place.base}/${place.runId}`;
    const { lost } = place.link;
    lost?.addEventListener('abort', () => {
      const cause = lost.reason as AppError;
      this.#lost.abort(new AppError('SNAPSHOT_LOST', cause.message, { cause }));
    });
    this.#scratch = watchScratch({ host: place.host, directory, limits }, (reason) => {
      this.#lost.abort(reason);
      // Ends the job at once. What goes wrong here does so again in end(), which tells.
      this.#emergency = endBackup(place.link, socketOf(place)).catch(() => undefined);
    });
  }

  /** Aborts with the reason when what the job exports is not to be relied upon any more. */
  get lost(): AbortSignal {
    return this.#lost.signal;
  }

  /** The job began: from now on its absence is a loss. */
  began(): void {
    this.#looking = this.#look();
  }

  /**
   * Why nothing that was read counts, or null. Asks libvirt whether the job is still there, and waits for a
   * libvirtd that is just being restarted; SOURCE_UNREACHABLE when it does not come back.
   */
  async whyLost(): Promise<AppError | null> {
    if (!this.#lost.signal.aborted) {
      await pause(ABORT_MS);
      if (!(await this.#isThere())) this.#lost.abort(jobGone());
    }
    return this.#lost.signal.aborted ? (this.#lost.signal.reason as AppError) : null;
  }

  async #isThere(): Promise<boolean> {
    const { link } = this.#place;
    const ask = async (): Promise<boolean | undefined> =>
      (await isBackupThere(link, socketOf(this.#place), {})) ?? undefined;
    try {
      return await pollUntil(ask, {
        timeoutMs: link.timeoutMs,
        what: 'an answer of libvirt',
        intervalMs: 500,
        signal: this.#lost.signal,
      });
    } catch (error) {
      if (this.#lost.signal.aborted) return false;
      if (!isErrorCode(error, 'TIMEOUT')) throw error;
      throw new AppError('SOURCE_UNREACHABLE', 'libvirt did not come back during the backup', {
        cause: error,
      });
    }
  }

  /** Ends the job, then the watch, and removes the directory. May be called again when it failed. */
  async end(): Promise<void> {
    const { link, host, base, runId } = this.#place;
    this.#stopped.abort();
    await this.#looking;
    if (this.#isEnded) return;
    try {
      await endBackup(link, socketOf(this.#place));
    } finally {
      await this.#scratch.stop();
      await this.#emergency;
    }
    await host.removeRunDirectory({ base, runId }, { signal: AbortSignal.timeout(link.timeoutMs) });
    this.#isEnded = true;
  }

  async #look(): Promise<void> {
    try {
      for (;;) {
        await pause(LOOK_INTERVAL_MS, this.#stopped.signal);
        const isThere = await isBackupThere(this.#place.link, socketOf(this.#place), {
          signal: this.#stopped.signal,
        });
        if (isThere === false) throw jobGone();
      }
    } catch (error) {
      if (this.#stopped.signal.aborted) return;
      this.#lost.abort(error instanceof AppError ? error : jobGone(error));
    }
  }
}

function jobGone(cause?: unknown): AppError {
  return new AppError('SNAPSHOT_LOST', 'the backup job of the machine ended before its time', { cause });
}
