import { randomBytes } from 'node:crypto';

/** Crockford base 32, as in the ULID specification (github.com/ulid/spec). */
const ALPHABET = '0123456789ABCDEFGHJKMNPQRSTVWXYZ';
const ULID_PATTERN = /^[0-7][0-9A-HJKMNP-TV-Z]{25}$/;

declare const brand: unique symbol;
type Id<Kind extends string> = string & { readonly [brand]: Kind };

export type RepositoryId = Id<'repository'>;
export type ApplianceId = Id<'appliance'>;
export type VmId = Id<'vm'>;
export type DiskId = Id<'disk'>;
export type PointId = Id<'point'>;
export type LayerId = Id<'layer'>;
export type RunId = Id<'run'>;
export type TokenId = Id<'token'>;
export type ExportId = Id<'export'>;
export type VolumeId = Id<'volume'>;

/** Makes ids. Injected, so that tests can fix them. */
export type IdSource = () => string;

/**
 * A new ULID: 48 bits of milliseconds and 80 random bits, 26 characters, upper case. Unique without
 * coordination; the time in it is a hint for people and never used to order points.
 */
export function newUlid(nowMs: number = Date.now()): string {
  let text = '';
  let time = nowMs;
  for (let i = 0; i < 10; i += 1) {
    text = ALPHABET.charAt(time % 32) + text;
    time = Math.floor(time / 32);
  }
  for (const byte of randomBytes(16)) text += ALPHABET.charAt(byte % 32);
  return text;
}

export function newId<T extends string>(nowMs?: number): T {
  return newUlid(nowMs) as T;
}

/** True for the canonical form only: ids become file names, so nothing else is let through. */
export function isUlid(text: string): boolean {
  return ULID_PATTERN.test(text);
}
