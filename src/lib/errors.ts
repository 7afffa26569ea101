/**
 * The catalogue of everything that can go wrong, by code. A code is part of the API: it appears in
 * problem+json answers, run records, the CLI and docs/reference/errors.md, and a test holds those
 * together. `retryable` says that the same request may succeed later without anybody changing
 * anything; only the queue acts on it. `remedy` is the sentence an administrator reads next.
 */
export const ERROR_CATALOGUE = {
  INVALID_INPUT: { retryable: false, remedy: 'Correct the named field and send the request again.' },
  CONFIG_INVALID: {
    retryable: false,
    remedy: 'Correct the named setting; `holdfast config show` lists all of them.',
  },
  UNAUTHENTICATED: { retryable: false, remedy: 'Send a bearer token made with `holdfast token create`.' },
  TOO_MANY_REQUESTS: {
    retryable: true,
    remedy: 'Wait for the time named in Retry-After, then use a valid token.',
  },
  HOST_REFUSED: {
    retryable: false,
    remedy: 'Use the address the daemon listens on; a proxy must send that as the Host header.',
  },
  METHOD_NOT_ALLOWED: { retryable: false, remedy: 'Use a method named in the Allow header.' },
  BODY_TOO_LARGE: { retryable: false, remedy: 'Send a smaller body.' },
  MEDIA_TYPE_UNSUPPORTED: { retryable: false, remedy: 'Send JSON, with Content-Type application/json.' },
  NOT_FOUND: { retryable: false, remedy: 'List the resources of this kind and use an id from the list.' },
  CONFLICT: { retryable: false, remedy: 'Look at the current state of the resource and decide again.' },
  IDEMPOTENCY_MISMATCH: { retryable: false, remedy: 'Use a new Idempotency-Key for a different request.' },
  RUN_ACTIVE: {
    retryable: false,
    remedy: 'Wait for the running job to end, cancel it, or ask for the request to be queued.',
  },
  RUN_NOT_ACTIVE: { retryable: false, remedy: 'Nothing to do: the run has already ended.' },
  INTERRUPTED: {
    retryable: false,
    remedy: 'The daemon stopped during the run. Its leftovers were removed; start the job again.',
  },

  REPOSITORY_OFFLINE: {
    retryable: true,
    remedy: 'Mount the repository directory; its holdfast.json must be readable.',
  },
  REPOSITORY_FULL: {
    retryable: false,
    remedy: 'Free space in the repository or delete old points; the reserve is kept for merging.',
  },
  REPOSITORY_READ_ONLY: {
    retryable: false,
    remedy: 'Mount the repository read-write and check its permissions.',
  },
  REPOSITORY_LOCKED: {
    retryable: true,
    remedy: 'Another run holds the lease named in the details; wait for it to end.',
  },
  REPOSITORY_FOREIGN: {
    retryable: false,
    remedy: 'The repository belongs to another appliance; take it over explicitly if that one is gone.',
  },
  REPOSITORY_FORMAT: {
    retryable: false,
    remedy: 'Use a Holdfast version that knows this repository format.',
  },
  REPOSITORY_EXISTS: {
    retryable: false,
    remedy: 'Choose an empty directory, or add the existing repository as it is.',
  },
  REPOSITORY_IO: {
    retryable: true,
    remedy: 'Check the storage under the repository; the system error is in the cause.',
  },
  LEASE_LOST: {
    retryable: true,
    remedy: 'Another writer took the lease over; the run was stopped before it changed anything more.',
  },
  MANIFEST_UNREADABLE: {
    retryable: false,
    remedy: 'Run `holdfast repository check`; nothing of this VM is removed until the manifest reads again.',
  },
  LAYER_NOT_FOUND: {
    retryable: false,
    remedy: 'Run `holdfast repository check`; start the next backup as a full.',
  },
  LAYER_CORRUPT: {
    retryable: false,
    remedy:
      'Run `holdfast repository check`; restore from another point and start the next backup as a full.',
  },
  CHAIN_BROKEN: {
    retryable: false,
    remedy: 'Run `holdfast repository check`; start the next backup as a full.',
  },
  PARENT_MISMATCH: {
    retryable: false,
    remedy: 'The change record does not count from the parent layer; run a full backup.',
  },
  POINT_NOT_FOUND: {
    retryable: false,
    remedy: 'List the points with `holdfast backup list` and use an id from the list.',
  },
  POINT_HAS_DEPENDENTS: {
    retryable: false,
    remedy: 'Delete the points listed in the details first, newest first.',
  },
  POINT_IN_USE: {
    retryable: false,
    remedy: 'Wait until the runs named in the details have ended; remove the exports named there.',
  },

  SOURCE_UNREACHABLE: {
    retryable: true,
    remedy: 'Check that the source is running and reachable at the given address.',
  },
  SOURCE_REFUSED: {
    retryable: false,
    remedy: 'Check the export name, TLS settings and permissions on the source.',
  },
  SOURCE_SIZE_MISMATCH: {
    retryable: false,
    remedy:
      'The size differs from what was recorded; ask for the machine anew with `holdfast vm discover` and run again.',
  },
  SOURCE_FORMAT: { retryable: false, remedy: 'State the right image format; Holdfast never guesses one.' },
  SOURCE_BUSY: {
    retryable: true,
    remedy: 'Another backup, migration or block job runs on the machine; wait for it to end.',
  },
  SNAPSHOT_LOST: {
    retryable: true,
    remedy:
      'The machine changed its state or its hypervisor ended the backup job; nothing was kept of the run.',
  },
  SCRATCH_FULL: {
    retryable: false,
    remedy: 'Give snapshot.scratchDirectory more room, or back up when the guest writes less.',
  },
  FREEZE_FAILED: {
    retryable: false,
    remedy: 'Check the guest agent in the guest, or allow a crash-consistent backup with consistency prefer.',
  },
  BITMAP_MISSING: { retryable: false, remedy: 'Run with type auto or full; a full backup needs no bitmap.' },
  BITMAP_INCONSISTENT: {
    retryable: false,
    remedy: 'Run with type auto or full, and make a new bitmap after it.',
  },
  INCREMENTAL_IMPOSSIBLE: {
    retryable: false,
    remedy: 'Run with type auto or full; the reason is in the message.',
  },
  NBD_URI_INVALID: {
    retryable: false,
    remedy: 'Give an NBD URI such as nbd://host:10809/export or nbd+unix:///export?socket=/path.',
  },
  NBD_CONNECT: {
    retryable: true,
    remedy: 'Check that the NBD server is running and reachable at the given address.',
  },
  NBD_PROTOCOL: {
    retryable: true,
    remedy: 'The NBD server broke the protocol or closed the connection; look at its log.',
  },
  NBD_REQUEST: {
    retryable: true,
    remedy: 'The NBD server answered a request with an error; look at its log and at the disk under it.',
  },
  NBD_STALLED: {
    retryable: true,
    remedy: 'The NBD server stopped answering; look at its log and at the network.',
  },
  NBD_CLOSED: { retryable: false, remedy: 'The connection was closed; open a new one.' },

  EXPORT_DAEMON_UNAVAILABLE: {
    retryable: true,
    remedy: 'Start holdfast-exportd; exports.pidFile and exports.statusFile must name its files.',
  },
  EXPORT_REFUSED: {
    retryable: false,
    remedy: 'The export daemon cannot serve the image; `holdfast export status` has its reason.',
  },
  PUSH_SILENT: {
    retryable: false,
    remedy: 'The capture agent said nothing for too long; look at its messages and start the backup again.',
  },
  PUSH_MISMATCH: {
    retryable: false,
    remedy: 'What was written is not what the agent says it sent; start the backup again.',
  },
  VOLUME_GONE: {
    retryable: false,
    remedy: 'Connect the device, or release the volume with `holdfast volume detach`.',
  },
  VOLUME_MISMATCH: {
    retryable: false,
    remedy:
      'Another device is where the volume was; look at `holdfast volume show` before anything is written.',
  },
  VOLUME_IN_USE: {
    retryable: false,
    remedy: 'End what the details name (a mount, an export, a run), then try again.',
  },

  TARGET_EXISTS: { retryable: false, remedy: 'Choose another path, or allow overwriting.' },
  TARGET_TOO_SMALL: { retryable: false, remedy: 'Choose a target at least as large as the disk.' },
  TARGET_IN_USE: {
    retryable: false,
    remedy: 'Unmount or release the device first; a mounted device is never written.',
  },
  TARGET_NOT_EMPTY: {
    retryable: false,
    remedy: 'The target already holds data; allow overwriting if it may be lost.',
  },
  TARGET_FULL: { retryable: false, remedy: 'Free space where the restore is written.' },
  TARGET_IO: { retryable: false, remedy: 'Check the target; the system error is in the cause.' },
  TARGET_FORBIDDEN: {
    retryable: false,
    remedy: 'Choose a path outside the repositories and the daemon state.',
  },

  QUEUE_UNAVAILABLE: { retryable: true, remedy: 'Check that Redis is running and reachable.' },
  DATABASE_UNAVAILABLE: { retryable: true, remedy: 'Check that the database is running and reachable.' },
  TOOL_MISSING: {
    retryable: false,
    remedy: 'Install the named tool; `holdfast doctor` lists what is missing.',
  },
  TOOL_FAILED: { retryable: false, remedy: 'The message of the tool is in the details.' },
  TIMEOUT: { retryable: true, remedy: 'The step did not end in its time; look at what it waited for.' },
  CANCELLED: { retryable: false, remedy: 'The run was cancelled; nothing to do.' },
  INTERNAL: { retryable: false, remedy: 'This is a fault in Holdfast; keep the log and report it.' },
} as const satisfies Record<string, { retryable: boolean; remedy: string }>;

