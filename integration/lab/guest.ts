import { createHash } from 'node:crypto';
import { mkdir, readFile, rm } from 'node:fs/promises';
import { fileURLToPath } from 'node:url';
import { isErrorCode } from '../../src/lib/errors.js';
import { pollUntil } from '../../src/lib/deadline.js';
import { runTool } from '../../src/lib/process.js';
import { cachePath } from './cache.js';
import { makeRaw, qemuImg, type ImageFormat } from './disk-image.js';
import { domainXml, type LabDomain } from './domain-xml.js';
import type { LabLibvirt } from './libvirt.js';
import { pathExists } from './server.js';

const BUILD_TIMEOUT_MS = 240_000;
/** Under emulation, on a machine that does other things too; about 6 s alone. */
const BOOT_TIMEOUT_MS = 90_000;
const SOURCES = ['build', 'init', 'workload.c'];

export interface GuestImages {
  kernel: string;
  initrd: string;
}

/**
 * The real guest: a Debian kernel and an initramfs with busybox, qemu-ga, e2fsck and the workload. Built once for
 * each version of its sources (10 s and a download of 70 MB), also when several processes ask at once.
 */
export async function buildGuest(): Promise<GuestImages> {
  const directory = fileURLToPath(new URL('./guest', import.meta.url));
  const hash = createHash('sha256');
  for (const name of SOURCES) hash.update(await readFile(`${directory}/${name}`));
  const target = cachePath(`guest-${hash.digest('hex').slice(0, 16)}`);
  if (!(await pathExists(target))) {
    await mkdir(cachePath(), { recursive: true });
    const script =
      '[ -e "$2" ] || { rm -rf "$2.new" && mkdir "$2.new" && "$1" "$2.new" && mv -T "$2.new" "$2"; }';
    await runTool(
      'flock',
      [cachePath('guest.lock'), 'sh', '-c', script, 'lab', `${directory}/build`, target],
      {
        timeoutMs: BUILD_TIMEOUT_MS,
      },
    );
  }
  return { kernel: `${target}/vmlinuz`, initrd: `${target}/initrd` };
}

/**
 * `writer` writes records to both disks, `verify` checks both, prints their last records and powers off, `latency`
 * measures writes to the first disk, whose content is lost; `idle` mounts them only. All but `verify` run the agent.
 */
export type GuestMode = 'writer' | 'verify' | 'latency' | 'idle';

/** What goes after the kernel's own words. `pauseMs` lies between two measured writes, default 5. */
export function guestCommandLine(mode: GuestMode, pauseMs?: number): string {
  const pause = pauseMs === undefined ? '' : ` hf.pause=${pauseMs}`;
  return `console=ttyS0 quiet panic=-1 hf.mode=${mode}${pause}`;
}

/** An image with an empty ext4 over the whole disk. */
export async function makeGuestDisk(options: {
  path: string;
  sizeBytes: number;
  format?: ImageFormat;
}): Promise<void> {
  const { path, sizeBytes, format = 'qcow2' } = options;
  const raw = format === 'raw' ? path : `${path}.raw`;
  await makeRaw({ path: raw, sizeBytes });
  const whole = 'lazy_itable_init=0,lazy_journal_init=0,nodiscard';
  await runTool('mkfs.ext4', ['-q', '-F', '-E', whole, raw], { timeoutMs: BOOT_TIMEOUT_MS });
  if (format === 'raw') return;
  await qemuImg(['convert', '-q', '-f', 'raw', '-O', format, raw, path]);
  await rm(raw);
}

/** The serial console of a guest, kept in a file. */
export class GuestConsole {
  constructor(readonly path: string) {}

  async text(): Promise<string> {
    return (await pathExists(this.path)) ? (await readFile(this.path, 'latin1')).replaceAll('\r', '') : '';
  }

  /** The first match; rejects with the end of the console when it does not come, or when the workload failed. */
  async waitFor(pattern: RegExp, timeoutMs = BOOT_TIMEOUT_MS): Promise<RegExpExecArray> {
    let text = '';
    try {
      return await pollUntil(
        async () => {
          text = await this.text();
          const failure = /^hf: (failed|unmountable) .*$/m.exec(text);
          if (failure !== null) throw new Error(`the guest said: ${failure[0]}`);
          return pattern.exec(text) ?? undefined;
        },
        { timeoutMs, intervalMs: 100, what: `${pattern.source} on the console` },
      );
    } catch (error) {
      throw new Error(`console ends: ${text.slice(-1000)}`, { cause: error });
    }
  }

