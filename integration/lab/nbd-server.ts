import { rm } from 'node:fs/promises';
import { pathExists, startLabServer, type LabServer } from './server.js';

export interface LabNbdServer extends LabServer {
  /** `nbd+unix:///<export>?socket=<path>` */
  readonly uri: string;
  readonly socketPath: string;
}

export function nbdUnixUri(socketPath: string, exportName = ''): string {
  return `nbd+unix:///${encodeURIComponent(exportName)}?socket=${encodeURIComponent(socketPath)}`;
}

export interface QemuNbdOptions {
  image: string;
  format: 'raw' | 'qcow2';
  /** Where it listens; must not exist. The pid file stands beside it. */
  socketPath: string;
  exportName?: string;
  /** A persistent bitmap of a QCOW2 image, offered as `qemu:dirty-bitmap:<name>`. */
  bitmap?: string;
  isReadOnly?: boolean;
  /** Clients at the same time. Default 8: qemu-nbd's own default of 1 makes a second connection wait for ever. */
  shared?: number;
  /** More arguments, e.g. `--discard=unmap`. */
  extra?: readonly string[];
}

/** A qemu-nbd that stays when clients leave. */
export async function startQemuNbd(options: QemuNbdOptions): Promise<LabNbdServer> {
  const { image, format, socketPath, exportName = '' } = options;
  const args = [
    ...['--persistent', `--shared=${options.shared ?? 8}`, `--socket=${socketPath}`],
    ...[`--format=${format}`, `--pid-file=${socketPath}.pid`, `--export-name=${exportName}`],
    ...(options.bitmap === undefined ? [] : [`--bitmap=${options.bitmap}`]),
    ...(options.isReadOnly === true ? ['--read-only'] : []),
    ...(options.extra ?? []),
    image,
  ];
  return launch('qemu-nbd', args, { socketPath, exportName });
}

export interface NbdkitOptions {
  socketPath: string;
  /** The plugin and its parameters, e.g. `['memory', 'size=1G']`. */
  plugin: readonly string[];
  /** Filters, outermost first, e.g. `['error', 'delay']`; their parameters go into `parameters`. */
  filters?: readonly string[];
  parameters?: readonly string[];
  exportName?: string;
  isReadOnly?: boolean;
  extra?: readonly string[];
}

/** An nbdkit; with its filters, a server with every fault. */
export async function startNbdkit(options: NbdkitOptions): Promise<LabNbdServer> {
  const { socketPath, exportName = '' } = options;
  const args = [
    ...['--foreground', '--exit-with-parent', '--unix', socketPath, '--pidfile', `${socketPath}.pid`],
    ...['--exportname', exportName],
    ...(options.isReadOnly === true ? ['--readonly'] : []),
    ...(options.extra ?? []),
    ...(options.filters ?? []).map((filter) => `--filter=${filter}`),
    ...options.plugin,
    ...(options.parameters ?? []),
  ];
  return launch('nbdkit', args, { socketPath, exportName });
}

/** Both servers write their pid file when they listen, so that no probe takes a client's place. */
async function launch(
  tool: string,
  args: string[],
  options: { socketPath: string; exportName: string },
): Promise<LabNbdServer> {
  const { socketPath, exportName } = options;
  await rm(`${socketPath}.pid`, { force: true });
  const server = await startLabServer(tool, args, { isReady: () => pathExists(`${socketPath}.pid`) });
  const clean = async (): Promise<void> => {
    await rm(`${socketPath}.pid`, { force: true });
    await rm(socketPath, { force: true });
  };
  const stop = async (): Promise<void> => {
    await server.stop();
    await clean();
  };
  return {
    pid: server.pid,
    exited: server.exited,
    get hasExited() {
      return server.hasExited;
    },
    uri: nbdUnixUri(socketPath, exportName),
    socketPath,
    stop,
    kill: async () => {
      await server.kill();
      await clean();
    },
    freeze: () => {
      server.freeze();
    },
    thaw: () => {
      server.thaw();
    },
    [Symbol.asyncDispose]: stop,
  };
}
