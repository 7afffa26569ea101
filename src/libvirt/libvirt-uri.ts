import { AppError } from '../lib/errors.js';

const MAX_URI_CHARACTERS = 2048;

/** Another host, as ssh is to reach it; null is for ssh's own configuration to say. */
export interface RemoteHost {
  name: string;
  user: string | null;
  port: number | null;
  keyFile: string | null;
  knownHostsFile: string | null;
}

/** Where a hypervisor is reached. Holds no secret. */
export interface LibvirtUri {
  /** Null for a daemon of this host, whatever its socket. */
  host: RemoteHost | null;
  /** The daemon's socket where it is not the usual one. */
  socket: string | null;
}

/**
 * Parameters of libvirt's remote driver (libvirt.org/uri.html) that only say where to connect and as whom. Left
 * out on purpose: `command` and `netcat` run programs, `no_verify` and `known_hosts_verify` trust any host.
 */
const PARAMETERS = new Set(['socket', 'mode', 'keyfile', 'known_hosts', 'no_tty', 'proxy']);
const PATH_PARAMETERS = ['socket', 'keyfile', 'known_hosts'];

function invalid(why: string): AppError {
  return new AppError('INVALID_INPUT', `not a usable libvirt connection: ${why}`, {
    details: { field: 'uri' },
  });
}

/**
 * Parses a connection URI that came from a user: `qemu:///system`, `qemu+unix:///system?socket=…`,
 * `qemu+ssh://user@host/system?keyfile=…`. Rejects with INVALID_INPUT everything else, what would run a
 * program of the caller's choice, and a session daemon for root (it is another user's machine list).
 */
export function parseLibvirtUri(text: string): LibvirtUri {
  const url = parseUrl(text);
  const isRemote = url.protocol === 'qemu+ssh:';
  if (!isRemote && url.protocol !== 'qemu:' && url.protocol !== 'qemu+unix:') {
    throw invalid('its scheme is none of qemu, qemu+unix, qemu+ssh');
  }
  if (url.password !== '') throw invalid('it holds a password');
  if (url.hash !== '') throw invalid('it has a fragment');
  const parameters = readParameters(url);
  checkDaemon(url.pathname, isRemote);
  return {
    host: isRemote ? remoteHost(url, parameters) : noHost(url),
    socket: parameters.get('socket') ?? null,
  };
}

function parseUrl(text: string): URL {
  if (text.length > MAX_URI_CHARACTERS) throw invalid(`longer than ${MAX_URI_CHARACTERS} characters`);
  // eslint-disable-next-line no-control-regex -- a NUL would cut the text short in C
  if (/[\u0000-\u0020\u007f]/.test(text)) throw invalid('it holds spaces or control characters');
  try {
    return new URL(text);
  } catch (error) {
    throw new AppError('INVALID_INPUT', 'not a usable libvirt connection: it cannot be parsed', {
      cause: error,
      details: { field: 'uri' },
    });
  }
}

function readParameters(url: URL): Map<string, string> {
  const parameters = new Map<string, string>();
  for (const [name, value] of url.searchParams) {
    if (!PARAMETERS.has(name)) throw invalid(`it has the parameter ${name.slice(0, 40)}`);
    if (parameters.has(name)) throw invalid(`it has the parameter ${name} twice`);
    // eslint-disable-next-line no-control-regex -- percent-encoded ones come out here
    if (/[\u0000-\u001f]/.test(value)) throw invalid(`its parameter ${name} holds control characters`);
    if (PATH_PARAMETERS.includes(name) && !value.startsWith('/')) {
      throw invalid(`its parameter ${name} is not an absolute path`);
    }
    parameters.set(name, value);
  }
  return parameters;
}

function checkDaemon(path: string, isRemote: boolean): void {
  if (path === '/system') return;
  if (path !== '/session') throw invalid('its path is neither /system nor /session');
  if (isRemote || process.getuid?.() === 0) throw invalid('only /system is supported here');
}

function noHost(url: URL): null {
  if (url.host !== '' || url.username !== '') throw invalid('a host needs the transport ssh (qemu+ssh://)');
  return null;
}

function remoteHost(url: URL, parameters: Map<string, string>): RemoteHost {
  const name = url.hostname.replace(/^\[(.*)\]$/, '$1');
  const user = url.username === '' ? null : url.username;
  // Both become words of ssh's command line.
  if (!/^[0-9A-Za-z][0-9A-Za-z.:_%-]*$/.test(name)) throw invalid('its host name is not one');
  if (user !== null && !/^[0-9A-Za-z_][0-9A-Za-z_.-]*$/.test(user)) throw invalid('its user name is not one');
  return {
    name,
    user,
    port: url.port === '' ? null : Number(url.port),
    keyFile: parameters.get('keyfile') ?? null,
    knownHostsFile: parameters.get('known_hosts') ?? null,
  };
}

/**
 * What virsh may be given. Rejects with INVALID_INPUT what `parseLibvirtUri` does, and another host: virsh would start
 * an ssh of its own, which knows nothing of our files and deadlines and may ask for a password.
 */
export function localUri(text: string): string {
  if (parseLibvirtUri(text).host !== null) throw invalid('virsh is to talk to this host only');
  return text;
}
