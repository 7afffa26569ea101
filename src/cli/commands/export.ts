import path from 'node:path';
import type { Command } from 'commander';
import { action, argument, type CommandContext } from '../action.js';
import { dataOf, expectDone, type Schemas } from '../client.js';
import { EXIT, usageFailure } from '../failure.js';
import { operationStarted } from '../follow.js';
import { addPaging, pageQuery, printPage, type PagingOptions } from '../paging.js';
import { parseDuration, parseIdentity } from '../parse.js';
import {
  EXPORT_COLUMNS,
  formatExport,
  formatExportDaemon,
  formatExportExample,
} from '../render-attachments.js';
import { findExport, findVolume, parseId } from '../resolve.js';
import { createSecretFile } from '../secret-file.js';
import { formatTable } from '../table.js';
import { safeText } from '../text.js';

export function addExportCommands(program: Command, context: CommandContext): void {
  const group = program.command('export').description('points and volumes over NBD');
  addPublish(group, context);
  addList(group, context);
  addRemoveAndMaterialize(group, context);
  addStatus(group, context);
  addIdentity(group, context);
}

interface PublishOptions {
  disk?: string;
  volume?: string;
  writable?: boolean;
  overlay?: string;
  ttl?: string;
  pskUser?: string;
  x509Name?: string;
}

function addPublish(group: Command, context: CommandContext): void {
  group
    .command('publish [point]')
    .description('offer a disk of a point, or a volume, over NBD')
    .option('--disk <disk>', 'the disk, by name or id, of a point with several')
    .option('--volume <volume>', 'in place of a point: a volume, by name or id')
    .option('--writable', 'writes go to a throw-away overlay, of a volume to the volume itself')
    .option('--overlay <file>', 'with --writable: where the overlay of a point lies, a new file')
    .option('--ttl <time>', 'remove it after this time, e.g. 30m, 1h, 7d; 0 for never')
    .option('--psk-user <user>', 'only for this user, with a key of `holdfast export identity create`')
    .option('--x509-name <name>', 'only for the client with this certificate')
    .action(
      action<PublishOptions>(context, async ({ session, args, options }) => {
        const wishes = publishWishes(args[0], options);
        const api = await session.api();
        const volumeId = options.volume === undefined ? null : (await findVolume(api, options.volume)).id;
        const made = dataOf(await api.POST('/exports', { body: { ...wishes, volumeId } }));
        session.print(made, () => formatExport(made) + formatExportExample(made));
        return undefined;
      }),
    );
}

/** What is wrong in the options is told before the daemon is asked. */
function publishWishes(
  point: string | undefined,
  options: PublishOptions,
): Omit<Schemas['ExportRequest'], 'volumeId'> {
  const { disk, volume, writable, overlay, ttl } = options;
  if ((point === undefined) === (volume === undefined)) throw usageFailure('give either a point or --volume');
  if (volume !== undefined && disk !== undefined) throw usageFailure('--disk is for a point');
  if (overlay !== undefined && (writable !== true || volume !== undefined)) {
    throw usageFailure('--overlay is for a point, with --writable');
  }
  return {
    pointId: point === undefined ? null : parseId(point, 'point'),
    disk: disk ?? null,
    isReadOnly: writable !== true,
    overlayPath: overlay === undefined ? null : path.resolve(overlay),
    ttlSeconds: ttl === undefined ? null : parseDuration(ttl, '--ttl'),
    identity: parseIdentity(options),
  };
}

interface ListOptions extends PagingOptions {
  point?: string;
  volume?: string;
}

