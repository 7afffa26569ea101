import path from 'node:path';
import type { Command } from 'commander';
import { action, argument, collect, type CommandContext } from '../action.js';
import { dataOf, type Api, type Schemas } from '../client.js';
import { usageFailure } from '../failure.js';
import { diskNamesOf, runStarted } from '../follow.js';
import { addPaging, pageQuery, printPage, type PagingOptions } from '../paging.js';
import { oneOf, parseJsonObject, parseRestoreDisk } from '../parse.js';
import { formatRun, formatTime } from '../render.js';
import { findDisk, parseId, resolveVolume } from '../resolve.js';

interface RunOptions {
  disk?: string[];
  diskJson?: string[];
  to?: string;
  overwrite?: boolean;
  acceptDamage?: boolean;
  detach?: boolean;
}

const DISK_HELP = 'NAME=PATH[,format=raw|qcow2], NAME=NBD-URI, NAME=/dev/… or NAME=volume:VOLUME; repeatable';

export function addRestoreCommands(program: Command, context: CommandContext): void {
  const group = program.command('restore').description('restores of points');
  group
    .command('run <point>')
    .description('write disks of a point to files, NBD exports, devices or volumes')
    .option('--disk <target>', DISK_HELP, collect)
    .option('--disk-json <json>', 'a disk as in the API: {"diskId": …, "target": {…}}; repeatable', collect)
    .option('--to <directory>', 'all disks, as NAME.raw in this directory')
    .option('--overwrite', 'what the targets hold may be lost (a mounted device is refused all the same)')
    .option('--accept-damage', 'write what is there although hashes disagree')
    .option('--detach', 'do not wait for the end')
    .action(
      action<RunOptions>(context, async ({ session, args, options }) => {
        const pointId = parseId(argument(args), 'point');
        const wanted = (options.disk ?? []).map(parseRestoreDisk);
        // The daemon checks the object against its schema; here it is handed on.
        const given = (options.diskJson ?? []).map(
          (text) => parseJsonObject(text, '--disk-json') as Schemas['RestoreDisk'],
        );
        const isNone = wanted.length === 0 && given.length === 0;
        if (isNone === (options.to === undefined)) {
          throw usageFailure('give either --disk for each disk wanted, or --to for all');
        }
        const api = await session.api();
        const point = dataOf(await api.GET('/backups/{id}', { params: { path: { id: pointId } } }));
        const disks = point.layers.map((layer) => ({ id: layer.diskId, name: layer.diskName }));
        const targets =
          options.to === undefined
            ? await namedTargets(api, disks, wanted)
            : disks.map((disk) => fileTarget(disk, options.to ?? ''));
        const body = {
          pointId,
          disks: [...targets, ...given],
          overwrite: options.overwrite === true,
          acceptDamage: options.acceptDamage === true,
        };
        const run = dataOf(await api.POST('/restore/images', { body }));
        return runStarted(session, run, options.detach === true);
      }),
    );
  addMachine(group, context);
  addListAndShow(group, context);
}

async function namedTargets(
  api: Api,
  disks: readonly { id: string; name: string }[],
  wanted: readonly ReturnType<typeof parseRestoreDisk>[],
): Promise<Schemas['RestoreDisk'][]> {
  const targets: Schemas['RestoreDisk'][] = [];
  for (const { disk, target } of wanted) {
    targets.push({ diskId: findDisk(disks, disk).id, target: await resolveVolume(api, target) });
  }
  return targets;
}

/** A disk's name is foreign text: it becomes a file name only when it is a plain one. */
function fileTarget(disk: { id: string; name: string }, directory: string): Schemas['RestoreDisk'] {
  const isPlain = /^[\w.+-]{1,200}$/.test(disk.name) && !disk.name.startsWith('.');
  const file = path.join(path.resolve(directory), `${isPlain ? disk.name : disk.id}.raw`);
  return { diskId: disk.id, target: { kind: 'file', path: file, format: 'raw' } };
}

