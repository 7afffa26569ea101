import { readFile, readlink } from 'node:fs/promises';
import { hostname } from 'node:os';
import { z } from 'zod';
import { toTimestamp, type Clock } from '../src/lib/clock.js';
import { throwIfAborted } from '../src/lib/deadline.js';
import { AppError } from '../src/lib/errors.js';
import { newUlid, type ApplianceId, type RunId } from '../src/lib/id.js';
import { isSameProcess, processStartTime } from '../src/lib/process.js';
import type { Backend } from './backend.js';
import { leaseDirectory } from './layout.js';
import { idSchema, sealJson, sizeSchema, timestampSchema, unsealJson } from './sealed-json.js';

export interface LeaseHolder {
  runId: RunId;
  /** For people: what the holder does (`backup`, `delete`, …). */
  purpose: string;
}

/** A held lease. Renewed in the background until released. */
export interface Lease extends AsyncDisposable {
  readonly vmId: string;
  /** Grows with each acquisition; a writer whose token is not the newest is refused. */
  readonly token: number;
  /** Aborts with LEASE_LOST when renewal finds another holder. */
  readonly lost: AbortSignal;
  /** Rejects with LEASE_LOST unless this lease is still the newest on disk. */
  verify(): Promise<void>;
  release(): Promise<void>;
}

export interface LeaseTerms {
  renewMs: number;
  /** A lease that was not renewed for this long may be taken over. */
  expiryMs: number;
}

export const DEFAULT_LEASE_TERMS: LeaseTerms = { renewMs: 10_000, expiryMs: 60_000 };

/** Older token files kept, so that a listing that races with acquisitions still meets the newest. */
const KEPT_TOKENS = 4;
const MAX_CLAIM_ATTEMPTS = 16;

const holderSchema = z.strictObject({
  applianceId: idSchema<ApplianceId>(),
  runId: idSchema<RunId>(),
  purpose: z.string().max(256),
  pid: sizeSchema,
  startTime: z.string().max(64),
  hostname: z.string().max(256),
  bootId: z.string().max(64),
  pidNamespace: z.string().max(64),
  acquiredAt: timestampSchema,
  expiresAt: timestampSchema,
});

const leaseFileSchema = z.strictObject({
  token: sizeSchema.min(1),
  /** Tells two acquisitions apart whatever else is the same. */
  nonce: idSchema<string>(),
  /** null after a release: the file stays, so that tokens grow for ever. */
  holder: holderSchema.nullable(),
});

type LeaseFile = z.infer<typeof leaseFileSchema>;
type StoredHolder = z.infer<typeof holderSchema>;

export interface LeaseContext {
  backend: Backend;
  clock: Clock;
  applianceId: ApplianceId;
  terms: LeaseTerms;
}

/**
 * Takes the lease called `name` (`vm-<id>`, `repository`). The newest token is the file with the highest
 * number in `locks/<name>/`; a token is taken by creating the next number exclusively, so of several
 * takers exactly one wins. REPOSITORY_LOCKED names the holder when it is alive.
 */
export async function acquireLease(context: LeaseContext, name: string, holder: LeaseHolder): Promise<Lease> {
  const { backend } = context;
  await backend.makeDirectory(leaseDirectory(name));
  const process = await describeProcess();
  for (let attempt = 0; attempt < MAX_CLAIM_ATTEMPTS; attempt += 1) {
    const newest = await newestToken(backend, name);
    await requireFree(context, name, newest);
    const file: LeaseFile = {
      token: newest + 1,
      nonce: newUlid(context.clock.nowMs()),
      holder: makeHolder(context, holder, process),
    };
    const lease = await claimToken(context, name, file);
    if (lease !== undefined) return lease;
  }
  throw new AppError('REPOSITORY_LOCKED', 'others take this lease all the time', {
    details: { lease: name },
  });
}

