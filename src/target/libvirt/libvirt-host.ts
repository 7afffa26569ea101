import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { AppError, toAppError } from '../../lib/errors.js';
import { parseLibvirtUri } from '../../libvirt/libvirt-uri.js';
import { virsh } from '../../libvirt/virsh.js';
import { attributeOf, childAt, childElements, parseXml, rootElement, textOf } from '../../libvirt/xml.js';

export interface LibvirtHostOptions {
  uri: string;
  /** Of one command. */
  timeoutMs: number;
  /** Private directory for the files that hand XML to virsh. */
  directory: string;
  signal: AbortSignal;
}

export interface KnownDomain {
  name: string;
  uuid: string;
}

export interface DomainFacts {
  /** libvirt's word: `shut off`, `running`, … */
  state: string;
  hasManagedSave: boolean;
}

/** What restoring a machine asks of the libvirt of this host. */
export interface LibvirtHost {
  listDomains(): Promise<KnownDomain[]>;
  domainFacts(uuid: string): Promise<DomainFacts>;
  /** The definition the domain starts with next. */
  domainXml(uuid: string): Promise<string>;
  snapshots(uuid: string): Promise<string[]>;
  checkpoints(uuid: string): Promise<string[]>;
  /** Targets of the disks that a checkpoint has a bitmap for. */
  checkpointDisks(uuid: string, name: string): Promise<string[]>;
  /** libvirt forgets the checkpoint; no image is touched. */
  forgetCheckpoint(uuid: string, name: string): Promise<void>;
  /** Emulators that this libvirt would choose itself. */
  emulators(): Promise<Set<string>>;
  /** Path of the directory of an active pool. */
  poolDirectory(name: string): Promise<string>;
  refreshPool(name: string): Promise<void>;
  volumePath(pool: string, volume: string): Promise<string>;
  /** TOOL_FAILED with libvirt's words when it would not take this definition. */
  tryDefinition(xml: string): Promise<void>;
  define(xml: string): Promise<void>;
  /** Takes a definition back, and its NVRAM; one that is not there is no error. */
  undefine(uuid: string): Promise<void>;
  start(uuid: string): Promise<void>;
}

const LIST_DOMAINS = ['list', '--all', '--uuid', '--name'];
/** Pools whose volumes are files in a directory. */
const DIRECTORY_POOLS = ['dir', 'fs', 'netfs'];

/**
 * Talks to the libvirt of this host. INVALID_INPUT for one elsewhere: the disks are written here, and its
 * QEMU would not find them.
 */
export function openLibvirtHost(options: LibvirtHostOptions): LibvirtHost {
  requireLocal(options.uri);
  const run = (...args: string[]): Promise<string> => virsh(args, options);
  const withFile = (xml: string, use: (file: string) => Promise<unknown>): Promise<void> =>
    withXmlFile(options.directory, xml, use);
  return {
    listDomains: async () => parseDomains(await run(...LIST_DOMAINS)),
    domainFacts: async (uuid) => parseFacts(await run('dominfo', '--domain', uuid)),
    domainXml: (uuid) => run('dumpxml', '--domain', uuid, '--inactive', '--security-info'),
    snapshots: async (uuid) => lines(await run('snapshot-list', '--domain', uuid, '--name')),
    checkpoints: async (uuid) => lines(await run('checkpoint-list', '--domain', uuid, '--name')),
    checkpointDisks: async (uuid, name) => {
      const xml = await run('checkpoint-dumpxml', '--domain', uuid, '--checkpointname', name, '--no-domain');
      return parseCheckpointDisks(xml);
    },
    forgetCheckpoint: async (uuid, name) => {
      await run('checkpoint-delete', '--domain', uuid, '--checkpointname', name, '--metadata');
    },
    emulators: async () => parseEmulators(await run('capabilities')),
    poolDirectory: async (name) => {
      const xml = await run('pool-dumpxml', '--pool', name);
      return parsePool(name, { xml, info: await run('pool-info', '--pool', name) });
    },
    refreshPool: async (name) => {
      await run('pool-refresh', '--pool', name);
    },
    volumePath: async (pool, volume) => (await run('vol-path', '--pool', pool, '--vol', volume)).trim(),
    tryDefinition: (xml) =>
      withFile(xml, (file) =>
        asToolFailure(
          'libvirt does not take the machine',
          run('domxml-to-native', '--format', 'qemu-argv', '--xml', file),
        ),
      ),
    define: (xml) =>
      withFile(xml, (file) =>
        asToolFailure('libvirt did not take the machine', run('define', '--file', file)),
      ),
    undefine: async (uuid) => {
      // Also when the run was cancelled.
      const own = { ...options, signal: undefined };
      const domains = parseDomains(await virsh(LIST_DOMAINS, own));
      if (!domains.some((domain) => domain.uuid === uuid)) return;
      await virsh(['undefine', '--domain', uuid, '--nvram'], own);
    },
    start: async (uuid) => {
      await asToolFailure(
        'the machine is restored and defined, but does not start',
        run('start', '--domain', uuid),
      );
    },
  };
}

