import type { Actor } from '../engine/engine.js';
import type { RunView } from '../engine/types.js';
import { AppError } from '../lib/errors.js';
import { isUlid } from '../lib/id.js';
import type { operations } from './generated.js';

export type OperationId = keyof operations;

type OrEmpty<T> = [T] extends [undefined] ? Record<string, never> : T;
type PathOf<Op extends OperationId> = operations[Op]['parameters'] extends { path: infer P } ? P : unknown;
type QueryOf<Op extends OperationId> = operations[Op]['parameters'] extends { query?: infer Q }
  ? OrEmpty<NonNullable<Q>>
  : unknown;
type BodyOf<Op extends OperationId> = operations[Op] extends {
  requestBody: { content: { 'application/json': infer B } };
}
  ? B
  : operations[Op] extends { requestBody?: { content: { 'application/json': infer B } } }
    ? B | undefined
    : unknown;

/** A request that express-openapi-validator has let through: its parts are as the schema says. */
export interface ApiRequest<Op extends OperationId> {
  params: PathOf<Op>;
  query: QueryOf<Op>;
  body: BodyOf<Op>;
  actor: Op extends 'getHealth' ? null : Actor;
  /** Aborts when the client has left or the server closes. */
  signal: AbortSignal;
}

type ContentOf<R> = R extends { content: { 'application/json': infer B } }
  ? { body: B }
  : R extends { content: { 'text/event-stream': string } }
    ? { stream: AsyncIterable<RunView> }
    : { body?: undefined };

/** One of the successful answers the operation may give. `location` becomes the Location header. */
export type ApiAnswer<Op extends OperationId> = {
  [Status in Exclude<keyof operations[Op]['responses'], 'default'>]: {
    status: Status;
    location?: string;
  } & ContentOf<operations[Op]['responses'][Status]>;
}[Exclude<keyof operations[Op]['responses'], 'default'>];

export type Handler<Op extends OperationId> = (request: ApiRequest<Op>) => Promise<ApiAnswer<Op>>;
export type Handlers = { [Op in OperationId]: Handler<Op> };

/** What the router hands over and gets back, before and after the types of one operation. */
export interface UntypedRequest {
  params: unknown;
  query: unknown;
  body: unknown;
  actor: Actor | null;
  signal: AbortSignal;
}

export interface UntypedAnswer {
  status: number;
  location?: string;
  body?: unknown;
  stream?: AsyncIterable<RunView>;
}

export type UntypedHandler = (request: UntypedRequest) => Promise<UntypedAnswer>;

/** The text as an id of the wanted kind. The schema has checked it already; file names hang on it, so it is checked again. */
export function asId<T extends string>(text: string): T {
  if (!isUlid(text)) throw new AppError('INVALID_INPUT', 'an id is not a ULID');
  return text as T;
}

export function asOptionalId<T extends string>(text: string | null | undefined): T | null {
  return text === undefined || text === null ? null : asId<T>(text);
}

const DEFAULT_LIMIT = 50;

/** Paging parameters with their defaults. */
export function asPage(query: { limit?: number; cursor?: string }): { limit: number; cursor: string | null } {
  return { limit: query.limit ?? DEFAULT_LIMIT, cursor: query.cursor ?? null };
}