async function claimToken(context: LeaseContext, name: string, file: LeaseFile): Promise<Lease | undefined> {
  const { backend } = context;
  let lease: Lease | undefined;
  // Before the file is there: another taker in this process must not think it was let go.
  heldHere.add(file.nonce);
  try {
    if (!(await backend.createExclusive(tokenFile(name, file.token), sealJson(file)))) return undefined;
    // A taker that slept since its listing may have created a number that others have long passed.
    if ((await newestToken(backend, name)) !== file.token) {
      await backend.remove(tokenFile(name, file.token));
      return undefined;
    }
    await removeOldTokens(backend, name, file.token);
    lease = startLease(context, name, file);
    return lease;
  } finally {
    if (lease === undefined) heldHere.delete(file.nonce);
  }
}

const tokenFile = (name: string, token: number): string =>
  `${leaseDirectory(name)}/${String(token).padStart(16, '0')}.json`;

async function listTokens(backend: Backend, name: string): Promise<number[]> {
  const entries = (await backend.list(leaseDirectory(name))) ?? [];
  return entries
    .filter((entry) => /^\d{16}\.json$/.test(entry.name))
    .map((entry) => Number(entry.name.slice(0, 16)));
}

async function newestToken(backend: Backend, name: string): Promise<number> {
  return Math.max(0, ...(await listTokens(backend, name)));
}

async function removeOldTokens(backend: Backend, name: string, token: number): Promise<void> {
  for (const old of await listTokens(backend, name)) {
    if (old <= token - KEPT_TOKENS) await backend.remove(tokenFile(name, old));
  }
}

async function readToken(backend: Backend, name: string, token: number): Promise<LeaseFile | undefined> {
  const data = await backend.read(tokenFile(name, token), { maxBytes: 65536 });
  if (data === undefined) return undefined;
  const result = unsealJson(data, leaseFileSchema);
  return result.ok ? result.value : undefined;
}

async function requireFree(context: LeaseContext, name: string, token: number): Promise<void> {
  if (token === 0) return;
  const file = await readToken(context.backend, name, token);
  if (file === undefined) {
    // Unreadable, or just replaced: alive on doubt until the file has not been renewed for the whole term.
    const facts = await context.backend.stat(tokenFile(name, token));
    if (facts === undefined || facts.modifiedMs + context.terms.expiryMs < context.clock.nowMs()) return;
    throw new AppError('REPOSITORY_LOCKED', 'a lease that cannot be read is in the way', {
      details: { lease: name },
    });
  }
  const { holder } = file;
  if (holder === null || (await isDead(context, { holder, nonce: file.nonce }))) return;
  throw new AppError(
    'REPOSITORY_LOCKED',
    `held for ${holder.purpose} by process ${holder.pid} on ${holder.hostname}`,
    {
      details: {
        lease: name,
        token,
        runId: holder.runId,
        purpose: holder.purpose,
        applianceId: holder.applianceId,
        hostname: holder.hostname,
        pid: holder.pid,
        expiresAt: holder.expiresAt,
      },
    },
  );
}

/** Nonces of the leases that this process holds. */
const heldHere = new Set<string>();

/**
 * Expired, or provably gone: a process of this very boot and pid namespace that no longer runs, or this
 * process itself, which knows that it let go although the repository was away and could not be told.
 */
async function isDead(
  context: LeaseContext,
  { holder, nonce }: { holder: StoredHolder; nonce: string },
): Promise<boolean> {
  if (Date.parse(holder.expiresAt) < context.clock.nowMs()) return true;
  const here = await describeProcess();
  const isHere =
    holder.hostname === here.hostname &&
    holder.bootId === here.bootId &&
    holder.pidNamespace === here.pidNamespace;
  if (!isHere) return false;
  if (holder.pid === here.pid && holder.startTime === here.startTime) return !heldHere.has(nonce);
  return !(await isSameProcess(holder));
}

type ProcessFacts = Pick<StoredHolder, 'pid' | 'startTime' | 'hostname' | 'bootId' | 'pidNamespace'>;

