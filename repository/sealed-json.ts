import { createHash } from 'node:crypto';
import { z } from 'zod';
import { AppError } from '../src/lib/errors.js';
import { isUlid } from '../src/lib/id.js';

/**
 * JSON files of the repository carry their own SHA-256 as the last field, `digest`. It covers the
 * canonical form of everything else: keys sorted by UTF-16 code unit at every level, no whitespace,
 * strings and numbers as JSON.stringify writes them (RFC 8785 for the values that occur here).
 */
export function canonicalJson(value: unknown): string {
  return JSON.stringify(sortKeys(value));
}

/** Deeper than any file of the format; a hostile file must not exhaust the stack. */
const MAX_DEPTH = 32;

function sortKeys(value: unknown, depth = 0): unknown {
  if (depth > MAX_DEPTH) throw new RangeError('it is nested too deeply');
  if (Array.isArray(value)) return value.map((item) => sortKeys(item, depth + 1));
  if (typeof value !== 'object' || value === null) return value;
  // Entries, not assignment: a key `__proto__` of a hostile file must stay an ordinary key.
  const entries = Object.entries(value).filter(([, item]) => item !== undefined);
  entries.sort(([a], [b]) => (a < b ? -1 : a > b ? 1 : 0));
  return Object.fromEntries(entries.map(([key, item]) => [key, sortKeys(item, depth + 1)]));
}

export function sha256Hex(data: Buffer | string): string {
  return createHash('sha256').update(data).digest('hex');
}

/** The bytes of a sealed file: readable JSON with the digest at its end. */
export function sealJson(value: object): Buffer {
  const body = sortKeys(value) as object;
  return Buffer.from(`${JSON.stringify({ ...body, digest: sha256Hex(canonicalJson(value)) }, null, 2)}\n`);
}

export type SealedResult<T> = { ok: true; value: T } | { ok: false; problem: string; formatVersion?: number };

/** Reads a sealed file: form, digest, then the schema. Never throws: what is wrong is an answer. */
export function unsealJson<T>(data: Buffer, schema: z.ZodType<T>): SealedResult<T> {
  let body: Record<string, unknown>;
  try {
    const parsed: unknown = JSON.parse(data.toString('utf8'));
    if (typeof parsed !== 'object' || parsed === null || Array.isArray(parsed)) {
      return { ok: false, problem: 'it is not a JSON object' };
    }
    const { digest, ...rest } = parsed as Record<string, unknown>;
    if (digest !== sha256Hex(canonicalJson(rest))) {
      return { ok: false, problem: 'its digest does not match its content' };
    }
    body = rest;
  } catch (error) {
    return { ok: false, problem: error instanceof Error ? error.message : 'it is not JSON' };
  }
  const version = typeof body['formatVersion'] === 'number' ? { formatVersion: body['formatVersion'] } : {};
  const result = schema.safeParse(body);
  if (result.success) return { ok: true, value: result.data };
  const issue = result.error.issues[0];
  return {
    ok: false,
    problem: `${issue?.path.join('.') ?? ''}: ${issue?.message ?? 'bad form'}`,
    ...version,
  };
}

/** As `unsealJson`; throws REPOSITORY_FORMAT for a newer format, else `code`. */
export function requireSealed<T>(
  data: Buffer,
  options: {
    schema: z.ZodType<T>;
    what: string;
    formatVersion: number;
    code: 'MANIFEST_UNREADABLE' | 'REPOSITORY_FORMAT';
  },
): T {
  const result = unsealJson(data, options.schema);
  if (result.ok) return result.value;
  const isNewer = (result.formatVersion ?? 0) > options.formatVersion;
  if (isNewer) {
    throw new AppError('REPOSITORY_FORMAT', `${options.what} is of a newer format`, {
      details: { file: options.what, formatVersion: result.formatVersion },
    });
  }
  throw new AppError(options.code, `${options.what} cannot be read: ${result.problem}`, {
    details: { file: options.what, problem: result.problem },
  });
}

/** A ULID as the branded id it is used as. */
export function idSchema<T extends string>(): z.ZodType<T> {
  return z.custom<T>((value) => typeof value === 'string' && isUlid(value), 'is not a ULID');
}

export const sizeSchema = z.number().int().nonnegative().max(Number.MAX_SAFE_INTEGER);
export const sha256Schema = z.string().regex(/^[0-9a-f]{64}$/);
export const timestampSchema = z.iso.datetime();
