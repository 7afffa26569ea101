import { readFile } from 'node:fs/promises';
import path from 'node:path';
import type { LabDirectory } from '../../../integration/lab/directory.js';
import { startGuest, type GuestConsole } from '../../../integration/lab/guest.js';
import { startLibvirt, type LabLibvirt } from '../../../integration/lab/libvirt.js';
import { CleanupStack } from '../../../src/lib/cleanup.js';
import { pollUntil } from '../../../src/lib/deadline.js';
import { AppError } from '../../../src/lib/errors.js';
import { bytesOf, changeCommands, makeImage, type DiskSize } from './source-disk.js';
import { median, percentile } from './usage.js';

/** Milliseconds of the guest's own durable writes of 4 KiB. */
export interface GuestWrites {
  p50: number;
  p95: number;
}

const TARGET = 'vda';
const ALIAS = 'virtio-disk0';
/** Between two of the guest's writes: enough of them for a percentile of a backup of a second. */
const GUEST_PAUSE_MS = 2;
/** Below the limit of one argument, 128 KiB. */
const COMMANDS_A_CALL = 250;
const GUEST_TIMEOUT_MS = 60_000;

/**
 * A domain under a private libvirtd whose guest writes to its one disk whenever it is not suspended, at random
 * places of the disk. It is made suspended, and each step leaves it so.
 */
export class LiveDomain implements AsyncDisposable {
  readonly name = 'bench';

  private constructor(
    readonly image: string,
    readonly libvirt: LabLibvirt,
    private readonly console: GuestConsole,
    private readonly sizeBytes: number,
  ) {}

  static async start(directory: string, size: DiskSize): Promise<LiveDomain> {
    const file = (...names: string[]): string => path.join(directory, ...names);
    const lab: LabDirectory = { path: directory, file, [Symbol.asyncDispose]: () => Promise.resolve() };
    await using undo = new CleanupStack();
    const image = file('live.qcow2');
    await makeImage(image, size);
    const libvirt = undo.use(await startLibvirt(lab));
    const { console } = await startGuest(libvirt, {
      name: 'bench',
      ...{ serialFile: file('guest.log'), mode: 'latency', pauseMs: GUEST_PAUSE_MS },
      disks: [{ target: TARGET, path: image }],
    });
    const domain = new LiveDomain(image, libvirt, console, bytesOf(size));
    await domain.#suspend();
    undo.release();
    return domain;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.libvirt[Symbol.asyncDispose]();
  }

  /** Lets the guest run and write while the work is done. */
  async whileWriting<T>(work: () => Promise<T>): Promise<{ result: T; guestWriteMs: GuestWrites }> {
    const before = (await this.console.latencies()).length;
    await this.libvirt.virsh('resume', this.name);
    try {
      // The first line it prints holds writes of before, too.
      const first = await pollUntil(
        async () => {
          const { length } = await this.console.latencies();
          return length > before ? length : undefined;
        },
        { timeoutMs: GUEST_TIMEOUT_MS, what: 'writes of the guest' },
      );
      const result = await work();
      const times = (await this.console.latencies()).slice(first);
      return { result, guestWriteMs: { p50: median(times), p95: percentile(times, 0.95) } };
    } finally {
      await this.#suspend();
    }
  }

  /** 64 MiB of new data in 1,000 places; the same places for the same seed. */
  async change(seed: number): Promise<void> {
    const device = await this.#device();
    const commands = changeCommands(this.sizeBytes, seed).map(
      (command) => `qemu-monitor-command ${this.name} --hmp 'qemu-io -d ${device} "${command}"'`,
    );
    const before = await this.#writesLogged();
    for (let first = 0; first < commands.length; first += COMMANDS_A_CALL) {
      await this.libvirt.virsh(commands.slice(first, first + COMMANDS_A_CALL).join(';'));
    }
    // The monitor says nothing of a write that failed.
    const missing = commands.length - ((await this.#writesLogged()) - before);
    if (missing !== 0) throw new AppError('INTERNAL', `${missing} writes to ${this.name} failed`);
  }

  /** Each tool counts from its own, and virtnbdbackup does not work beside another's. */
  async removeCheckpoints(): Promise<void> {
    const list = await this.libvirt.virsh('checkpoint-list', this.name, '--name');
    for (const name of list.split('\n').filter((line) => line !== '')) {
      await this.libvirt.virsh('checkpoint-delete', this.name, name);
    }
  }

  async #suspend(): Promise<void> {
    await this.libvirt.virsh('suspend', this.name);
  }

  async #device(): Promise<string> {
    const devices = (await this.libvirt.qmp(this.name, 'query-block')) as { qdev?: string }[];
    const found = devices.find(({ qdev }) => qdev?.split('/').includes(ALIAS))?.qdev;
    if (found === undefined) throw new AppError('INTERNAL', `${this.name} has no ${ALIAS}`);
    return found;
  }

  async #writesLogged(): Promise<number> {
    const log = await readFile(path.join(this.libvirt.directory, 'log/qemu', `${this.name}.log`), 'utf8');
    return log.match(/^wrote /gm)?.length ?? 0;
  }
}