async function describeProcess(): Promise<ProcessFacts> {
  const startTime = await processStartTime(process.pid);
  return {
    pid: process.pid,
    startTime: startTime ?? '',
    hostname: hostname(),
    bootId: (await readFile('/proc/sys/kernel/random/boot_id', 'utf8')).trim(),
    pidNamespace: await readlink('/proc/self/ns/pid'),
  };
}

function makeHolder(context: LeaseContext, holder: LeaseHolder, process: ProcessFacts): StoredHolder {
  const nowMs = context.clock.nowMs();
  return {
    applianceId: context.applianceId,
    runId: holder.runId,
    purpose: holder.purpose,
    ...process,
    acquiredAt: toTimestamp(nowMs),
    expiresAt: toTimestamp(nowMs + context.terms.expiryMs),
  };
}

function startLease(context: LeaseContext, name: string, file: LeaseFile): Lease {
  return new HeldLease(context, name, file);
}

class HeldLease implements Lease {
  readonly vmId: string;
  readonly token: number;
  readonly #context: LeaseContext;
  readonly #name: string;
  readonly #loss = new AbortController();
  #file: LeaseFile;
  #renewedMs: number;
  #timer: NodeJS.Timeout | undefined;
  #renewal: Promise<void> = Promise.resolve();
  #release: Promise<void> | undefined;

  constructor(context: LeaseContext, name: string, file: LeaseFile) {
    this.#context = context;
    this.#name = name;
    this.#file = file;
    this.vmId = name.replace(/^vm-/, '');
    this.token = file.token;
    this.#renewedMs = context.clock.monotonicMs();
    this.#schedule();
  }

  get lost(): AbortSignal {
    return this.#loss.signal;
  }

  async verify(): Promise<void> {
    throwIfAborted(this.#loss.signal);
    if (this.#release !== undefined) throw this.#lostError('the lease was released');
    const newest = await newestToken(this.#context.backend, this.#name);
    const current =
      newest === this.token ? await readToken(this.#context.backend, this.#name, newest) : undefined;
    if (current?.nonce === this.#file.nonce) return;
    const error = this.#lostError('another writer has taken the lease');
    this.#loss.abort(error);
    throw error;
  }

  release(): Promise<void> {
    return (this.#release ??= this.#releaseOnce());
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.release();
  }

  async #releaseOnce(): Promise<void> {
    clearTimeout(this.#timer);
    await this.#renewal;
    heldHere.delete(this.#file.nonce);
    if (this.#loss.signal.aborted) return;
    // Only this token's own file is written, so a newer holder is not touched.
    const file: LeaseFile = { ...this.#file, holder: null };
    await this.#context.backend.writeDurable(tokenFile(this.#name, this.token), sealJson(file));
  }

  #schedule(): void {
    this.#timer = setTimeout(() => {
      this.#renewal = this.#renew();
    }, this.#context.terms.renewMs);
    this.#timer.unref();
  }

  /** Never rejects: a loss is told through the signal, a passing failure is tried again until the term ends. */
  async #renew(): Promise<void> {
    try {
      await this.verify();
      await this.#extend();
      this.#renewedMs = this.#context.clock.monotonicMs();
    } catch (error) {
      if (this.#context.clock.monotonicMs() - this.#renewedMs >= this.#context.terms.expiryMs) {
        this.#loss.abort(this.#lostError('the lease could not be renewed in time', error));
      }
    }
    if (!this.#loss.signal.aborted && this.#release === undefined) this.#schedule();
  }

  async #extend(): Promise<void> {
    const { holder } = this.#file;
    if (holder === null) return;
    const expiresAt = toTimestamp(this.#context.clock.nowMs() + this.#context.terms.expiryMs);
    this.#file = { ...this.#file, holder: { ...holder, expiresAt } };
    await this.#context.backend.writeDurable(tokenFile(this.#name, this.token), sealJson(this.#file));
  }

  #lostError(message: string, cause?: unknown): AppError {
    return new AppError('LEASE_LOST', message, { cause, details: { lease: this.#name, token: this.token } });
  }
}
