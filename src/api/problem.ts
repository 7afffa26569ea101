import type { ErrorRequestHandler, NextFunction, Request, Response } from 'express';
import { z } from 'zod';
import { AppError, type ErrorCode } from '../lib/errors.js';
import { newUlid } from '../lib/id.js';
import type { Logger } from '../lib/log.js';
import type { components } from './generated.js';

type ProblemBody = components['schemas']['Problem'];

/** Status and title of each code; a code without them does not compile. */
export const PROBLEMS = {
  INVALID_INPUT: { status: 422, title: 'The request does not fit' },
  CONFIG_INVALID: { status: 500, title: 'The configuration is not valid' },
  UNAUTHENTICATED: { status: 401, title: 'A valid token is needed' },
  TOO_MANY_REQUESTS: { status: 429, title: 'Too many failed attempts' },
  HOST_REFUSED: { status: 421, title: 'The Host header is not of this daemon' },
  METHOD_NOT_ALLOWED: { status: 405, title: 'The method is not allowed here' },
  BODY_TOO_LARGE: { status: 413, title: 'The body is too large' },
  MEDIA_TYPE_UNSUPPORTED: { status: 415, title: 'The body is not JSON' },
  NOT_FOUND: { status: 404, title: 'Not found' },
  CONFLICT: { status: 409, title: 'The state does not allow it' },
  IDEMPOTENCY_MISMATCH: { status: 409, title: 'The idempotency key belongs to another request' },
  RUN_ACTIVE: { status: 409, title: 'Another run is active' },
  RUN_NOT_ACTIVE: { status: 409, title: 'The run has ended' },
  INTERRUPTED: { status: 500, title: 'The run was interrupted' },
  REPOSITORY_OFFLINE: { status: 503, title: 'The repository is offline' },
  REPOSITORY_FULL: { status: 507, title: 'The repository is full' },
  REPOSITORY_READ_ONLY: { status: 409, title: 'The repository is read-only' },
  REPOSITORY_LOCKED: { status: 409, title: 'The repository is in use' },
  REPOSITORY_FOREIGN: { status: 409, title: 'The repository belongs to another appliance' },
  REPOSITORY_FORMAT: { status: 409, title: 'The repository format is not known' },
  REPOSITORY_EXISTS: { status: 409, title: 'The repository is already there' },
  REPOSITORY_IO: { status: 500, title: 'The storage of the repository failed' },
  LEASE_LOST: { status: 409, title: 'The lease was lost' },
  MANIFEST_UNREADABLE: { status: 409, title: 'A manifest cannot be read' },
  LAYER_NOT_FOUND: { status: 409, title: 'A layer is missing' },
  LAYER_CORRUPT: { status: 409, title: 'A layer is damaged' },
  CHAIN_BROKEN: { status: 409, title: 'A backing chain is broken' },
  PARENT_MISMATCH: { status: 409, title: 'The change record does not fit the parent' },
  POINT_NOT_FOUND: { status: 404, title: 'The point was not found' },
  POINT_HAS_DEPENDENTS: { status: 409, title: 'Other points stand on this one' },
  POINT_IN_USE: { status: 409, title: 'The point is in use' },
  SOURCE_UNREACHABLE: { status: 502, title: 'The source cannot be reached' },
  SOURCE_REFUSED: { status: 502, title: 'The source refused' },
  SOURCE_SIZE_MISMATCH: { status: 409, title: 'The size of the source differs' },
  SOURCE_FORMAT: { status: 409, title: 'The source has another format' },
  SOURCE_BUSY: { status: 409, title: 'The source is busy' },
  SNAPSHOT_LOST: { status: 409, title: 'The snapshot was lost' },
  SCRATCH_FULL: { status: 507, title: 'The scratch space is full' },
  FREEZE_FAILED: { status: 409, title: 'The guest could not be frozen' },
  BITMAP_MISSING: { status: 409, title: 'The bitmap is missing' },
  BITMAP_INCONSISTENT: { status: 409, title: 'The bitmap is inconsistent' },
  INCREMENTAL_IMPOSSIBLE: { status: 409, title: 'An incremental backup is not possible' },
  NBD_URI_INVALID: { status: 422, title: 'The NBD URI is not valid' },
  NBD_CONNECT: { status: 502, title: 'The NBD server cannot be reached' },
  NBD_PROTOCOL: { status: 502, title: 'The NBD server broke the protocol' },
  NBD_REQUEST: { status: 502, title: 'The NBD server answered an error' },
  NBD_STALLED: { status: 504, title: 'The NBD server stopped answering' },
  NBD_CLOSED: { status: 502, title: 'The NBD connection is closed' },
  EXPORT_DAEMON_UNAVAILABLE: { status: 503, title: 'The export daemon is not there' },
  EXPORT_REFUSED: { status: 409, title: 'The export daemon refused the image' },
  PUSH_SILENT: { status: 504, title: 'The capture agent is silent' },
  PUSH_MISMATCH: { status: 409, title: 'What was pushed does not add up' },
  VOLUME_GONE: { status: 409, title: "The volume's device is gone" },
  VOLUME_MISMATCH: { status: 409, title: 'Another device is there' },
  VOLUME_IN_USE: { status: 409, title: 'The volume is in use' },
  TARGET_EXISTS: { status: 409, title: 'The target is already there' },
  TARGET_TOO_SMALL: { status: 409, title: 'The target is too small' },
  TARGET_IN_USE: { status: 409, title: 'The target is in use' },
  TARGET_NOT_EMPTY: { status: 409, title: 'The target holds data' },
  TARGET_FULL: { status: 507, title: 'The target is full' },
  TARGET_IO: { status: 500, title: 'The target failed' },
  TARGET_FORBIDDEN: { status: 422, title: 'The target is not allowed' },
  QUEUE_UNAVAILABLE: { status: 503, title: 'The queue is not available' },
  DATABASE_UNAVAILABLE: { status: 503, title: 'The database is not available' },
  TOOL_MISSING: { status: 500, title: 'A tool is missing' },
  TOOL_FAILED: { status: 500, title: 'A tool failed' },
  TIMEOUT: { status: 504, title: 'A step took too long' },
  CANCELLED: { status: 409, title: 'Cancelled' },
  INTERNAL: { status: 500, title: 'Internal error' },
} as const satisfies Record<ErrorCode, { status: number; title: string }>;