function addList(group: Command, context: CommandContext): void {
  const list = group
    .command('list')
    .description('list exports, newest first')
    .option('--point <point>', 'only of this point')
    .option('--volume <volume>', 'only of this volume, by name or id');
  addPaging(list).action(
    action<ListOptions>(context, async ({ session, options }) => {
      const paging = pageQuery(options);
      const point = options.point === undefined ? {} : { pointId: parseId(options.point, '--point') };
      const api = await session.api();
      const volume =
        options.volume === undefined ? {} : { volumeId: (await findVolume(api, options.volume)).id };
      const query = { ...paging, ...point, ...volume };
      printPage(session, dataOf(await api.GET('/exports', { params: { query } })), EXPORT_COLUMNS);
      return undefined;
    }),
  );
  group
    .command('show <export>')
    .description('show an export, by name or id')
    .action(
      action(context, async ({ session, args }) => {
        const found = await findExport(await session.api(), argument(args));
        session.print(found, () => formatExport(found));
        return undefined;
      }),
    );
}

function addRemoveAndMaterialize(group: Command, context: CommandContext): void {
  group
    .command('remove <export>')
    .description('stop publishing: clients are cut off, a throw-away overlay is removed')
    .action(
      action(context, async ({ session, args }) => {
        const api = await session.api();
        const { id, name } = await findExport(api, argument(args));
        expectDone(await api.DELETE('/exports/{id}', { params: { path: { id } } }));
        session.print({ removed: id }, () => `${safeText(name)} is not published any more.\n`);
        return undefined;
      }),
    );
  group
    .command('materialize <export>')
    .description('turn the overlay of a writable export into an image that stands alone, while it is in use')
    .option('--wait', 'follow it to its end')
    .action(
      action<{ wait?: boolean }>(context, async ({ session, args, options }) => {
        const api = await session.api();
        const { id } = await findExport(api, argument(args));
        const operation = dataOf(await api.POST('/exports/{id}/materialize', { params: { path: { id } } }));
        return operationStarted(session, operation, options.wait === true);
      }),
    );
}

function addStatus(group: Command, context: CommandContext): void {
  group
    .command('status')
    .description('the export daemon; exit code 1 when it does not run or something is not served')
    .action(
      action(context, async ({ session }) => {
        const daemon = dataOf(await (await session.api()).GET('/exports/daemon'));
        session.print(daemon, () => formatExportDaemon(daemon));
        const { isRunning, status } = daemon;
        const isWell =
          isRunning &&
          status !== null &&
          status.listeners.every(({ state }) => state === 'up') &&
          status.files.every(({ state }) => state === 'served');
        return isWell ? EXIT.ok : EXIT.failed;
      }),
    );
}

function addIdentity(group: Command, context: CommandContext): void {
  const identity = group
    .command('identity')
    .description('users with a pre-shared key, for `publish --psk-user`');
  identity
    .command('create <user>')
    .description('make a key; it is shown this once, or written to a file')
    .option('--out <file>', 'write it to this new file, mode 0600, as clients take it')
    .action(
      action<{ out?: string }>(context, async ({ session, args, options }) => {
        const api = await session.api();
        // The file comes first: a key that could not be kept would be of no use.
        await using file = options.out === undefined ? null : await createSecretFile(options.out);
        const made = dataOf(await api.POST('/exports/identities', { body: { user: argument(args) } }));
        const line = `${made.user}:${made.key}\n`;
        if (file === null) {
          session.print(made, () => line);
          session.note(`The key of ${made.user} is not shown again.`);
        } else {
          await file.writeFile(line);
          const out = options.out ?? '';
          session.print(
            { user: made.user, file: out },
            () => `The key of ${safeText(made.user)} is in ${safeText(out)}.\n`,
          );
        }
        return undefined;
      }),
    );
  identity
    .command('list')
    .description('list users')
    .action(
      action(context, async ({ session }) => {
        const users = dataOf(await (await session.api()).GET('/exports/identities'));
        session.print(users, () => formatTable(users.items, [{ title: 'USER', value: ({ user }) => user }]));
        return undefined;
      }),
    );
  identity
    .command('remove <user>')
    .description('make the key of a user worthless')
    .action(
      action(context, async ({ session, args }) => {
        const api = await session.api();
        const user = argument(args);
        expectDone(await api.DELETE('/exports/identities/{user}', { params: { path: { user } } }));
        session.print({ removed: user }, () => `The key of ${safeText(user)} is gone.\n`);
        return undefined;
      }),
    );
}
