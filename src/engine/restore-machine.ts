import { rm, stat } from 'node:fs/promises';
import type { PointManifest, Repository } from '../../repository/index.js';
import { CleanupStack } from '../lib/cleanup.js';
import type {
  MachineTargetDisk,
  MachineTargetSpec,
  PreparedMachine,
  RestoredMachine,
} from '../target/machine-target.js';
import { openMachineTarget } from '../target/open-target.js';
import type { OpenTarget, TargetSpec } from '../target/target.js';
import type { ActiveRun } from './active-run.js';
import type { EngineContext } from './context.js';
import { rememberTargets } from './restore-leftovers.js';
import type { RunRequest } from './types.js';

/** The part of a restore run that makes a machine of its disks. Disposal takes back a machine that was not finished. */
export interface MachineRestore extends AsyncDisposable {
  readonly disks: PreparedMachine['disks'];
  readonly isInPlace: boolean;
  /** A disk that is written and waits for the others. */
  add(spec: TargetSpec, target: OpenTarget): void;
  /** All disks were added: they appear, the machine is defined, and started where that was asked. */
  finish(): Promise<RestoredMachine>;
}

/** Null for a run that restores single disks. Everything that can be refused is refused here. */
export async function prepareMachine(parts: {
  context: EngineContext;
  run: ActiveRun;
  repository: Repository;
  point: PointManifest;
}): Promise<MachineRestore | null> {
  const { context, run, repository, point } = parts;
  const spec = (run.row.request as Extract<RunRequest, { kind: 'restore' }>).machine ?? null;
  if (spec === null) return null;
  const target = openMachineTarget(spec, {
    place: { runtimeDirectory: context.socketDirectory, registry: context.registry, owner: run.id },
    commandTimeoutMs: context.settings.snapshot.commandTimeoutMs,
    forbiddenDirectories: await forbiddenTargets(context),
  });
  const disks: MachineTargetDisk[] = [];
  for (const { diskId, name, sizeBytes } of point.disks) {
    disks.push({
      diskId,
      name,
      sizeBytes,
      leastBytes: await leastBytes(repository, point, { diskId, sizeBytes }),
    });
  }
  const prepared = await target.prepare({
    configFiles: await repository.readConfigFiles(point.vmId, point.pointId),
    disks,
    signal: run.signal,
  });
  noteAll(run, prepared.notes);
  const targets = prepared.disks.map((disk) => disk.target);
  return machineRestore(run, { spec, prepared, record: await rememberTargets(context, run.id, targets) });
}

/** The largest layer of the chain: later ones may replace its clusters, and seldom zero them. */
async function leastBytes(
  repository: Repository,
  point: PointManifest,
  disk: Pick<MachineTargetDisk, 'diskId' | 'sizeBytes'>,
): Promise<number> {
  const { layers } = await repository.openChain(point, disk.diskId);
  const sizes = await Promise.all(layers.map(async ({ path }) => (await stat(path)).size));
  return Math.min(disk.sizeBytes, Math.max(0, ...sizes));
}

function machineRestore(
  run: ActiveRun,
  parts: { spec: MachineTargetSpec; prepared: PreparedMachine; record: AsyncDisposable },
): MachineRestore {
  const { spec, prepared, record } = parts;
  const undo = new CleanupStack();
  const waiting: { spec: TargetSpec; target: OpenTarget }[] = [];
  return {
    disks: prepared.disks,
    isInPlace: prepared.isInPlace,
    add: (disk, target) => {
      waiting.push({ spec: disk, target });
    },
    async finish() {
      await prepared.confirm();
      for (const { spec: disk, target } of waiting) {
        await target.complete();
        // A complete disk without its machine would only stand in the way of the next attempt.
        if (disk.kind === 'file' && !prepared.isInPlace) undo.defer(() => rm(disk.path, { force: true }));
      }
      const { machine, notes } = await prepared.complete();
      undo.release();
      noteAll(run, notes);
      run.log('info', {
        code: 'MACHINE_DEFINED',
        message: `defined ${machine.name}`,
        details: { name: machine.name, uuid: machine.uuid },
      });
      if (!spec.start) return machine;
      await prepared.start();
      run.log('info', { code: 'MACHINE_STARTED', message: `started ${machine.name}` });
      return { ...machine, isStarted: true };
    },
    async [Symbol.asyncDispose]() {
      await using last = new CleanupStack();
      last.use(record);
      last.use(undo);
      last.use(prepared);
    },
  };
}

function noteAll(run: ActiveRun, notes: readonly string[]): void {
  for (const message of notes) run.log('warning', { code: 'MACHINE_NOTE', message });
}

/** Repositories and the daemon's own state: nothing is restored into them. */
export async function forbiddenTargets(context: EngineContext): Promise<string[]> {
  const directories = [context.stateDirectory, context.runtimeDirectory];
  let cursor: string | null = null;
  do {
    const page = await context.db.repositories.list({ limit: 100, cursor });
    directories.push(...page.rows.map(({ root }) => root));
    cursor = page.nextCursor;
  } while (cursor !== null);
  return directories;
}