interface MachineOptions {
  to: string;
  name?: string;
  sameIdentity?: boolean;
  inPlace?: boolean;
  directory?: string;
  pool?: string;
  format?: string;
  start?: boolean;
  acceptDamage?: boolean;
  detach?: boolean;
}

function addMachine(group: Command, context: CommandContext): void {
  group
    .command('vm <point>')
    .description('restore the whole machine to libvirt: its disks and its definition')
    .option('--to <uri>', "a libvirt of the daemon's host", 'qemu:///system')
    .option('--name <name>', 'another name than it had')
    .option('--same-identity', 'keep UUID and MAC addresses; by default it gets new ones')
    .option('--in-place', 'replace the machine itself, disks too; it must be off')
    .option('--directory <directory>', 'where the disks go')
    .option('--pool <pool>', 'where the disks go: a storage pool')
    .option('--format <format>', 'of the disks: qcow2 (default) or raw')
    .option('--start', 'start it at the end')
    .option('--accept-damage', 'write what is there although hashes disagree')
    .option('--detach', 'do not wait for the end')
    .action(
      action<MachineOptions>(context, async ({ session, args, options }) => {
        const body: Schemas['MachineRestoreRequest'] = {
          pointId: parseId(argument(args), 'point'),
          uri: options.to,
          name: options.name ?? null,
          identity: identityOf(options),
          place: placeOf(options),
          format: oneOf(options.format ?? 'qcow2', ['qcow2', 'raw'], '--format'),
          start: options.start === true,
          acceptDamage: options.acceptDamage === true,
        };
        const run = dataOf(await (await session.api()).POST('/restore/vms', { body }));
        return runStarted(session, run, options.detach === true);
      }),
    );
}

function identityOf(options: MachineOptions): Schemas['MachineRestoreRequest']['identity'] {
  if (options.inPlace !== true) return options.sameIdentity === true ? 'same' : 'new';
  const decided = [
    ['--same-identity', options.sameIdentity],
    ['--name', options.name],
    ['--directory', options.directory],
    ['--pool', options.pool],
    ['--format', options.format],
  ] as const;
  const other = decided.find(([, value]) => value !== undefined);
  if (other !== undefined) {
    throw usageFailure(`${other[0]} does not go with --in-place: the machine keeps what it has`);
  }
  return 'replace';
}

function placeOf({ inPlace, directory, pool }: MachineOptions): Schemas['MachineRestoreRequest']['place'] {
  if (inPlace === true) return null;
  if ((directory === undefined) === (pool === undefined)) {
    throw usageFailure('say where the disks go, with either --directory or --pool');
  }
  if (directory === undefined) return { kind: 'pool', name: pool ?? '' };
  if (!path.isAbsolute(directory)) throw usageFailure('--directory must be an absolute path');
  return { kind: 'directory', path: directory };
}

function addListAndShow(group: Command, context: CommandContext): void {
  addPaging(group.command('list').description('list restores, newest first')).action(
    action<PagingOptions>(context, async ({ session, options }) => {
      const api = await session.api();
      const page = dataOf(await api.GET('/restore/images', { params: { query: pageQuery(options) } }));
      printPage(session, page, [
        { title: 'RUN', value: (run) => run.id },
        { title: 'STATE', value: (run) => run.state },
        { title: 'POINT', value: (run) => run.pointId ?? '-' },
        { title: 'CREATED', value: (run) => formatTime(run.createdAt) },
        { title: 'ERROR', value: (run) => run.error?.code ?? '' },
      ]);
      return undefined;
    }),
  );
  group
    .command('show <run>')
    .description('show a restore')
    .action(
      action(context, async ({ session, args }) => {
        const api = await session.api();
        const id = parseId(argument(args), 'run');
        const run = dataOf(await api.GET('/restore/images/{id}', { params: { path: { id } } }));
        const diskNames = await diskNamesOf(api, run);
        session.print(run, () => formatRun(run, diskNames));
        return undefined;
      }),
    );
}
