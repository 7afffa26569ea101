import { isIP } from 'node:net';
import type { RawConnect } from './addon.js';
import { NbdError } from './errors.js';
import type { TlsOptions } from './types.js';

/** Longer names than servers accept (4096 bytes for the export), and room for the rest of the URI. */
const MAX_URI_CHARACTERS = 16_384;
/** sizeof(sockaddr_un.sun_path) without the final NUL. */
const MAX_SOCKET_PATH_BYTES = 107;
const SCHEMES = ['nbd:', 'nbds:', 'nbd+unix:', 'nbds+unix:'];
const MAX_TIMEOUT_MS = 24 * 60 * 60 * 1000;

/** An offset or a length: a non-negative safe integer. Throws RangeError. */
export function checkBytes(name: string, value: number): number {
  return checkInteger(name, value, { min: 0, max: Number.MAX_SAFE_INTEGER });
}

export function checkTimeout(name: string, value: number): number {
  return checkInteger(name, value, { min: 1, max: MAX_TIMEOUT_MS });
}

export function checkInteger(name: string, value: number, range: { min: number; max: number }): number {
  if (!Number.isSafeInteger(value) || value < range.min || value > range.max) {
    throw new RangeError(`${name} must be an integer from ${range.min} to ${range.max}`);
  }
  return value;
}

/** A path or name for C: a string without NUL. Throws TypeError. */
export function checkText(name: string, value: string): string {
  if (typeof value !== 'string' || value.includes('\0')) {
    throw new TypeError(`${name} must be a string without NUL`);
  }
  return value;
}

interface Endpoint {
  uri: string;
  metaContexts?: string[];
  tls?: TlsOptions;
}

/** An endpoint as C++ wants it. Throws NbdError NBD_URI_INVALID, whose message never repeats the URI. */
export function toRawConnect(endpoint: Endpoint, connectTimeoutMs: number): RawConnect {
  const tls = endpoint.tls ?? {};
  return {
    uri: endpoint.uri,
    host: hostToResolve(checkUri(endpoint.uri)),
    metaContexts: (endpoint.metaContexts ?? []).map((it) => checkText('a metadata context', it)),
    certificates: checkText('tls.certificates', tls.certificates ?? ''),
    pskFile: checkText('tls.pskFile', tls.pskFile ?? ''),
    username: checkText('tls.username', tls.username ?? ''),
    connectTimeoutMs: checkTimeout('connectTimeoutMs', connectTimeoutMs),
  };
}

function invalidUri(reason: string): NbdError {
  return new NbdError({
    code: 'NBD_URI_INVALID',
    op: 'connect',
    message: `the NBD URI is invalid: ${reason}`,
    errno: 22,
  });
}

function checkUri(uri: string): URL {
  if (typeof uri !== 'string') throw new TypeError('uri must be a string');
  if (uri.length > MAX_URI_CHARACTERS) throw invalidUri(`longer than ${MAX_URI_CHARACTERS} characters`);
  if (/[\0-\x20\x7f]/.test(uri)) throw invalidUri('it holds spaces or control characters');
  if (!URL.canParse(uri)) throw invalidUri('it cannot be parsed');
  const url = new URL(uri);
  if (!SCHEMES.includes(url.protocol))
    throw invalidUri('the scheme must be nbd, nbds, nbd+unix or nbds+unix');
  const socket = url.searchParams.get('socket');
  if (url.protocol.endsWith('+unix:')) {
    if (socket === null || socket === '') throw invalidUri('the socket parameter is missing');
    if (Buffer.byteLength(socket) > MAX_SOCKET_PATH_BYTES) throw invalidUri('the socket path is too long');
  } else if (url.hostname === '') {
    throw invalidUri('the host is missing');
  }
  for (const key of url.searchParams.keys()) {
    // Files are named by whoever calls, never by a text that may come from elsewhere.
    if (key.startsWith('tls-'))
      throw invalidUri(`the parameter ${key} is given with the TLS options instead`);
  }
  if (/%00/.test(uri)) throw invalidUri('it holds a NUL');
  return url;
}

function hostToResolve(url: URL): string {
  if (url.protocol.endsWith('+unix:')) return '';
  const host = decodeURIComponent(url.hostname.replace(/^\[|\]$/g, ''));
  return isIP(host) === 0 ? host : '';
}
