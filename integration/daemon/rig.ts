import { readFile, readdir, rm } from 'node:fs/promises';
import net from 'node:net';
import path from 'node:path';
import { once } from 'node:events';
import { expect } from 'vitest';
import type { BackupView, RunDiskProgress, RunView } from '../../src/engine/types.js';
import { pollUntil } from '../../src/lib/deadline.js';
import { errnoOf, type ErrorCode } from '../../src/lib/errors.js';
import type { ChangeTracking, DiskSource } from '../../src/source/source.js';
import { makeLabDirectory, type LabDirectory } from '../lab/directory.js';
import { firstDifference } from '../lab/disk-image.js';
import { findDescendants, findLeftovers } from '../lab/leftovers.js';
import {
  backUp,
  restoreRaw,
  startBackup,
  startDaemon,
  type BackupOptions,
  type Daemon,
  type Settings,
  type Setup,
} from './daemon.js';

/** A daemon in a directory of its own, as a file of fault tests uses it. */
export interface Rig {
  lab: LabDirectory;
  daemon: Daemon;
}

export async function startRig(settings: Settings | ((lab: LabDirectory) => Settings) = {}): Promise<Rig> {
  const lab = await makeLabDirectory();
  const chosen = typeof settings === 'function' ? settings(lab) : settings;
  return { lab, daemon: await startDaemon({ directory: lab.file('daemon'), settings: chosen }) };
}

/** Stops it; nothing of it may be left. */
export async function stopRig({ lab, daemon }: Rig): Promise<void> {
  await daemon.stop();
  expect(await findLeftovers(lab.file('daemon'))).toEqual([]);
  await lab[Symbol.asyncDispose]();
}

export function nbdDisk(uri: string, changeTracking: ChangeTracking = 'auto'): DiskSource {
  return { kind: 'nbd', uri, changeTracking };
}

export function imageDisk(
  file: string,
  format: 'raw' | 'qcow2' = 'raw',
  changeTracking: ChangeTracking = 'auto',
): DiskSource {
  return { kind: 'image', path: file, format, changeTracking };
}

/** After a run, however it ended: no unfinished file in the repository, no private server, no socket of one. */
export async function expectNothingLeft({ lab, daemon }: Rig, repositoryRoot: string): Promise<void> {
  const inRepository = await namesBelow(repositoryRoot);
  expect(inRepository.filter((name) => name.includes('.partial-') || name.includes('.tmp'))).toEqual([]);
  const sockets = await namesBelow(lab.file('daemon', 'run'));
  expect(sockets.filter((name) => name.startsWith('n-'))).toEqual([]);
  const tools: string[] = [];
  for (const pid of await findDescendants(daemon.pid)) {
    const name = await nameOf(pid);
    if (name.startsWith('qemu')) tools.push(`${pid} ${name}`);
  }
  expect(tools).toEqual([]);
}

async function namesBelow(directory: string): Promise<string[]> {
  return (await readdir(directory, { recursive: true })).map((name) => path.basename(name));
}

async function nameOf(pid: number): Promise<string> {
  try {
    return (await readFile(`/proc/${pid}/comm`, 'utf8')).trim();
  } catch (error) {
    if (errnoOf(error) === 'ENOENT' || errnoOf(error) === 'ESRCH') return '';
    throw error;
  }
}

/** A backup that must fail with this code and leave nothing; answers the run. */
export async function expectFailure(
  rig: Rig,
  setup: Setup,
  options: BackupOptions & { code: ErrorCode },
): Promise<RunView> {
  return expectFailed(rig, setup, {
    run: await startBackup(rig.daemon, setup, options),
    code: options.code,
  });
}

/** The run ends as failed with this code, without a point, and leaves nothing. */
export async function expectFailed(
  rig: Rig,
  setup: Setup,
  { run, code }: { run: RunView; code: ErrorCode },
): Promise<RunView> {
  const before = await listPoints(rig.daemon, setup);
  const ended = await rig.daemon.waitForRun(run.id);
  expect([ended.state, ended.error?.code], JSON.stringify(ended.error)).toEqual(['failed', code]);
  expect(ended.error?.remedy).not.toBe('');
  expect(ended.result).toBeNull();
  expect((await rig.daemon.request('GET', `/backups/${run.pointId ?? ''}`)).status).toBe(404);
  expect(await listPoints(rig.daemon, setup)).toEqual(before);
  await expectNothingLeft(rig, setup.repository.root);
  return ended;
}

