import { randomUUID } from 'node:crypto';
import { cp, mkdir, readFile, readdir, rename, rm, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { errnoOf, isErrorCode } from '../../src/lib/errors.js';
import { CleanupStack } from '../../src/lib/cleanup.js';
import { pollUntil, withDeadline } from '../../src/lib/deadline.js';
import { runTool, startServer, type ChildServer } from '../../src/lib/process.js';
import { cachePath } from './cache.js';
import type { LabDirectory } from './directory.js';
import { childOf, startNamespace, type LabMount, type LabNamespace } from './namespace.js';
import { pathExists, READY_TIMEOUT_MS } from './server.js';

const VIRSH_TIMEOUT_MS = 60_000;

export interface LabLibvirt extends AsyncDisposable {
  /** `qemu:///system?socket=…` */
  readonly uri: string;
  /** Of libvirtd; another one after `restart()`. */
  readonly pid: number;
  /** Where its directories are for us: `run`, `lib`, `log` (`log/qemu/<domain>.log`), and `libvirtd.log`. */
  readonly directory: string;
  /** Standard output of a virsh command; rejects with its words when it fails. */
  virsh(...args: string[]): Promise<string>;
  define(xml: string): Promise<void>;
  /** SIGKILL of libvirtd only; QEMU goes on. */
  kill(): Promise<void>;
  /** A libvirtd on the same state, after `kill()` or in place of the one that runs. */
  restart(): Promise<void>;
  /** Rejects when the domain has no process. */
  qemuPid(domain: string): Promise<number>;
  /** SIGKILL, and waits until libvirt and the kernel know. */
  killQemu(domain: string): Promise<void>;
  hmp(domain: string, command: string): Promise<string>;
  /** What the command `returns`; rejects with QEMU's words. */
  qmp(domain: string, command: string, args?: Record<string, unknown>): Promise<unknown>;
  /**
   * Writes as the guest would, through filters and bitmaps, running or paused: a qemu-io command such as
   * `write -P 0xaa 0 64k`, `write -zu 1M 64k`, `discard 0 1M`. Rejects when the write fails.
   */
  write(domain: string, target: string, command: string): Promise<void>;
  /** Live migration of a domain whose disks both reach by the same path; it is gone here afterwards. */
  migrate(domain: string, to: LabLibvirt, ...options: string[]): Promise<void>;
  /** Runs a tool where libvirtd runs, with its /run, /var/lib and /etc/libvirt. */
  inside(tool: string, ...args: string[]): Promise<string>;
}

/**
 * A private libvirtd with directories of its own, in `<lab>/<name>`; needs the packages libvirt-daemon and
 * libvirt-daemon-driver-qemu only, no system service, user or configuration. QEMU runs as root. Domains see the
 * machine's files except those under /run, /var/lib, /var/log and /var/cache. Disposal ends libvirtd and everything
 * that it started, and removes the directory. Several can run side by side.
 */
export async function startLibvirt(
  lab: LabDirectory,
  options: { name?: string; hostUuid?: string; qemuConf?: readonly string[]; logsMonitor?: boolean } = {},
): Promise<LabLibvirt> {
  await using undo = new CleanupStack();
  const directory = lab.file(options.name ?? 'lv');
  undo.defer(() => rm(directory, { recursive: true, force: true }));
  await prepareDirectory(directory, options);
  const namespace = undo.use(await startNamespace(mountsOf(directory)));
  const daemon = new Daemon(namespace, directory);
  undo.defer(() => daemon.stop('SIGKILL'));
  await daemon.start();
  await publishCapabilities(directory);
  const steps = undo.move();
  return Object.assign(makeLibvirt(daemon, namespace, directory), {
    [Symbol.asyncDispose]: () => steps.run(),
  });
}

function mountsOf(directory: string): LabMount[] {
  const parents = { run: '/run', lib: '/var/lib', log: '/var/log', cache: '/var/cache' };
  return [
    ...Object.entries(parents).flatMap(([name, parent]): LabMount[] => [
      { tmpfs: parent },
      { bind: path.join(directory, name), over: path.join(parent, 'libvirt') },
    ]),
    { bind: path.join(directory, 'etc'), over: '/etc/libvirt' },
    { bind: path.join(directory, 'passwd'), over: '/etc/passwd' },
    { bind: path.join(directory, 'group'), over: '/etc/group' },
  ];
}

async function prepareDirectory(
  directory: string,
  options: { hostUuid?: string; qemuConf?: readonly string[]; logsMonitor?: boolean },
): Promise<void> {
  for (const name of ['run', 'lib', 'log', 'cache/qemu', 'etc', 's']) {
    await mkdir(path.join(directory, name), { recursive: true });
  }
  const lines = (name: string, text: readonly string[]): Promise<void> =>
    writeFile(path.join(directory, name), `${text.join('\n')}\n`);
  await lines('etc/libvirtd.conf', [
    `unix_sock_dir = "${directory}/s"`,
    'auth_unix_ro = "none"',
    'auth_unix_rw = "none"',
    `host_uuid = "${options.hostUuid ?? randomUUID()}"`,
    `log_outputs = "2:file:${directory}/libvirtd.log"`,
    `log_filters = "${options.logsMonitor === true ? '2' : '3'}:qemu.qemu_monitor"`,
  ]);
  await lines('etc/qemu.conf', [
    ...['user', 'group', 'swtpm_user', 'swtpm_group'].map((key) => `${key} = "root"`),
    ...['namespaces = []', 'cgroup_controllers = []', 'security_driver = "none"', 'stdio_handler = "file"'],
    ...(options.qemuConf ?? []),
  ]);
  // libvirtd looks its default user up, also when another one is configured; libvirt-daemon-system would add it.
  await lines('passwd', [
    (await readFile('/etc/passwd', 'utf8')).trimEnd(),
    'libvirt-qemu:x:64055:64055::/var/lib/libvirt:/usr/sbin/nologin',
  ]);
  await lines('group', [
    (await readFile('/etc/group', 'utf8')).trimEnd(),
    'libvirt-qemu:x:64055:',
    'kvm:x:64056:',
  ]);
  await seedCapabilities(directory);
}

const capabilitiesOf = (directory: string): string => path.join(directory, 'cache/qemu/capabilities');

/** libvirtd asks every QEMU binary what it can (seconds), keeps the answers, and checks itself whether they still hold. */
async function seedCapabilities(directory: string): Promise<void> {
  try {
    await cp(cachePath('qemu-capabilities'), capabilitiesOf(directory), { recursive: true });
  } catch (error) {
    if (errnoOf(error) !== 'ENOENT') throw error;
  }
}

async function publishCapabilities(directory: string): Promise<void> {
  await mkdir(cachePath('qemu-capabilities'), { recursive: true });
  for (const name of await readdir(capabilitiesOf(directory))) {
    const shared = cachePath('qemu-capabilities', name);
    const own = await readFile(path.join(capabilitiesOf(directory), name));
    if ((await pathExists(shared)) && own.equals(await readFile(shared))) continue;
    const temporary = cachePath(`${name}.${randomUUID()}`);
    await writeFile(temporary, own);
    await rename(temporary, shared);
  }
}

class Daemon {
  #pid = -1;
  #server: ChildServer | undefined;

  constructor(
    readonly namespace: LabNamespace,
    readonly directory: string,
  ) {}

  get pid(): number {
    return this.#pid;
  }

  get socketPath(): string {
    return path.join(this.directory, 's/libvirt-sock');
  }

  get uri(): string {
    return `qemu:///system?socket=${this.socketPath}`;
  }

  async start(): Promise<void> {
    await rm(this.socketPath, { force: true });
    const args = ['--config', '/etc/libvirt/libvirtd.conf', '--pid-file', '/run/libvirt/libvirtd.pid'];
    const server = await startServer('nsenter', this.namespace.entering('libvirtd', args), {
      owner: 'lab',
      readyTimeoutMs: READY_TIMEOUT_MS,
      isReady: () => pathExists(this.socketPath),
    });
    this.#server = server;
    const pid = await childOf(server.pid);
    if (pid === undefined) throw new Error(`no libvirtd: ${(await server.exited).stderrTail}`);
    this.#pid = pid;
    // Answers when the QEMU driver is up and knows its QEMU.
    await this.virsh('version');
  }

  /** nsenter does not hand signals on. */
  async stop(signal: NodeJS.Signals): Promise<void> {
    const server = this.#server;
    if (server === undefined || server.hasExited) return;
    process.kill(this.#pid, signal);
    await withDeadline(server.exited, { timeoutMs: READY_TIMEOUT_MS, what: 'libvirtd ending' });
  }

  async virsh(...args: string[]): Promise<string> {
    return (await runTool('virsh', ['--quiet', '-c', this.uri, ...args], { timeoutMs: VIRSH_TIMEOUT_MS }))
      .stdout;
  }
}

function makeLibvirt(
  daemon: Daemon,
  namespace: LabNamespace,
  directory: string,
): Omit<LabLibvirt, typeof Symbol.asyncDispose> {
  const virsh: Virsh = (...args) => daemon.virsh(...args);
  return {
    uri: daemon.uri,
    get pid() {
      return daemon.pid;
    },
    directory,
    virsh,
    kill: () => daemon.stop('SIGKILL'),
    restart: async () => {
      await daemon.stop('SIGTERM');
      await daemon.start();
    },
    ...processCommands(namespace, virsh),
    ...monitorCommands(virsh, directory),
    define: async (xml) => {
      const file = path.join(directory, `${randomUUID()}.xml`);
      await writeFile(file, xml);
      await virsh('define', file);
      await rm(file);
    },
    migrate: async (domain, to, ...options) => {
      const socket = path.join(directory, `${randomUUID().slice(0, 8)}.mig`);
      const args = [domain, to.uri, '--migrateuri', `unix://${socket}`, ...options];
      await virsh('migrate', '--live', '--unsafe', '--persistent', '--undefinesource', ...args);
    },
    inside: async (tool, ...args) =>
      (await runTool('nsenter', namespace.entering(tool, args), { timeoutMs: VIRSH_TIMEOUT_MS })).stdout,
  };
}

type Virsh = LabLibvirt['virsh'];

function processCommands(namespace: LabNamespace, virsh: Virsh): Pick<LabLibvirt, 'qemuPid' | 'killQemu'> {
  const find = async (domain: string): Promise<number | undefined> =>
    (await namespace.processes()).find(({ commandLine }) =>
      commandLine.some((arg) => arg === `guest=${domain}` || arg.startsWith(`guest=${domain},`)),
    )?.pid;
  const qemuPid = async (domain: string): Promise<number> => {
    const pid = await find(domain);
    if (pid === undefined) throw new Error(`domain ${domain} has no process`);
    return pid;
  };
  return {
    qemuPid,
    killQemu: async (domain) => {
      process.kill(await qemuPid(domain), 'SIGKILL');
      await pollUntil(async () => ((await find(domain)) === undefined ? true : undefined), {
        timeoutMs: READY_TIMEOUT_MS,
        what: `the end of the QEMU of ${domain}`,
      });
      const ended = ['shut off', ''];
      await pollUntil(async () => (ended.includes(await stateOf(domain, virsh)) ? true : undefined), {
        timeoutMs: READY_TIMEOUT_MS,
        intervalMs: 50,
        what: `libvirt noticing the end of ${domain}`,
      });
    },
  };
}

/** Empty for a transient domain that is gone, and while no libvirtd runs. */
async function stateOf(domain: string, virsh: Virsh): Promise<string> {
  try {
    return (await virsh('domstate', domain)).trim();
  } catch (error) {
    if (isErrorCode(error, 'TOOL_FAILED')) return '';
    throw error;
  }
}

function monitorCommands(virsh: Virsh, directory: string): Pick<LabLibvirt, 'hmp' | 'qmp' | 'write'> {
  const hmp: LabLibvirt['hmp'] = (domain, command) => virsh('qemu-monitor-command', domain, '--hmp', command);
  const qmp: LabLibvirt['qmp'] = async (domain, command, args = {}) => {
    const text = await virsh(
      'qemu-monitor-command',
      domain,
      JSON.stringify({ execute: command, arguments: args }),
    );
    const answer = JSON.parse(text) as { return?: unknown; error?: { desc: string } };
    if (answer.error !== undefined) throw new Error(`${command}: ${answer.error.desc}`);
    return answer.return;
  };
  return {
    hmp,
    qmp,
    write: async (domain, target, command) => {
      const devices = (await qmp(domain, 'query-block')) as { qdev?: string }[];
      const alias = aliasOf(await virsh('dumpxml', domain), target);
      const device = devices.find(({ qdev }) => qdev?.split('/').includes(alias));
      if (device?.qdev === undefined) throw new Error(`${domain} has no device ${alias}`);
      const log = path.join(directory, 'log/qemu', `${domain}.log`);
      const before = (await readFile(log)).length;
      const refused = (await hmp(domain, `qemu-io -d ${device.qdev} "${command}"`)).trim();
      // What qemu-io prints goes to QEMU's standard output; the monitor says nothing, even of a failed write.
      const said = (await readFile(log)).subarray(before).toString();
      if (refused !== '' || !/^(wrote|discard) /m.test(said)) {
        throw new Error(`${command} on ${target} of ${domain}: ${refused}${said}`);
      }
    },
  };
}

function aliasOf(xml: string, target: string): string {
  const disk = xml
    .split('<disk ')
    .map((part) => part.split('</disk>')[0] ?? '')
    .find((part) => part.includes(`<target dev='${target}'`));
  const alias = /<alias name='([^']+)'/.exec(disk ?? '')?.[1];
  if (alias === undefined) throw new Error(`no disk ${target} in the domain`);
  return alias;
}
