import type { Command } from 'commander';
import { formatBytes } from '../../lib/units.js';
import { action, argument, collect, type CommandContext } from '../action.js';
import { dataOf, expectDone, type Schemas } from '../client.js';
import { usageFailure } from '../failure.js';
import { addPaging, pageQuery, printPage, type PagingOptions } from '../paging.js';
import { parseDisk, parseJsonObject } from '../parse.js';
import { formatSource, formatTime } from '../render.js';
import { findVm } from '../resolve.js';
import { formatFields, formatTable } from '../table.js';
import { safeText } from '../text.js';

type Vm = Schemas['Vm'];
type NewDisk = Schemas['NewVm']['disks'][number];

function formatVm(vm: Vm): string {
  const fields = formatFields([
    ['id', vm.id],
    ['name', vm.name],
    ['added', formatTime(vm.createdAt)],
  ]);
  const disks = formatTable(vm.disks, [
    { title: '#', value: (disk) => String(disk.number), align: 'right' },
    { title: 'DISK', value: (disk) => disk.name },
    { title: 'ID', value: (disk) => disk.id },
    { title: 'SIZE', value: (disk) => formatBytes(disk.sizeBytes), align: 'right' },
    { title: 'TRACKING', value: (disk) => disk.source?.changeTracking ?? '-' },
    { title: 'SOURCE', value: (disk) => formatSource(disk.source) },
  ]);
  return `${fields}\n${disks}`;
}

const DISK_HELP =
  'name=NAME,source=NBD-URI|PATH[,format=raw|qcow2][,tracking=auto|bitmap|compare]' +
  '[,tls-psk-file=PATH][,tls-username=NAME][,tls-certificates=PATH]; repeatable';

export function addVmCommands(program: Command, context: CommandContext): void {
  const group = program.command('vm').description('virtual machines and their disks');
  group
    .command('add <name>')
    .description('record a machine and its disks')
    .option('--disk <disk>', DISK_HELP, collect)
    .option('--disk-json <json>', 'a disk as in the API: {"name": …, "source": {…}}; repeatable', collect)
    .action(
      action<{ disk?: string[]; diskJson?: string[] }>(context, async ({ session, args, options }) => {
        const disks = [
          ...(options.disk ?? []).map(parseDisk),
          // The daemon checks the object against its schema; here it is handed on.
          ...(options.diskJson ?? []).map((text) => parseJsonObject(text, '--disk-json') as NewDisk),
        ];
        if (disks.length === 0) throw usageFailure('a machine needs at least one --disk');
        const api = await session.api();
        const vm = dataOf(await api.POST('/vms', { body: { name: argument(args), disks } }));
        session.print(vm, () => formatVm(vm));
        return undefined;
      }),
    );
  addPaging(group.command('list').description('list machines')).action(
    action<PagingOptions>(context, async ({ session, options }) => {
      const api = await session.api();
      const page = dataOf(await api.GET('/vms', { params: { query: pageQuery(options) } }));
      printPage(session, page, [
        { title: 'ID', value: (vm) => vm.id },
        { title: 'NAME', value: (vm) => vm.name },
        { title: 'DISKS', value: (vm) => String(vm.disks.length), align: 'right' },
        {
          title: 'SIZE',
          value: (vm) => formatBytes(vm.disks.reduce((sum, disk) => sum + disk.sizeBytes, 0)),
          align: 'right',
        },
        { title: 'ADDED', value: (vm) => formatTime(vm.createdAt) },
      ]);
      return undefined;
    }),
  );
  addShowAndRemove(group, context);
}

function addShowAndRemove(group: Command, context: CommandContext): void {
  group
    .command('show <vm>')
    .description('show a machine, by name or id')
    .action(
      action(context, async ({ session, args }) => {
        const vm = await findVm(await session.api(), argument(args));
        session.print(vm, () => formatVm(vm));
        return undefined;
      }),
    );
  group
    .command('remove <vm>')
    .description('forget a machine that has no points')
    .action(
      action(context, async ({ session, args }) => {
        const api = await session.api();
        const vm = await findVm(api, argument(args));
        expectDone(await api.DELETE('/vms/{id}', { params: { path: { id: vm.id } } }));
        session.print({ removed: vm.id }, () => `${safeText(vm.name)} is forgotten.\n`);
        return undefined;
      }),
    );
}