/** The points of the setup's VM in its repository, newest first. */
export async function listPoints(daemon: Daemon, setup: Setup): Promise<string[]> {
  const query = `vmId=${setup.vm.id}&repositoryId=${setup.repository.id}`;
  const { items } = await daemon.expect<{ items: BackupView[] }>(200, 'GET', `/backups?${query}`);
  return items.map(({ id }) => id);
}

/** Restores the point and compares each disk with its file. */
export async function expectReadsBack(
  rig: Rig,
  pointId: string | null,
  truths: Record<string, string>,
): Promise<void> {
  const restored = await restoreRaw(rig.daemon, pointId ?? '', rig.lab.file('restored'));
  expect(Object.keys(restored).sort()).toEqual(Object.keys(truths).sort());
  for (const [name, file] of Object.entries(restored)) {
    expect(await firstDifference(file, truths[name] ?? ''), `${name} of ${pointId ?? ''}`).toBeNull();
    await rm(file);
  }
}

/** A backup that must succeed, read back right and leave nothing. */
export async function expectGoodBackup(
  rig: Rig,
  setup: Setup,
  options: BackupOptions & { truths: Record<string, string> },
): Promise<RunView> {
  const run = await backUp(rig.daemon, setup, options);
  await expectNothingLeft(rig, setup.repository.root);
  await expectReadsBack(rig, run.pointId, options.truths);
  return run;
}

/** Method and reason of each disk, as in `full FIRST_POINT`. */
export function methodsOf(run: RunView): string[] {
  return run.progress.disks.map(({ method, reason }) => `${method ?? ''} ${reason?.code ?? ''}`);
}

/** Waits until the run has copied something and is still copying. */
export async function waitUntilCopying(
  daemon: Daemon,
  runId: string,
  isThere: (disk: RunDiskProgress) => boolean = ({ bytesRead }) => bytesRead > 0,
): Promise<void> {
  await pollUntil(
    async () => {
      const run = await daemon.expect<RunView>(200, 'GET', `/runs/${runId}`);
      if (run.endedAt !== null) throw new Error(`the run ended too early: ${JSON.stringify(run)}`);
      return run.stage === 'transfer' && run.progress.disks.some(isThere) ? true : undefined;
    },
    { timeoutMs: 15_000, intervalMs: 20, what: `run ${runId} copying` },
  );
}

/** Waits until a worker has taken the run. */
export async function waitUntilRunning(daemon: Daemon, runId: string): Promise<void> {
  await pollUntil(
    async () => {
      const { state } = await daemon.expect<RunView>(200, 'GET', `/runs/${runId}`);
      return state === 'running' ? true : undefined;
    },
    { timeoutMs: 10_000, intervalMs: 20, what: `run ${runId} running` },
  );
}

/** A TCP listener on loopback that hands each connection over; ends them all when it is stopped. */
export interface LabListener extends AsyncDisposable {
  readonly port: number;
  readonly connections: () => number;
}

export async function listen(onConnection: (socket: net.Socket) => void): Promise<LabListener> {
  const sockets = new Set<net.Socket>();
  let count = 0;
  const server = net.createServer((socket) => {
    count += 1;
    sockets.add(socket);
    socket.on('close', () => sockets.delete(socket));
    // A client that goes away in the middle is what these tests do.
    socket.on('error', () => undefined);
    onConnection(socket);
  });
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  const address = server.address();
  if (address === null || typeof address === 'string') throw new Error('no TCP address');
  return {
    port: address.port,
    connections: () => count,
    [Symbol.asyncDispose]: async () => {
      for (const socket of sockets) socket.destroy();
      server.close();
      await once(server, 'close');
    },
  };
}

/** Forwards to a Unix socket and cuts every connection once `bytes` have come back in total; Infinity for never. */
export function cutAfter(socketPath: string, limit: { bytes: number }): (client: net.Socket) => void {
  return (client) => {
    const server = net.connect(socketPath);
    server.on('error', () => client.destroy());
    client.on('close', () => server.destroy());
    server.on('close', () => client.destroy());
    client.pipe(server);
    server.on('data', (chunk: Buffer) => {
      limit.bytes -= chunk.length;
      if (limit.bytes <= 0) {
        client.destroy();
        server.destroy();
      } else if (!client.write(chunk)) {
        server.pause();
        client.once('drain', () => server.resume());
      }
    });
  };
}
