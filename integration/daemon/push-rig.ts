import { createHash } from 'node:crypto';
import { open } from 'node:fs/promises';
import { expect } from 'vitest';
import type { PushDiskView, PushView, RunView, VmView } from '../../src/engine/types.js';
import { runTool } from '../../src/lib/process.js';
import { CLUSTER_BYTES, KIB, MIB } from '../../src/lib/units.js';
import { connect } from '../exportd/rig.js';
import { makeRaw } from '../lab/disk-image.js';
import { setUp, type Answer, type Daemon, type Setup } from './daemon.js';
import { expectNoExports, type ExportRig } from './export-rig.js';
import { expectNothingLeft, listPoints } from './rig.js';

/** A machine of its own whose disks are pushed, with files that hold what they are. */
export async function newMachine(
  { lab, daemon }: ExportRig,
  name: string,
  disks: Record<string, number>,
): Promise<{ setup: Setup; files: Record<string, string> }> {
  const files: Record<string, string> = {};
  for (const [disk, sizeBytes] of Object.entries(disks)) {
    const file = lab.file(`${name}-${disk}.raw`);
    await makeRaw({
      path: file,
      sizeBytes,
      regions: [
        { offset: 64 * KIB, length: 3 * MIB },
        { offset: sizeBytes - 700, length: 700 },
      ],
    });
    files[disk] = file;
  }
  const setup = await setUp(daemon, {
    root: lab.file(`repository-${name}`),
    hash: 'sha-256',
    vmName: name,
    disks: Object.entries(disks).map(([disk, sizeBytes]) => ({ name: disk, source: pushDisk(sizeBytes) })),
  });
  return { setup, files };
}

export const nbdcopy = (file: string, uri: string): Promise<unknown> =>
  runTool('nbdcopy', ['--flush', file, uri], { timeoutMs: 60_000 });

/** A pushed backup under way, as its agent sees it. */
export interface Pushed {
  run: RunView;
  push: PushView;
  pointId: string;
  disks: Record<string, PushDiskView>;
}

export interface PushBody {
  type?: 'full' | 'incremental' | 'auto';
  whenBusy?: 'refuse' | 'queue';
  push?: {
    identity?: unknown;
    consistency?: string;
    disks?: { disk: string; sizeBytes?: number; lineage?: string; changeIds?: readonly string[] }[];
  };
}

/** Asks for a pushed backup; answers the run, whatever became of it. */
export function requestPush(
  daemon: Daemon,
  { vm, repository }: Setup,
  body: PushBody = {},
): Promise<RunView> {
  const ids = { vmId: vm.id, repositoryId: repository.id };
  return daemon.expect<RunView>(202, 'POST', '/backups', { ...ids, source: 'push', push: {}, ...body });
}

/** Asks for a pushed backup, whose exports must be there with the answer. */
export async function startPush(daemon: Daemon, setup: Setup, body: PushBody = {}): Promise<Pushed> {
  const run = await requestPush(daemon, setup, body);
  const { push } = run.progress;
  if (push === null) throw new Error(`no exports: ${JSON.stringify(run)}`);
  const disks = Object.fromEntries(push.disks.map((disk) => [disk.diskName, disk]));
  return { run, push, pointId: run.pointId ?? '', disks };
}

export function diskOf({ disks }: Pushed, name: string): PushDiskView {
  const disk = disks[name];
  if (disk === undefined) throw new Error(`no disk ${name} is pushed`);
  return disk;
}

export function uriOf(pushed: Pushed, name: string): string {
  return diskOf(pushed, name).uris[0] ?? '';
}

const DONE = { bytesRead: 0, bytesWritten: 0, bytesZeroed: 0, bytesSkipped: 0 };
const NOTHING = { totalBytes: 0, ...DONE };

export function report(
  daemon: Daemon,
  pushed: Pushed,
  said: Record<string, Partial<typeof NOTHING>>,
): Promise<Answer> {
  const disks = Object.entries(said).map(([name, bytes]) => ({
    diskId: diskOf(pushed, name).diskId,
    ...NOTHING,
    ...bytes,
  }));
  return daemon.request('POST', `/backups/${pushed.pointId}/progress`, { disks });
}