  /** The highest number that the writer has told of; it tells of every 25th. */
  async lastRecord(): Promise<number> {
    return Math.max(
      0,
      ...Array.from((await this.text()).matchAll(/^hf: record (\d+)/gm), ([, n]) => Number(n)),
    );
  }

  /** Milliseconds of each measured write, oldest first. Take the length before and after, for a window of time. */
  async latencies(): Promise<number[]> {
    return Array.from((await this.text()).matchAll(/^hf: ms ([\d. ]+)$/gm), ([, numbers]) => numbers ?? '')
      .flatMap((numbers) => numbers.split(' '))
      .map(Number);
  }
}

export interface LabGuest {
  readonly console: GuestConsole;
  /** What a guest agent command returns. */
  agent(command: string, args?: Record<string, unknown>): Promise<unknown>;
}

/** Defines and starts a domain with the guest in it, and waits until its disks are mounted and its agent answers. */
export async function startGuest(
  libvirt: LabLibvirt,
  domain: LabDomain & { serialFile: string; mode: GuestMode; pauseMs?: number },
): Promise<LabGuest> {
  await defineGuest(libvirt, domain);
  await libvirt.virsh('start', domain.name);
  const agent: LabGuest['agent'] = async (command, args = {}) => {
    const text = JSON.stringify({ execute: command, arguments: args });
    const answer = await libvirt.virsh('qemu-agent-command', domain.name, '--timeout', '5', text);
    return (JSON.parse(answer) as { return: unknown }).return;
  };
  const console = new GuestConsole(domain.serialFile);
  await console.waitFor(/^hf: ready/m);
  await pollUntil(() => answers(agent), {
    timeoutMs: BOOT_TIMEOUT_MS,
    intervalMs: 100,
    what: `the agent of ${domain.name} answering`,
  });
  return { console, agent };
}

async function answers(agent: LabGuest['agent']): Promise<true | undefined> {
  try {
    await agent('guest-ping');
    return true;
  } catch (error) {
    // virsh fails until the agent has opened its side.
    if (isErrorCode(error, 'TOOL_FAILED')) return undefined;
    throw error;
  }
}

async function defineGuest(
  libvirt: LabLibvirt,
  domain: LabDomain & { mode: GuestMode; pauseMs?: number },
): Promise<void> {
  const { mode, pauseMs, ...rest } = domain;
  const cmdline = guestCommandLine(mode, pauseMs);
  await libvirt.define(
    domainXml({ memoryMib: 128, agentChannel: true, ...(await buildGuest()), cmdline, ...rest }),
  );
}

export interface DiskVerdict {
  /** Exit code of `e2fsck -fn` before anything was mounted; 0 is good. */
  fsck: number;
  /** True where the journal had nothing to replay: the filesystem was frozen or not mounted at that instant. */
  isJournalClean: boolean;
  /** The same after the journal was replayed. */
  fsckReplayed: number;
  lastRecord: number;
  /** Records that should stand before the last one and do not. */
  missingRecords: number;
}

/** What the guest in `verify` mode printed of both disks. Waits until it is through. */
export async function readVerdict(console: GuestConsole): Promise<{ vda: DiskVerdict; vdb: DiskVerdict }> {
  await console.waitFor(/^hf: verified/m);
  const text = await console.text();
  const numbers = (pattern: string): number[] => {
    const match = new RegExp(`^hf: ${pattern}`, 'm').exec(text);
    if (match === null) throw new Error(`no ${pattern} on the console: ${text.slice(-1000)}`);
    return match.slice(1).map(Number);
  };
  const of = (disk: string): DiskVerdict => {
    const [fsck = NaN] = numbers(`fsck ${disk} (\\d+)`);
    const [lastRecord = NaN, missingRecords = NaN] = numbers(`last ${disk} (\\d+) missing (\\d+)`);
    const [fsckReplayed = NaN] = numbers(`fsck-replayed ${disk} (\\d+)`);
    const isJournalClean = new RegExp(`^hf: fsck ${disk} \\d+ clean`, 'm').test(text);
    return { fsck, isJournalClean, fsckReplayed, lastRecord, missingRecords };
  };
  return { vda: of('vda'), vdb: of('vdb') };
}

/** Boots the guest on two disks in `verify` mode and returns what it found. The disks are written to. */
export async function verifyInGuest(
  libvirt: LabLibvirt,
  domain: LabDomain & { serialFile: string },
): Promise<{ vda: DiskVerdict; vdb: DiskVerdict }> {
  await defineGuest(libvirt, { ...domain, mode: 'verify' });
  await libvirt.virsh('start', domain.name);
  return readVerdict(new GuestConsole(domain.serialFile));
}
