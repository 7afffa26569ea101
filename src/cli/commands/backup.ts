import type { Command } from 'commander';
import { formatBytes } from '../../lib/units.js';
import { action, argument, collect, type CommandContext } from '../action.js';
import { dataOf, type Api, type Schemas } from '../client.js';
import { runStarted } from '../follow.js';
import { addPaging, pageQuery, printPage, type PagingOptions } from '../paging.js';
import { oneOf, parseBitmap, parseBytes } from '../parse.js';
import { formatTime } from '../render.js';
import { findDisk, findRepository, findVm, parseId } from '../resolve.js';
import type { Session } from '../session.js';
import { formatFields, formatTable } from '../table.js';
import { safeText } from '../text.js';

interface SelectionOptions {
  repository: string;
  type: string;
  bitmap?: string[];
  disk?: string[];
  excludeDisk?: string[];
}

interface RunOptions extends SelectionOptions {
  consistency: string;
  rate?: string;
  queue?: boolean;
  detach?: boolean;
}

export function addBackupCommands(program: Command, context: CommandContext): void {
  const group = program.command('backup').description('recovery points of machines');
  addRun(group, context);
  addEstimate(group, context);
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

/** The options that a backup and its estimate have in common. */
function addSelection(command: Command): Command {
  return command
    .requiredOption('--repository <repository>', 'where to, by name or id')
    .option('--type <type>', 'auto, full or incremental', 'auto')
    .option('--bitmap <bitmap>', 'DISK=BITMAP@POINT: a bitmap that began at that point; repeatable', collect)
    .option('--disk <disk>', 'only this disk, by name, id, target or serial; repeatable', collect)
    .option('--exclude-disk <disk>', 'not this disk; repeatable', collect);
}

/** Looks up what the options name; what is wrong in them is told before the daemon is asked. */
async function selectionOf(
  session: Session,
  text: string,
  options: SelectionOptions,
): Promise<Schemas['EstimateRequest']> {
  const type = oneOf(options.type, ['auto', 'full', 'incremental'], '--type');
  const stated = (options.bitmap ?? []).map(parseBitmap);
  const api = await session.api();
  const vm = await findVm(api, text);
  const repository = await findRepository(api, options.repository);
  const bitmaps = stated.map(({ disk, name, sincePointId }) => ({
    diskId: findDisk(vm.disks, disk).id,
    name,
    sincePointId: parseId(sincePointId, 'point'),
  }));
  const disks = { include: options.disk ?? [], exclude: options.excludeDisk ?? [] };
  return { vmId: vm.id, repositoryId: repository.id, type, bitmaps, disks };
}

function addRun(group: Command, context: CommandContext): void {
  addSelection(group.command('run <vm>').description('back a machine up now, by name or id'))
    .option('--consistency <wish>', 'freeze the guest: prefer, require or never', 'prefer')
    .option('--rate <bytes>', 'read at most so much a second, e.g. 100MiB')
    .option('--queue', 'wait when another run of this machine and repository is active')
    .option('--detach', 'do not wait for the end')
    .action(
      action<RunOptions>(context, async ({ session, args, options }) => {
        const bytesPerSecond = options.rate === undefined ? 0 : parseBytes(options.rate, '--rate');
        const consistency = oneOf(options.consistency, ['prefer', 'require', 'never'], '--consistency');
        const whenBusy = options.queue === true ? ('queue' as const) : ('refuse' as const);
        const selection = await selectionOf(session, argument(args), options);
        const body = { ...selection, bytesPerSecond, consistency, whenBusy };
        const run = dataOf(await (await session.api()).POST('/backups', { body }));
        return runStarted(session, run, options.detach === true);
      }),
    );
}

function formatEstimate({ disks, totalBytes }: Schemas['BackupEstimate']): string {
  const table = formatTable(disks, [
    { title: 'DISK', value: (disk) => disk.diskName },
    { title: 'SIZE', value: (disk) => formatBytes(disk.sizeBytes), align: 'right' },
    { title: 'METHOD', value: (disk) => disk.method ?? 'left out' },
    {
      title: 'READS',
      value: (disk) => (disk.method === null ? '-' : formatAmount(disk.bytes)),
      align: 'right',
    },
    { title: 'REASON', value: (disk) => disk.reason.sentence },
  ]);
  return `${table}\n${formatFields([['reads in all', formatAmount(totalBytes)]])}`;
}

function formatAmount(bytes: number | null): string {
  return bytes === null ? 'unknown' : formatBytes(bytes);
}

function addEstimate(group: Command, context: CommandContext): void {
  addSelection(group.command('estimate <vm>').description('what a backup would do now, and why')).action(
    action<SelectionOptions>(context, async ({ session, args, options }) => {
      const body = await selectionOf(session, argument(args), options);
      const estimate = dataOf(await (await session.api()).POST('/backups/estimate', { body }));
      session.print(estimate, () => formatEstimate(estimate));
      return undefined;
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
        { title: 'CONSISTENCY', value: (point) => point.consistency },
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
