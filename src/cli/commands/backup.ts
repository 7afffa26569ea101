import type { Command } from 'commander';
import { formatBytes } from '../../lib/units.js';
import { action, argument, collect, type CommandContext } from '../action.js';
import { dataOf, type Api, type Schemas } from '../client.js';
import { usageFailure } from '../failure.js';
import { runStarted } from '../follow.js';
import { addPaging, pageQuery, printPage, type PagingOptions } from '../paging.js';
import { parseBitmap, parseBytes } from '../parse.js';
import { formatTime } from '../render.js';
import { findDisk, findRepository, findVm, parseId } from '../resolve.js';
import { formatFields, formatTable } from '../table.js';
import { safeText } from '../text.js';

interface RunOptions {
  repository: string;
  type: string;
  bitmap?: string[];
  rate?: string;
  queue?: boolean;
  detach?: boolean;
}

export function addBackupCommands(program: Command, context: CommandContext): void {
  const group = program.command('backup').description('recovery points of machines');
  addRun(group, context);
  addList(group, context);
  addShow(group, context);
  addChain(group, context);
  group
    .command('delete <point>')
    .description('delete a point that no other stands on')
    .option('--detach', 'do not wait for the end')
    .action(
      action<{ detach?: boolean }>(context, async ({ session, args, options }) => {
        const api = await session.api();
        const id = parseId(argument(args), 'point');
        const run = dataOf(await api.DELETE('/backups/{id}', { params: { path: { id } } }));
        return runStarted(session, run, options.detach === true);
      }),
    );
  addStats(group, context);
}

function addRun(group: Command, context: CommandContext): void {
  group
    .command('run <vm>')
    .description('back a machine up now, by name or id')
    .requiredOption('--repository <repository>', 'where to, by name or id')
    .option('--type <type>', 'auto, full or incremental', 'auto')
    .option('--bitmap <bitmap>', 'DISK=BITMAP@POINT: a bitmap that began at that point; repeatable', collect)
    .option('--rate <bytes>', 'read at most so much a second, e.g. 100MiB')
    .option('--queue', 'wait when another run of this machine and repository is active')
    .option('--detach', 'do not wait for the end')
    .action(
      action<RunOptions>(context, async ({ session, args, options }) => {
        const { type } = options;
        if (type !== 'auto' && type !== 'full' && type !== 'incremental') {
          throw usageFailure('--type is none of auto, full, incremental');
        }
        const bytesPerSecond = options.rate === undefined ? 0 : parseBytes(options.rate, '--rate');
        const stated = (options.bitmap ?? []).map(parseBitmap);
        const api = await session.api();
        const vm = await findVm(api, argument(args));
        const repository = await findRepository(api, options.repository);
        const bitmaps = stated.map(({ disk, name, sincePointId }) => ({
          diskId: findDisk(vm.disks, disk).id,
          name,
          sincePointId: parseId(sincePointId, 'point'),
        }));
        const body: Schemas['BackupRequest'] = {
          vmId: vm.id,
          repositoryId: repository.id,
          type,
          bitmaps,
          bytesPerSecond,
          whenBusy: options.queue === true ? 'queue' : 'refuse',
        };
        const run = dataOf(await api.POST('/backups', { body }));
        return runStarted(session, run, options.detach === true);
      }),
    );
}

interface FilterOptions {
  vm?: string;
  repository?: string;
}

async function filterQuery(
  api: Api,
  options: FilterOptions,
): Promise<{ vmId?: string; repositoryId?: string }> {
  return {
    ...(options.vm === undefined ? {} : { vmId: (await findVm(api, options.vm)).id }),
    ...(options.repository === undefined
      ? {}
      : { repositoryId: (await findRepository(api, options.repository)).id }),
  };
}

function addFilters(command: Command): Command {
  return command
    .option('--vm <vm>', 'only of this machine, by name or id')
    .option('--repository <repository>', 'only in this repository, by name or id');
}