const RETRY_AFTER_SECONDS = 5;
const MAX_ERRORS = 20;
const MAX_MESSAGE_CHARACTERS = 500;

/** Errors of express, its body parser and the validator: `status`, and sometimes more. */
const httpErrorSchema = z.object({
  status: z.number().int().min(400).max(499),
  type: z.string().optional(),
  message: z.string().default(''),
  errors: z
    .array(z.looseObject({ path: z.string().default(''), message: z.string().default('') }))
    .optional(),
  headers: z.looseObject({ Allow: z.string().optional() }).nullish(),
});

interface Problem {
  error: AppError;
  status: number;
  errors?: { path: string; message: string }[];
  allow?: string;
}

const CODE_BY_STATUS: Record<number, ErrorCode> = {
  404: 'NOT_FOUND',
  405: 'METHOD_NOT_ALLOWED',
  413: 'BODY_TOO_LARGE',
  415: 'MEDIA_TYPE_UNSUPPORTED',
};

function clip(text: string): string {
  return text.length > MAX_MESSAGE_CHARACTERS ? `${text.slice(0, MAX_MESSAGE_CHARACTERS)}…` : text;
}

/** What any error that reaches the edge is to the client. */
function toProblem(error: unknown): Problem {
  if (error instanceof AppError) return { error, status: PROBLEMS[error.code].status };
  const parsed = httpErrorSchema.safeParse(error);
  if (!parsed.success) {
    const internal = new AppError('INTERNAL', 'internal error', { cause: error });
    return { error: internal, status: 500 };
  }
  const { status, type, message, errors, headers } = parsed.data;
  const code = CODE_BY_STATUS[status] ?? 'INVALID_INPUT';
  // A body that is no JSON at all is a bad request; one that does not fit the schema is unprocessable.
  const isSchemaError = code === 'INVALID_INPUT' && type === undefined && errors !== undefined;
  return {
    error: new AppError(code, code === 'INVALID_INPUT' ? clip(message) : PROBLEMS[code].title),
    status: isSchemaError || code !== 'INVALID_INPUT' ? PROBLEMS[code].status : 400,
    ...(isSchemaError
      ? { errors: errors.slice(0, MAX_ERRORS).map((e) => ({ path: clip(e.path), message: clip(e.message) })) }
      : {}),
    ...(headers?.Allow === undefined ? {} : { allow: headers.Allow.toUpperCase() }),
  };
}

function toBody(problem: Problem, instance: string): ProblemBody {
  const { error, status } = problem;
  const { title } = PROBLEMS[error.code];
  const base = {
    type: `urn:holdfast:error:${error.code}`,
    title,
    status,
    instance,
    code: error.code,
    remedy: error.remedy,
  };
  // What happened inside stays inside: the log has it under the instance.
  if (error.code === 'INTERNAL')
    return { ...base, detail: 'The daemon met an error; its log has the details.' };
  const runId = error.details['runId'];
  return {
    ...base,
    detail: error.message,
    ...(typeof runId === 'string' ? { runId } : {}),
    ...(Object.keys(error.details).length === 0 ? {} : { details: error.details }),
    ...(problem.errors === undefined ? {} : { errors: problem.errors }),
  };
}

/** Body of a problem that has no response of its own: the last event of a stream. */
export function describeProblem(error: unknown, logger: Logger): ProblemBody {
  const problem = toProblem(error);
  const instance = `urn:ulid:${newUlid()}`;
  if (problem.status >= 500) logger.error({ err: problem.error, instance }, 'request failed');
  return toBody(problem, instance);
}

function retryAfterSeconds(error: AppError, status: number): number | undefined {
  const seconds = error.details['retryAfterSeconds'];
  if (typeof seconds === 'number') return seconds;
  return status === 503 ? RETRY_AFTER_SECONDS : undefined;
}

/** The last middleware: every error becomes problem+json, and what is our fault is logged once. */
export function problemHandler(logger: Logger): ErrorRequestHandler {
  // eslint-disable-next-line max-params, @typescript-eslint/no-unused-vars -- express tells error handlers by their four parameters
  return (error: unknown, _req: Request, res: Response, _next: NextFunction): void => {
    if (res.headersSent) {
      // The answer is under way and cannot be taken back; cutting it is how the client learns.
      logger.error({ err: error }, 'answer cut');
      res.destroy();
      return;
    }
    const problem = toProblem(error);
    const body = describeProblem(error, logger);
    const wait = retryAfterSeconds(problem.error, problem.status);
    if (wait !== undefined) res.setHeader('Retry-After', String(wait));
    if (problem.allow !== undefined) res.setHeader('Allow', problem.allow);
    if (problem.status === 401) res.setHeader('WWW-Authenticate', 'Bearer');
    // Not res.json: the response validator sits there, and a problem must get out whatever it says.
    res.status(problem.status).type('application/problem+json').end(JSON.stringify(body));
  };
}
