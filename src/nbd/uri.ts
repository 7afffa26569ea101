import { AppError } from '../lib/errors.js';

const MAX_URI_CHARACTERS = 4096;
const SCHEMES = new Map([
  ['nbd:', { transport: 'tcp', isTls: false }],
  ['nbds:', { transport: 'tcp', isTls: true }],
  ['nbd+unix:', { transport: 'unix', isTls: false }],
  ['nbds+unix:', { transport: 'unix', isTls: true }],
] as const);

export interface NbdUri {
  /** The URI as given, safe to hand to libnbd. */
  text: string;
  isTls: boolean;
  /** Export name, '' for the default one. */
  exportName: string;
  /** Where and what, without user names: the same disk always gives the same text. */
  identity: string;
}

function invalid(why: string): AppError {
  return new AppError('NBD_URI_INVALID', `not a usable NBD URI: ${why}`);
}

/**
 * Parses an NBD URI (github.com/NetworkBlockDevice/nbd, doc/uri.md). Rejects with NBD_URI_INVALID what
 * is malformed, and URI parameters other than `socket`: files named inside a URI (`tls-psk-file`) are
 * settings of the disk, not part of the address.
 */
export function parseNbdUri(text: string): NbdUri {
  if (text.length > MAX_URI_CHARACTERS) throw invalid(`longer than ${MAX_URI_CHARACTERS} characters`);
  // eslint-disable-next-line no-control-regex -- a NUL would cut the text short in C
  if (/[\u0000-\u0020\u007f]/.test(text)) throw invalid('it holds spaces or control characters');
  let url: URL;
  try {
    url = new URL(text);
  } catch (error) {
    throw new AppError('NBD_URI_INVALID', 'not a usable NBD URI: it cannot be parsed', { cause: error });
  }
  const scheme = [...SCHEMES].find(([name]) => name === url.protocol)?.[1];
  if (scheme === undefined) throw invalid('its scheme is none of nbd, nbds, nbd+unix, nbds+unix');
  if (url.password !== '') throw invalid('it holds a password');
  for (const name of url.searchParams.keys()) {
    if (name !== 'socket') throw invalid(`it has the parameter ${name.slice(0, 40)}`);
  }
  const exportName = decodeExport(url);
  const place = scheme.transport === 'unix' ? unixPlace(url) : tcpPlace(url);
  return { text, isTls: scheme.isTls, exportName, identity: `nbd:${place}#${exportName}` };
}

/**
 * The export `name` at an address, which is an NBD URI without an export: a tunnel's end, another interface.
 * NBD_URI_INVALID when it has one.
 */
export function exportAt(address: string, name: string): string {
  if (parseNbdUri(address).exportName !== '') throw invalid('an address has no export name');
  const url = new URL(address);
  url.pathname = `/${encodeURIComponent(name)}`;
  return url.href;
}

function decodeExport(url: URL): string {
  try {
    const name = decodeURIComponent(url.pathname.replace(/^\//, ''));
    if (name.includes('\u0000')) throw invalid('its export name holds a NUL');
    return name;
  } catch (error) {
    if (error instanceof AppError) throw error;
    throw new AppError('NBD_URI_INVALID', 'not a usable NBD URI: bad percent-encoding', { cause: error });
  }
}

function unixPlace(url: URL): string {
  const socket = url.searchParams.get('socket');
  if (socket === null || !socket.startsWith('/') || socket.includes('\u0000')) {
    throw invalid('a Unix URI needs ?socket=/absolute/path');
  }
  if (url.host !== '') throw invalid('a Unix URI has no host');
  return `unix:${socket}`;
}

function tcpPlace(url: URL): string {
  if (url.hostname === '') throw invalid('it names no host');
  if (url.searchParams.has('socket')) throw invalid('a TCP URI has no socket');
  return `tcp:${url.hostname}:${url.port === '' ? '10809' : url.port}`;
}