export function tryComplete(
  daemon: Daemon,
  pushed: Pushed,
  name: string,
  completion: Record<string, unknown>,
): Promise<Answer> {
  const route = `/backups/${pushed.pointId}/disks/${diskOf(pushed, name).diskId}/complete`;
  return daemon.request('POST', route, { ...DONE, ...completion });
}

/** Completes a disk, which must be accepted. */
export async function complete(
  daemon: Daemon,
  pushed: Pushed,
  name: string,
  completion: { changeId: string; sumsDigest?: string },
): Promise<PushDiskView> {
  const answer = await tryComplete(daemon, pushed, name, completion);
  expect(answer.status, JSON.stringify(answer.body)).toBe(200);
  return answer.body as PushDiskView;
}

/** Completes all disks with change ids made of a word; the point must come to be. */
export async function finish(daemon: Daemon, pushed: Pushed, word: string): Promise<RunView> {
  for (const name of Object.keys(pushed.disks)) {
    await complete(daemon, pushed, name, { changeId: `${name}-${word}` });
  }
  const run = await daemon.waitForRun(pushed.run.id);
  expect([run.state, run.error]).toEqual(['completed', null]);
  return run;
}

/** What agents say of what they wrote: SHA-256 over the sums entries of these clusters of the disk, in a SHA-256 repository. */
export async function digestOf(
  file: string,
  clusters: Iterable<number>,
  options: { sizeBytes: number; keepZeroes: boolean },
): Promise<string> {
  const digest = createHash('sha256');
  await using disk = await open(file, 'r');
  for (const cluster of clusters) {
    const offset = cluster * CLUSTER_BYTES;
    const data = Buffer.alloc(Math.min(CLUSTER_BYTES, options.sizeBytes - offset));
    await disk.read(data, 0, data.length, offset);
    const isZero = data.every((byte) => byte === 0);
    if (isZero && !options.keepZeroes) continue;
    const entry = Buffer.alloc(40);
    entry.writeBigUInt64LE(BigInt(cluster) | (isZero ? 1n << 63n : 0n));
    if (!isZero) createHash('sha256').update(data).digest().copy(entry, 8);
    digest.update(entry);
  }
  return digest.digest('hex');
}

/** Writes through the export as an agent would, flushed. */
export async function writeAt(uri: string, offset: number, data: Buffer): Promise<void> {
  await using client = await connect(uri);
  await client.pwrite(offset, data);
  await client.flush();
}

/** After a push, however it ended: no export, no unfinished file, no private server. */
export async function expectPushGone(rig: ExportRig, setup: Setup): Promise<void> {
  await expectNoExports(rig);
  await expectNothingLeft(rig, setup.repository.root);
}

/** The run ends with this code and without a point, and leaves nothing. */
export async function expectPushFailed(
  rig: ExportRig,
  setup: Setup,
  { run, state = 'failed', code }: { run: RunView; state?: string; code: string },
): Promise<RunView> {
  const ended = await rig.daemon.waitForRun(run.id);
  expect([ended.state, ended.error?.code], JSON.stringify(ended.error)).toEqual([state, code]);
  expect(await listPoints(rig.daemon, setup)).not.toContain(run.pointId);
  await expectPushGone(rig, setup);
  return ended;
}

/** `holdfast repository check --content`, which must find nothing. */
export async function expectSoundRepository(daemon: Daemon, { repository }: Setup): Promise<void> {
  const run = await daemon.expect<RunView>(202, 'POST', `/repositories/${repository.id}/check`, {
    content: true,
  });
  const ended = await daemon.waitForRun(run.id);
  expect(ended.result?.kind === 'check' ? ended.result.report.findings : ended.error).toEqual([]);
}

export function pushDisk(sizeBytes: number): { kind: 'push'; sizeBytes: number } {
  return { kind: 'push', sizeBytes };
}

export function getVm(daemon: Daemon, { vm }: Setup): Promise<VmView> {
  return daemon.expect<VmView>(200, 'GET', `/vms/${vm.id}`);
}
