import { readFile, stat } from 'node:fs/promises';
import createFetchClient, { type Client } from 'openapi-fetch';
import { errnoOf } from '../lib/errors.js';
import type { components, paths } from '../api/generated.js';
import { CliFailure, EXIT, interruptedFailure } from './failure.js';

export type Schemas = components['schemas'];
export type Api = Client<paths>;

const REQUEST_TIMEOUT_MS = 30_000;
/**
 * Of requests that wait for a hypervisor, perhaps on another host, or for the export daemon. fetch itself gives
 * up after 300 s.
 */
const SLOW_TIMEOUT_MS = 290_000;
const SLOW_ROUTES =
  /^(POST .*\/(vms\/discover|vms\/[^/]+\/release|backups|backups\/estimate|exports)|DELETE .*\/exports\/[^/]+)$/;
const API_PATH = '/api/v1';

export interface ConnectOptions {
  url: string;
  /** The token, or null for the routes that need none. */
  token: string | null;
  signal: AbortSignal;
}

/** A client of the API. Redirects are errors: the token goes to the given address and nowhere else. */
export function connectApi(options: ConnectOptions): Api {
  return createFetchClient<paths>({
    baseUrl: options.url.replace(/\/+$/, '') + API_PATH,
    headers: options.token === null ? {} : { authorization: `Bearer ${options.token}` },
    redirect: 'error',
    fetch: (request) => send(request, options),
  });
}

async function send(request: Request, options: ConnectOptions): Promise<Response> {
  // An event stream lasts as long as its run; whoever reads it watches its silence.
  const isStream = request.url.endsWith('/events');
  const limits = [options.signal, request.signal];
  const isSlow = SLOW_ROUTES.test(`${request.method} ${request.url}`);
  if (!isStream) limits.push(AbortSignal.timeout(isSlow ? SLOW_TIMEOUT_MS : REQUEST_TIMEOUT_MS));
  try {
    return await fetch(request, { signal: AbortSignal.any(limits) });
  } catch (error) {
    if (options.signal.aborted) throw interruptedFailure();
    throw unreachable(options.url, error);
  }
}

export function unreachable(url: string, cause: unknown): CliFailure {
  const inner = cause instanceof Error ? cause.cause : undefined;
  const reason = errnoOf(inner) ?? (cause instanceof Error ? cause.name : 'error');
  return new CliFailure(`the daemon does not answer at ${url} (${reason})`, {
    exitCode: EXIT.unreachable,
    code: 'UNREACHABLE',
    remedy: 'Check that holdfastd is running (systemctl status holdfastd) and that --url names its address.',
    cause,
  });
}

/** The data of an answer; a problem becomes a failure with its code and remedy. */
export function dataOf<T>(answer: { data?: T; error?: unknown; response: Response }): T {
  if (answer.response.ok && answer.data !== undefined) return answer.data;
  throw problemFailure(answer.error, answer.response);
}

/** For answers without content. */
export function expectDone(answer: { error?: unknown; response: Response }): void {
  if (!answer.response.ok) throw problemFailure(answer.error, answer.response);
}

function isProblem(value: unknown): value is Schemas['Problem'] {
  return (
    typeof value === 'object' &&
    value !== null &&
    'code' in value &&
    typeof value.code === 'string' &&
    'detail' in value &&
    typeof value.detail === 'string' &&
    'remedy' in value &&
    typeof value.remedy === 'string'
  );
}

export function problemFailure(problem: unknown, response: Response): CliFailure {
  if (!isProblem(problem)) {
    return new CliFailure(`the answer (HTTP ${response.status}) is not from a Holdfast daemon`, {
      exitCode: EXIT.failed,
      code: 'UNEXPECTED_ANSWER',
      remedy: 'Check that --url names the address of holdfastd.',
    });
  }
  const mismatches = (problem.errors ?? []).map((error) => `${error.path}: ${error.message}`);
  const isUnauthorised = response.status === 401 || response.status === 429;
  return new CliFailure(mismatches.length === 0 ? problem.detail : mismatches.join('; '), {
    exitCode: isUnauthorised ? EXIT.unauthorised : EXIT.failed,
    code: problem.code,
    remedy: problem.remedy,
    details: {
      ...problem.details,
      instance: problem.instance,
      ...(problem.runId === undefined ? {} : { runId: problem.runId }),
    },
  });
}

/** Reads the token of a file. The content is never repeated in a message. */
export async function readToken(file: string, warn: (text: string) => void): Promise<string> {
  let text: string;
  try {
    const { mode } = await stat(file);
    if ((mode & 0o077) !== 0) warn(`the token file ${file} can be read by others; make it mode 0600`);
    text = await readFile(file, 'utf8');
  } catch (error) {
    throw new CliFailure(`the token file ${file} cannot be read (${errnoOf(error) ?? 'error'})`, {
      exitCode: EXIT.unauthorised,
      code: 'UNAUTHENTICATED',
      remedy:
        'Name a readable file with --token-file or HOLDFAST_TOKEN_FILE; the first token is in the state directory of the daemon.',
      cause: error,
    });
  }
  const token = text.trim();
  if (!/^[\x21-\x7e]{1,512}$/.test(token)) {
    throw new CliFailure(`the token file ${file} does not hold a token`, {
      exitCode: EXIT.unauthorised,
      code: 'UNAUTHENTICATED',
      remedy: 'The file must hold the text of one token and nothing else.',
    });
  }
  return token;
}