function addList(group: Command, context: CommandContext): void {
  addPaging(addFilters(group.command('list').description('list points, newest first'))).action(
    action<FilterOptions & PagingOptions>(context, async ({ session, options }) => {
      const paging = pageQuery(options);
      const api = await session.api();
      const query = { ...(await filterQuery(api, options)), ...paging };
      const page = dataOf(await api.GET('/backups', { params: { query } }));
      printPage(session, page, [
        { title: 'POINT', value: (point) => point.id },
        { title: 'VM', value: (point) => point.vmName },
        { title: '#', value: (point) => String(point.sequence), align: 'right' },
        { title: 'TYPE', value: (point) => point.type },
        { title: 'CAPTURED', value: (point) => formatTime(point.capturedAt) },
        { title: 'STORED', value: (point) => formatBytes(point.fileBytes), align: 'right' },
      ]);
      return undefined;
    }),
  );
}

function formatPoint(point: Schemas['Backup']): string {
  const fields = formatFields([
    ['point', point.id],
    ['vm', `${point.vmName} (${point.vmId})`],
    ['repository', point.repositoryId],
    ['run', point.runId],
    ['sequence', String(point.sequence)],
    ['type', point.type],
    ['consistency', point.consistency],
    ['captured', formatTime(point.capturedAt)],
    ['committed', formatTime(point.committedAt)],
    ['stored', formatBytes(point.fileBytes)],
  ]);
  const layers = formatTable(point.layers, [
    { title: 'DISK', value: (layer) => layer.diskName },
    { title: 'LAYER', value: (layer) => layer.id },
    { title: 'METHOD', value: (layer) => layer.method },
    { title: 'SIZE', value: (layer) => formatBytes(layer.sizeBytes), align: 'right' },
    { title: 'READ', value: (layer) => formatBytes(layer.bytesRead), align: 'right' },
    { title: 'WRITTEN', value: (layer) => formatBytes(layer.bytesWritten), align: 'right' },
    { title: 'STORED', value: (layer) => formatBytes(layer.fileBytes), align: 'right' },
    { title: 'REASON', value: (layer) => layer.reason.sentence },
  ]);
  return `${fields}\n${layers}`;
}

function addShow(group: Command, context: CommandContext): void {
  group
    .command('show <point>')
    .description('show a point and its layers')
    .action(
      action(context, async ({ session, args }) => {
        const api = await session.api();
        const id = parseId(argument(args), 'point');
        const point = dataOf(await api.GET('/backups/{id}', { params: { path: { id } } }));
        session.print(point, () => formatPoint(point));
        return undefined;
      }),
    );
}

function formatChain(chain: Schemas['Chain']): string {
  const top = chain.layers[0]?.path;
  const layers = formatTable(chain.layers, [
    { title: 'POINT', value: (layer) => layer.pointId },
    { title: 'METHOD', value: (layer) => layer.method },
    { title: 'STORED', value: (layer) => formatBytes(layer.fileBytes), align: 'right' },
    { title: 'FILE', value: (layer) => layer.path },
  ]);
  const hint =
    top === undefined
      ? ''
      : `Read it without Holdfast: qemu-img convert -f qcow2 -O raw ${safeText(top)} disk.raw\n`;
  return `${safeText(chain.diskName)} (top first)\n${layers}${hint}`;
}

function addChain(group: Command, context: CommandContext): void {
  group
    .command('chain <point>')
    .description('show the files a point is made of')
    .action(
      action(context, async ({ session, args }) => {
        const api = await session.api();
        const id = parseId(argument(args), 'point');
        const chains = dataOf(await api.GET('/backups/{id}/chain', { params: { path: { id } } }));
        session.print(chains, () => chains.items.map(formatChain).join('\n'));
        return undefined;
      }),
    );
}

function addStats(group: Command, context: CommandContext): void {
  addFilters(group.command('stats').description('count points and the space they take')).action(
    action<FilterOptions>(context, async ({ session, options }) => {
      const api = await session.api();
      const query = await filterQuery(api, options);
      const stats = dataOf(await api.GET('/backups/stats', { params: { query } }));
      session.print(stats, () =>
        formatFields([
          ['points', String(stats.points)],
          ['full', String(stats.fullPoints)],
          ['incremental', String(stats.incrementalPoints)],
          ['machines', String(stats.vms)],
          ['stored', formatBytes(stats.fileBytes)],
          ['oldest', formatTime(stats.oldestCapturedAt)],
          ['newest', formatTime(stats.newestCapturedAt)],
        ]),
      );
      return undefined;
    }),
  );
}