/** INVALID_INPUT for a libvirt that is not of this host. */
export function requireLocal(uri: string): void {
  if (parseLibvirtUri(uri).host === null) return;
  throw new AppError(
    'INVALID_INPUT',
    'a machine is restored to the libvirt of this host only: run Holdfast on that host, or restore the disks there and define the machine by hand',
    { details: { field: 'uri' } },
  );
}

function lines(text: string): string[] {
  return text
    .split('\n')
    .map((line) => line.trim())
    .filter((line) => line !== '');
}

/** `<uuid> <name>`; a name may hold spaces. */
function parseDomains(text: string): KnownDomain[] {
  return lines(text).map((line) => {
    const [uuid = ''] = line.split(/\s/, 1);
    return { uuid: uuid.toLowerCase(), name: line.slice(uuid.length).trim() };
  });
}

function parseFacts(text: string): DomainFacts {
  const field = (name: string): string => new RegExp(`^${name}:\\s*(.*)$`, 'm').exec(text)?.[1]?.trim() ?? '';
  return { state: field('State'), hasManagedSave: field('Managed save') !== 'no' };
}

function parseCheckpointDisks(xml: string): string[] {
  const disks = childAt(rootElement(parseXml(xml), 'domaincheckpoint'), 'disks');
  return childElements(disks, 'disk')
    .filter((disk) => attributeOf(disk, 'checkpoint') === 'bitmap')
    .map((disk) => attributeOf(disk, 'name') ?? '');
}

function parseEmulators(xml: string): Set<string> {
  const found = new Set<string>();
  for (const guest of childElements(rootElement(parseXml(xml), 'capabilities'), 'guest')) {
    for (const emulator of [...guest.getElementsByTagName('emulator')]) found.add(textOf(emulator) ?? '');
  }
  return found;
}

function parsePool(name: string, { xml, info }: { xml: string; info: string }): string {
  const pool = rootElement(parseXml(xml), 'pool');
  const type = attributeOf(pool, 'type') ?? '';
  const directory = textOf(childAt(pool, 'target', 'path'));
  if (!DIRECTORY_POOLS.includes(type) || directory === null || !path.isAbsolute(directory)) {
    throw new AppError(
      'INVALID_INPUT',
      `pool ${name} is of type ${type}: a machine goes to a pool of type ${DIRECTORY_POOLS.join(', ')}, or to a directory`,
      { details: { field: 'place' } },
    );
  }
  if (!/^State:\s*running$/m.test(info)) {
    throw new AppError('CONFLICT', `pool ${name} is not active: start it with \`virsh pool-start\``);
  }
  return directory;
}

/** Node's pipes cannot be opened as /dev/stdin, so XML goes through a file that nobody else reads. */
async function withXmlFile(
  directory: string,
  xml: string,
  use: (file: string) => Promise<unknown>,
): Promise<void> {
  const own = await mkdtemp(path.join(directory, 'define-'));
  try {
    const file = path.join(own, 'domain.xml');
    await writeFile(file, xml, { mode: 0o600 });
    await use(file);
  } finally {
    await rm(own, { recursive: true, force: true });
  }
}

/** What libvirt refuses here is neither a source nor its permissions. */
async function asToolFailure<T>(what: string, work: Promise<T>): Promise<T> {
  try {
    return await work;
  } catch (error) {
    const { code, message, details } = toAppError(error);
    if (code !== 'SOURCE_REFUSED' && code !== 'NOT_FOUND') throw error;
    throw new AppError('TOOL_FAILED', `${what}: ${message}`, { cause: error, details });
  }
}
