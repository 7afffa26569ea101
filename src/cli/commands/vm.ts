import path from 'node:path';
import type { Command } from 'commander';
import { action, argument, collect, type CommandContext } from '../action.js';
import { dataOf, expectDone, type Api, type Schemas } from '../client.js';
import { usageFailure } from '../failure.js';
import { addPaging, pageQuery, printPage, type PagingOptions } from '../paging.js';
import { parseDisk, parseJsonObject } from '../parse.js';
import { formatReleased, formatVm, formatVmDisks, VM_COLUMNS } from '../render-vm.js';
import { findVm, resolveVolume } from '../resolve.js';
import { formatTable } from '../table.js';
import { safeText } from '../text.js';

type NewDisk = Schemas['NewVm']['disks'][number];

const DISK_HELP =
  'name=NAME,source=NBD-URI|PATH|volume:VOLUME[,format=raw|qcow2][,tracking=auto|bitmap|compare]' +
  '[,tls-psk-file=PATH][,tls-username=NAME][,tls-certificates=PATH], ' +
  'or name=NAME,source=push,size=BYTES; repeatable';

export function addVmCommands(program: Command, context: CommandContext): void {
  const group = program.command('vm').description('virtual machines and their disks');
  addDiscover(group, context);
  group
    .command('add <name>')
    .description('record a machine and its disks by hand')
    .option('--disk <disk>', DISK_HELP, collect)
    .option('--disk-json <json>', 'a disk as in the API: {"name": …, "source": {…}}; repeatable', collect)
    .action(
      action<{ disk?: string[]; diskJson?: string[] }>(context, async ({ session, args, options }) => {
        const named = (options.disk ?? []).map(parseDisk);
        // The daemon checks the object against its schema; here it is handed on.
        const given = (options.diskJson ?? []).map((text) => parseJsonObject(text, '--disk-json') as NewDisk);
        if (named.length + given.length === 0) throw usageFailure('a machine needs at least one --disk');
        const api = await session.api();
        const disks = [...(await resolveVolumes(api, named)), ...given];
        const vm = dataOf(await api.POST('/vms', { body: { name: argument(args), disks } }));
        session.print(vm, () => formatVm(vm));
        return undefined;
      }),
    );
  addPaging(group.command('list').description('list machines')).action(
    action<PagingOptions>(context, async ({ session, options }) => {
      const api = await session.api();
      const page = dataOf(await api.GET('/vms', { params: { query: pageQuery(options) } }));
      printPage(session, page, VM_COLUMNS);
      return undefined;
    }),
  );
  addShow(group, context);
  addReleaseAndRemove(group, context);
}

async function resolveVolumes(api: Api, disks: readonly NewDisk[]): Promise<NewDisk[]> {
  const resolved: NewDisk[] = [];
  for (const { name, source } of disks) resolved.push({ name, source: await resolveVolume(api, source) });
  return resolved;
}

interface DiscoverOptions {
  name?: string[];
  qmp?: string;
  agent?: string;
}

function addDiscover(group: Command, context: CommandContext): void {
  group
    .command('discover [uri]')
    .description('ask a hypervisor for its machines and disks, and record them')
    .option('--name <domain>', 'only this domain; repeatable', collect)
    .option('--qmp <socket>', 'in place of a libvirt URI: the QMP socket of one QEMU')
    .option('--agent <socket>', "with --qmp: the socket of the guest agent's channel")
    .action(
      action<DiscoverOptions>(context, async ({ session, args, options }) => {
        const body = discoverRequest(args[0], options);
        const api = await session.api();
        const found = dataOf(await api.POST('/vms/discover', { body }));
        session.print(found, () => formatTable(found.items, VM_COLUMNS));
        for (const { key, error } of found.problems) {
          session.note(`warning: ${key} could not be looked at: ${error.message} (${error.code})`);
        }
        return undefined;
      }),
    );
}

function discoverRequest(uri: string | undefined, options: DiscoverOptions): Schemas['DiscoverRequest'] {
  const { name, qmp, agent } = options;
  if ((uri === undefined) === (qmp === undefined)) {
    throw usageFailure('give either a libvirt URI, such as qemu:///system, or --qmp');
  }
  if (uri !== undefined) {
    if (agent !== undefined)
      throw usageFailure('--agent is for --qmp: libvirt knows the agent of its guests');
    return { kind: 'libvirt', uri, names: name ?? [] };
  }
  if (name !== undefined) throw usageFailure('--name is for libvirt: a QMP socket has one machine');
  return {
    kind: 'qemu',
    socket: absolute(qmp ?? '', '--qmp'),
    agentSocket: agent === undefined ? null : absolute(agent, '--agent'),
  };
}

function absolute(file: string, option: string): string {
  if (!path.isAbsolute(file)) throw usageFailure(`${option} must be an absolute path`);
  return file;
}

function addShow(group: Command, context: CommandContext): void {
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
    .command('disks <vm>')
    .description('show the disks of a machine, and which of them are backed up')
    .action(
      action(context, async ({ session, args }) => {
        const api = await session.api();
        const { id } = await findVm(api, argument(args));
        const disks = dataOf(await api.GET('/vms/{id}/disks', { params: { path: { id } } }));
        session.print(disks, () => formatVmDisks(disks.items));
        return undefined;
      }),
    );
}

function addReleaseAndRemove(group: Command, context: CommandContext): void {
  group
    .command('release <vm>')
    .description('remove the checkpoints or bitmaps of this appliance from a machine')
    .action(
      action(context, async ({ session, args }) => {
        const api = await session.api();
        const vm = await findVm(api, argument(args));
        const released = dataOf(await api.POST('/vms/{id}/release', { params: { path: { id: vm.id } } }));
        session.print(released, () => formatReleased(vm, released));
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