export type ErrorCode = keyof typeof ERROR_CATALOGUE;
export const ERROR_CODES = Object.keys(ERROR_CATALOGUE) as ErrorCode[];

/** Facts that go with an error. They reach API answers and run records: never put a secret here. */
export type ErrorDetails = Record<string, unknown>;

export interface AppErrorOptions {
  cause?: unknown;
  details?: ErrorDetails;
  /** Overrides the catalogue where one occurrence is known to be permanent, or to pass. */
  retryable?: boolean;
}

/** The one error type that crosses a module boundary. The message names the cause in one sentence. */
export class AppError extends Error {
  override readonly name: string = 'AppError';
  readonly code: ErrorCode;
  readonly retryable: boolean;
  readonly details: ErrorDetails;

  constructor(code: ErrorCode, message: string, options: AppErrorOptions = {}) {
    super(message, options.cause === undefined ? undefined : { cause: options.cause });
    this.code = code;
    this.retryable = options.retryable ?? ERROR_CATALOGUE[code].retryable;
    this.details = options.details ?? {};
  }

  get remedy(): string {
    return ERROR_CATALOGUE[this.code].remedy;
  }
}

/**
 * Any thrown value as an AppError; what is not one already becomes INTERNAL with the value as its cause. Of a
 * failure whose cleanup failed too (`await using` makes a SuppressedError of them), the first one counts.
 */
export function toAppError(error: unknown): AppError {
  if (error instanceof AppError) return error;
  if (error instanceof Error && 'suppressed' in error) return toAppError(error.suppressed);
  const message = error instanceof Error ? error.message : String(error);
  return new AppError('INTERNAL', message, { cause: error });
}

export function isErrorCode(error: unknown, ...codes: ErrorCode[]): boolean {
  return error instanceof AppError && codes.includes(error.code);
}

/** The errno name (`ENOSPC`, …) of a system error, or undefined when it is none. */
export function errnoOf(error: unknown): string | undefined {
  if (!(error instanceof Error) || !('code' in error)) return undefined;
  return typeof error.code === 'string' ? error.code : undefined;
}
