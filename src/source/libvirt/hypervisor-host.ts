import { AppError, errnoOf } from '../../lib/errors.js';
import type { RunId } from '../../lib/id.js';

/** Who QEMU runs as there. */
export interface HostUser {
  uid: number;
  gid: number;
}

export interface RunDirectoryRequest {
  /** Absolute. Made when absent; its parent must be there. */
  base: string;
  runId: RunId;
  /** Gets the directory, so that QEMU can make a socket in it, and the files. Null: whoever makes them keeps them. */
  owner: HostUser | null;
  /** Empty qcow2 files of exactly these sizes, made before the directory is handed over. */
  scratch: readonly { name: string; sizeBytes: number }[];
}

export interface Control {
  signal: AbortSignal;
}

/**
 * The host a hypervisor runs on: this one, or one behind ssh. Whoever opened it disposes it. Every method
 * has a deadline of its own and rejects with SOURCE_UNREACHABLE when the host does not answer,
 * SOURCE_REFUSED with the host's own words when it says no, TIMEOUT, or the signal's reason.
 */
export interface HypervisorHost extends AsyncDisposable {
  readonly kind: 'local' | 'ssh';
  /**
   * Makes `<base>/<runId>`, mode 0700, and answers its path on that host. CONFLICT when it is there;
   * CONFIG_INVALID when somebody else could exchange `base` or what is in it. After a refusal nothing is left;
   * after a TIMEOUT or an abort it may come into being still, so its removal is registered before.
   */
  makeRunDirectory(request: RunDirectoryRequest, control: Control): Promise<string>;
  /** Removes it with the files in it; gone already is fine. It has no directories in it: one is an error. */
  removeRunDirectory(where: { base: string; runId: RunId }, control: Control): Promise<void>;
  /**
   * Of the filesystem the directory is in; free is what is free to anybody. Cheap enough to be asked
   * four times a second. Null where the host has no means to tell.
   */
  capacity(directory: string, control: Control): Promise<HostCapacity | null>;
  /** A socket of this host that leads to that host's `socket`: the same, or a forwarded one. */
  reach(socket: string, control: Control): Promise<ReachedSocket>;
  /** Null when there is none. SOURCE_REFUSED when it is larger, or no regular file. */
  readFile(path: string, maxBytes: number, control: Control): Promise<Buffer | null>;
}

export interface HostCapacity {
  totalBytes: number;
  freeBytes: number;
}

/** Disposal ends the forwarding; connections through it end with it. */
export interface ReachedSocket extends AsyncDisposable {
  readonly path: string;
  /** Aborts with SOURCE_UNREACHABLE when it leads nowhere any more. Null where nothing is in between. */
  readonly lost: AbortSignal | null;
}

/** What lstat says about a path, as far as safety needs it. */
export interface PathFacts {
  path: string;
  uid: number;
  /** With the file type, as in st_mode. */
  mode: number;
}

const TYPE_MASK = 0o170000;
const DIRECTORY = 0o040000;
const WRITABLE_BY_OTHERS = 0o022;
const STICKY = 0o1000;
const ENTERABLE_BY_OTHERS = 0o001;

function unsafe(path: string, why: string): AppError {
  return new AppError('CONFIG_INVALID', `the scratch directory cannot be used: ${path} ${why}`, {
    details: { setting: 'snapshot.scratchDirectory', path },
  });
}

/**
 * Rejects with CONFIG_INVALID unless nobody but root and us can put something else in the place of `base`
 * or of a name in it: /var/tmp is for everybody, and a local user may have been there first. `ancestors`
 * are those of its real path, up to the root.
 */
export function checkBase(
  facts: { ownUid: number; base: PathFacts; ancestors: readonly PathFacts[] },
  owner: HostUser | null,
): void {
  const { ownUid, base, ancestors } = facts;
  if ((base.mode & TYPE_MASK) !== DIRECTORY) throw unsafe(base.path, 'is no directory');
  if ((base.mode & WRITABLE_BY_OTHERS) !== 0) throw unsafe(base.path, 'is writable by others');
  for (const { path, uid, mode } of [base, ...ancestors]) {
    if (uid !== 0 && uid !== ownUid) throw unsafe(path, `belongs to user ${uid}`);
    if ((mode & WRITABLE_BY_OTHERS) !== 0 && (mode & STICKY) === 0) {
      throw unsafe(path, 'is writable by others');
    }
    const isForOther = owner !== null && owner.uid !== uid && owner.uid !== 0;
    if (isForOther && (mode & ENTERABLE_BY_OTHERS) === 0) {
      throw unsafe(path, `cannot be entered by the hypervisor's user ${owner.uid}`);
    }
  }
}

/** Absolute, without a step that leads elsewhere than it reads. */
export function checkPath(text: string): string {
  const isPlain = text.startsWith('/') && !text.split('/').some((part) => part === '..' || part === '.');
  // eslint-disable-next-line no-control-regex -- NUL cuts a path short, newlines would forge answers
  if (!isPlain || /[\u0000-\u001f]/.test(text)) {
    throw new AppError('INVALID_INPUT', `not a plain absolute path: ${JSON.stringify(text.slice(0, 200))}`);
  }
  return text;
}

/** Names of scratch files go to a remote shell and to qemu-img. */
export function checkScratch(files: RunDirectoryRequest['scratch']): void {
  for (const { name, sizeBytes } of files) {
    if (!/^[0-9A-Za-z][0-9A-Za-z._-]{0,100}$/.test(name) || !Number.isSafeInteger(sizeBytes)) {
      throw new AppError('INVALID_INPUT', `not a usable scratch file: ${JSON.stringify(name.slice(0, 200))}`);
    }
  }
}

export function directoryExists(path: string, cause?: unknown): AppError {
  return new AppError('CONFLICT', `${path} is there already`, { cause, details: { path } });
}

/** A refusal in the words of the system. */
export function refused(what: string, error: unknown): AppError {
  if (error instanceof AppError) return error;
  const words = errnoOf(error) ?? (error instanceof Error ? error.message : String(error));
  return new AppError('SOURCE_REFUSED', `${what}: ${words}`, { cause: error });
}

export function tooLarge(path: string, maxBytes: number): AppError {
  return new AppError('SOURCE_REFUSED', `${path} is larger than ${maxBytes} bytes`, { details: { path } });
}
