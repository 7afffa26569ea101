import { readFile, rm } from 'node:fs/promises';
import { CleanupStack } from '../../src/lib/cleanup.js';
import type { LabDirectory } from './directory.js';
import type { ImageFormat } from './disk-image.js';
import { buildGuest, guestCommandLine, type GuestMode } from './guest.js';
import { answersOnSocket, startLabServer, type LabServer } from './server.js';
import { connectQmp, type QmpClient } from './storage-daemon.js';

export interface QemuDisk {
  path: string;
  format?: ImageFormat;
  serial?: string;
  /** Default `disk0`, `disk1`, …; the node is `<id>-format`. */
  id?: string;
  readonly?: boolean;
  /** The path is that of a block device. */
  isDevice?: boolean;
  /** Puts the disk into an iothread of its own. */
  iothread?: boolean;
}

export interface LabQemu extends LabServer {
  /** For whoever is tested: one client at a time, as QMP is. */
  readonly qmpSocket: string;
  /** Of `org.qemu.guest_agent.0`. */
  readonly agentSocket: string;
  /** The serial console, a file. */
  readonly serialFile: string;
  /** A second monitor, for the test. */
  readonly qmp: QmpClient;
  hmp(command: string): Promise<string>;
  /** Writes as the guest would, running or paused: `write -P 0xaa 0 64k`, `write -zu …`, `discard …`. Rejects when the write fails. */
  write(diskId: string, command: string): Promise<void>;
}

/**
 * A bare QEMU without libvirt, in `<lab>/<name>.*`: without a guest system, or with the real one when `mode` is given.
 * Disposal ends it and removes its sockets.
 */
export async function startQemuGuest(
  lab: LabDirectory,
  options: {
    disks: readonly QemuDisk[];
    name?: string;
    isPaused?: boolean;
    mode?: GuestMode;
    pauseMs?: number;
    extra?: readonly string[];
  },
): Promise<LabQemu> {
  const file = (suffix: string): string => lab.file(`${options.name ?? 'q'}.${suffix}`);
  await using undo = new CleanupStack();
  undo.defer(async () => {
    for (const suffix of ['qmp', 'mon', 'qga']) await rm(file(suffix), { force: true });
  });
  const args = [
    ...['-name', options.name ?? 'q', '-machine', 'q35,accel=tcg', '-display', 'none', '-no-user-config'],
    ...['-nodefaults', '-serial', `file:${file('log')}`, ...(options.isPaused === true ? ['-S'] : [])],
    ...['-qmp', `unix:${file('qmp')},server=on,wait=off`, '-qmp', `unix:${file('mon')},server=on,wait=off`],
    ...['-device', 'virtio-serial-pci', '-chardev', `socket,id=qga,path=${file('qga')},server=on,wait=off`],
    ...['-device', 'virtserialport,chardev=qga,name=org.qemu.guest_agent.0'],
    ...options.disks.flatMap(diskArgs),
    ...(await systemArgs(options)),
    ...(options.extra ?? []),
  ];
  // The output is kept: what qemu-io says goes there, and nowhere else.
  const script = 'out=$1 && shift && exec "$@" >"$out"';
  const server = await startLabServer(
    'sh',
    ['-c', script, 'lab', file('out'), 'qemu-system-x86_64', ...args],
    {
      isReady: () => answersOnSocket(file('mon'), '', /"QMP"/),
      stopTimeoutMs: 10_000,
    },
  );
  const { stop: stopServer } = server;
  undo.defer(stopServer);
  const qmp = undo.use(await connectQmp(file('mon')));
  const steps = undo.move();
  const stop = (): Promise<void> => steps.run();
  return Object.assign(server, {
    qmpSocket: file('qmp'),
    agentSocket: file('qga'),
    serialFile: file('log'),
    qmp,
    ...monitorCommands(qmp, file('out')),
    stop,
    [Symbol.asyncDispose]: stop,
  });
}

/** Without a guest system, QEMU needs next to nothing. */
async function systemArgs(options: { mode?: GuestMode; pauseMs?: number }): Promise<string[]> {
  if (options.mode === undefined) return ['-m', '16'];
  const { kernel, initrd } = await buildGuest();
  const system = ['-m', '128', '-cpu', 'max', '-kernel', kernel, '-initrd', initrd];
  return [...system, '-append', guestCommandLine(options.mode, options.pauseMs)];
}

function diskArgs(disk: QemuDisk, index: number): string[] {
  const { id = `disk${index}`, format = 'qcow2', readonly: isReadOnly = false } = disk;
  const node = {
    'node-name': `${id}-format`,
    driver: format,
    'read-only': isReadOnly,
    discard: 'unmap',
    file: {
      driver: disk.isDevice === true ? 'host_device' : 'file',
      'node-name': `${id}-file`,
      filename: disk.path,
      discard: 'unmap',
    },
  };
  const device = {
    driver: 'virtio-blk-pci',
    id,
    drive: node['node-name'],
    ...(disk.serial === undefined ? {} : { serial: disk.serial }),
    ...(disk.iothread === true ? { iothread: `${id}-io` } : {}),
  };
  const thread = disk.iothread === true ? ['-object', `iothread,id=${id}-io`] : [];
  return [...thread, '-blockdev', JSON.stringify(node), '-device', JSON.stringify(device)];
}

function monitorCommands(qmp: QmpClient, outputFile: string): Pick<LabQemu, 'hmp' | 'write'> {
  const hmp = async (command: string): Promise<string> =>
    (await qmp.execute('human-monitor-command', { 'command-line': command })) as string;
  return {
    hmp,
    write: async (diskId, command) => {
      const before = (await readFile(outputFile)).length;
      const device = `/machine/peripheral/${diskId}/virtio-backend`;
      const refused = (await hmp(`qemu-io -d ${device} "${command}"`)).trim();
      const said = (await readFile(outputFile)).subarray(before).toString();
      if (refused !== '' || !/^(wrote|discard) /m.test(said)) {
        throw new Error(`${command} on ${diskId}: ${refused}${said}`);
      }
    },
  };
}
