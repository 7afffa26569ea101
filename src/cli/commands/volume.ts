import path from 'node:path';
import type { Command } from 'commander';
import { action, argument, type CommandContext } from '../action.js';
import { dataOf, expectDone } from '../client.js';
import { operationStarted } from '../follow.js';
import { addPaging, pageQuery, printPage, type PagingOptions } from '../paging.js';
import { DEVICE_COLUMNS, formatVolume, VOLUME_COLUMNS } from '../render-attachments.js';
import { findVolume } from '../resolve.js';
import { formatTable } from '../table.js';
import { safeText } from '../text.js';

export function addVolumeCommands(program: Command, context: CommandContext): void {
  const group = program.command('volume').description('block devices of the daemon’s host');
  addDiscoverAndAdd(group, context);
  addListAndShow(group, context);
  addAttachAndDetach(group, context);
  group
    .command('remove <volume>')
    .description('forget a volume that is not attached; what is on it stays')
    .action(
      action(context, async ({ session, args }) => {
        const api = await session.api();
        const { id, name } = await findVolume(api, argument(args));
        expectDone(await api.DELETE('/volumes/{id}', { params: { path: { id } } }));
        session.print({ removed: id }, () => `${safeText(name)} is forgotten.\n`);
        return undefined;
      }),
    );
}

function addDiscoverAndAdd(group: Command, context: CommandContext): void {
  group
    .command('discover')
    .description('show the devices that are there now, and what tells them from each other')
    .action(
      action(context, async ({ session }) => {
        const devices = dataOf(await (await session.api()).GET('/volumes/devices'));
        session.print(devices, () => formatTable(devices.items, DEVICE_COLUMNS));
        return undefined;
      }),
    );
  group
    .command('add <device>')
    .description('register a device, by an identity of `discover` or by its path')
    .option('--name <name>', 'default: that of the device')
    .action(
      action<{ name?: string }>(context, async ({ session, args, options }) => {
        const device = argument(args);
        const isPath = path.isAbsolute(device);
        const body = {
          name: options.name ?? null,
          identity: isPath ? null : device,
          devicePath: isPath ? device : null,
        };
        const volume = dataOf(await (await session.api()).POST('/volumes', { body }));
        session.print(volume, () => formatVolume(volume));
        return undefined;
      }),
    );
}

function addListAndShow(group: Command, context: CommandContext): void {
  addPaging(group.command('list').description('list volumes')).action(
    action<PagingOptions>(context, async ({ session, options }) => {
      const api = await session.api();
      const page = dataOf(await api.GET('/volumes', { params: { query: pageQuery(options) } }));
      printPage(session, page, VOLUME_COLUMNS);
      return undefined;
    }),
  );
  group
    .command('show <volume>')
    .description('show a volume, by name or id')
    .action(
      action(context, async ({ session, args }) => {
        const volume = await findVolume(await session.api(), argument(args));
        session.print(volume, () => formatVolume(volume));
        return undefined;
      }),
    );
  group
    .command('device <volume>')
    .description('print the path of the device of an attached volume, checked just now')
    .action(
      action(context, async ({ session, args }) => {
        const api = await session.api();
        const { id } = await findVolume(api, argument(args));
        const device = dataOf(await api.GET('/volumes/{id}/device', { params: { path: { id } } }));
        session.print(device, () => `${safeText(device.devicePath)}\n`);
        return undefined;
      }),
    );
}

function addAttachAndDetach(group: Command, context: CommandContext): void {
  group
    .command('attach <volume>')
    .description('find the device and keep it for this volume alone')
    .option('--no-wait', 'do not wait for the end')
    .action(
      action<{ wait: boolean }>(context, async ({ session, args, options }) => {
        const api = await session.api();
        const { id } = await findVolume(api, argument(args));
        const operation = dataOf(await api.POST('/volumes/{id}/attach', { params: { path: { id } } }));
        return operationStarted(session, operation, options.wait);
      }),
    );
  group
    .command('detach <volume>')
    .description('release the device')
    .option('--no-wait', 'do not wait for the end')
    .action(
      action<{ wait: boolean }>(context, async ({ session, args, options }) => {
        const api = await session.api();
        const { id } = await findVolume(api, argument(args));
        const operation = dataOf(await api.POST('/volumes/{id}/detach', { params: { path: { id } } }));
        return operationStarted(session, operation, options.wait);
      }),
    );
}
