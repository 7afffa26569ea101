import { mkdir, rm } from 'node:fs/promises';
import path from 'node:path';
import { qemuImg } from '../../../integration/lab/disk-image.js';
import { AppError } from '../../../src/lib/errors.js';
import type { BenchDaemon } from './holdfast.js';
import { LiveDomain } from './live-domain.js';
import type { BenchOptions } from './options.js';
import type { Result, Tool } from './report.js';
import { virtnbdbackup } from './tools.js';
import type { Usage } from './usage.js';

interface LibvirtBench {
  options: BenchOptions;
  directory: string;
  daemon: BenchDaemon;
  record: (result: Result) => void;
}

interface Contender {
  readonly tool: Tool;
  /** To a place that has nothing yet. */
  full(): Promise<Usage>;
  incremental(): Promise<Usage>;
  /** An incremental while the guest stands still. */
  settle(): Promise<void>;
  /** Checks what can be checked, and removes what was written. */
  finish(): Promise<void>;
}

/**
 * One domain, whose guest writes to the disk that is backed up, and each tool in turn: a full, and an
 * incremental of 64 MiB in 1,000 places. Which one begins changes from run to run.
 */
export async function runLibvirtCases(bench: LibvirtBench): Promise<void> {
  const { options, directory } = bench;
  await using domain = await LiveDomain.start(directory, options);
  // So that the disk grows by these places before the first run, not in it.
  await domain.change(0);
  const contenders = [await makeHoldfast(bench, domain), await makeVirtnbdbackup(directory, domain)];
  for (let run = 0; run < options.runs; run += 1) {
    for (let turn = 0; turn < contenders.length; turn += 1) {
      const contender = contenders[(run + turn) % contenders.length];
      if (contender !== undefined) await runOne(bench, domain, contender);
    }
  }
  await rm(domain.image);
}

async function runOne(bench: LibvirtBench, domain: LiveDomain, contender: Contender): Promise<void> {
  const { tool } = contender;
  await domain.removeCheckpoints();
  const full = await domain.whileWriting(() => contender.full());
  bench.record({ case: 'libvirt-full', tool, ...full.result, guestWriteMs: full.guestWriteMs });
  // What the guest wrote during the full is not to count.
  await contender.settle();
  await domain.change(0);
  const { result, guestWriteMs } = await domain.whileWriting(() => contender.incremental());
  bench.record({ case: 'libvirt-incremental', tool, ...result, guestWriteMs });
  await contender.finish();
}

async function makeHoldfast(bench: LibvirtBench, domain: LiveDomain): Promise<Contender> {
  const { daemon, directory } = bench;
  const vmId = await daemon.discover(domain.libvirt.uri, domain.name);
  let runs = 0;
  let root = '';
  let repositoryId = '';
  let pointId = '';
  const back = async (type: 'full' | 'incremental', isRunning = true): Promise<Usage> => {
    const consistency = isRunning ? 'prefer' : 'never';
    const made = await daemon.backup({ vmId, repositoryId, type, consistency });
    pointId = made.pointId;
    return made.usage;
  };
  return {
    tool: 'holdfast',
    full: async () => {
      runs += 1;
      root = path.join(directory, `repository-live-${runs}`);
      repositoryId = await daemon.createRepository(root);
      return back('full');
    },
    incremental: () => back('incremental'),
    settle: async () => {
      await back('incremental', false);
    },
    finish: async () => {
      await back('incremental', false);
      await checkPoint(await daemon.topOfChain(pointId), domain.image);
      await rm(root, { recursive: true });
    },
  };
}

/** The figures mean nothing unless the bytes are right: the guest stands still, so its disk is the truth. */
async function checkPoint(top: string, image: string): Promise<void> {
  const said = await qemuImg(['compare', '-U', '-f', 'qcow2', '-F', 'qcow2', top, image]);
  if (!said.includes('Images are identical')) throw new AppError('INTERNAL', `the backup is wrong: ${said}`);
}

async function makeVirtnbdbackup(directory: string, domain: LiveDomain): Promise<Contender> {
  const output = path.join(directory, 'virtnbdbackup');
  const scratch = path.join(directory, 'virtnbdbackup-scratch');
  await mkdir(scratch);
  const back = (level: 'full' | 'inc'): Promise<Usage> =>
    virtnbdbackup({ ...{ uri: domain.libvirt.uri, domain: domain.name, level }, output, scratch });
  return {
    tool: 'virtnbdbackup',
    full: () => back('full'),
    incremental: () => back('inc'),
    settle: async () => {
      await back('inc');
    },
    finish: () => rm(output, { recursive: true }),
  };
}
