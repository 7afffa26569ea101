import path from 'node:path';
import type { Command } from 'commander';
import { formatBytes } from '../../lib/units.js';
import { action, argument, type CommandContext } from '../action.js';
import { dataOf, type Schemas } from '../client.js';
import { usageFailure } from '../failure.js';
import { runStarted } from '../follow.js';
import { addPaging, pageQuery, printPage, type PagingOptions } from '../paging.js';
import { formatTime } from '../render.js';
import { findRepository, findVm, parseId } from '../resolve.js';
import { formatFields } from '../table.js';

type Repository = Schemas['Repository'];

function stateOf(repository: Repository): string {
  if (repository.problem !== null) return `${repository.problem.code}: ${repository.problem.message}`;
  return repository.isOnline ? 'online' : 'offline';
}

function formatRepository(repository: Repository): string {
  const { capacity } = repository;
  return formatFields([
    ['id', repository.id],
    ['name', repository.name],
    ['directory', repository.root],
    ['hash', repository.hash],
    ['created', formatTime(repository.createdAt)],
    ['state', stateOf(repository)],
    ['available', capacity === null ? '-' : formatBytes(capacity.availableBytes)],
    ['free', capacity === null ? '-' : formatBytes(capacity.freeBytes)],
    ['reserve', capacity === null ? '-' : formatBytes(capacity.reserveBytes)],
    ['size', capacity === null ? '-' : formatBytes(capacity.totalBytes)],
    ...(repository.problem === null ? [] : [['remedy', repository.problem.remedy] as const]),
  ]);
}

export function addRepositoryCommands(program: Command, context: CommandContext): void {
  const group = program.command('repository').description('where backups are kept');
  addCreate(group, context);
  addPaging(group.command('list').description('list repositories')).action(
    action<PagingOptions>(context, async ({ session, options }) => {
      const api = await session.api();
      const page = dataOf(await api.GET('/repositories', { params: { query: pageQuery(options) } }));
      printPage(session, page, [
        { title: 'ID', value: (item) => item.id },
        { title: 'NAME', value: (item) => item.name },
        { title: 'DIRECTORY', value: (item) => item.root },
        { title: 'STATE', value: stateOf },
        {
          title: 'AVAILABLE',
          value: ({ capacity }) => (capacity === null ? '-' : formatBytes(capacity.availableBytes)),
          align: 'right',
        },
      ]);
      return undefined;
    }),
  );
  group
    .command('show <repository>')
    .description('show a repository, by name or id')
    .action(
      action(context, async ({ session, args }) => {
        const found = await findRepository(await session.api(), argument(args));
        session.print(found, () => formatRepository(found));
        return undefined;
      }),
    );
  addCheck(group, context);
  group
    .command('rescan <repository>')
    .description('rebuild the index of a repository from its manifests')
    .option('--detach', 'do not wait for the end')
    .action(
      action<{ detach?: boolean }>(context, async ({ session, args, options }) => {
        const api = await session.api();
        const { id } = await findRepository(api, argument(args));
        const run = dataOf(await api.POST('/repositories/{id}/rescan', { params: { path: { id } } }));
        return runStarted(session, run, options.detach === true);
      }),
    );
}

interface CreateOptions {
  hash: string;
  open?: boolean;
  takeover?: boolean;
}

function addCreate(group: Command, context: CommandContext): void {
  group
    .command('create <name> <directory>')
    .description('make a directory of the daemon’s host a repository, or add an existing repository')
    .option('--hash <algorithm>', 'xxh3-128, or sha-256 as evidence against tampering', 'xxh3-128')
    .option('--open', 'the directory is a repository already: add it and read its points')
    .option('--takeover', 'with --open: take it from the appliance that owns it')
    .action(
      action<CreateOptions>(context, async ({ session, args, options }) => {
        const { hash } = options;
        if (hash !== 'xxh3-128' && hash !== 'sha-256') {
          throw usageFailure('--hash is none of xxh3-128, sha-256');
        }
        if (options.takeover === true && options.open !== true) {
          throw usageFailure('--takeover needs --open');
        }
        const api = await session.api();
        const answer = await api.POST('/repositories', {
          body: {
            name: argument(args),
            root: path.resolve(argument(args, 1)),
            hash,
            mode: options.open === true ? 'open' : 'create',
            takeover: options.takeover === true,
          },
        });
        const made = dataOf(answer);
        session.print(made, () => formatRepository(made));
        return undefined;
      }),
    );
}

interface CheckOptions {
  structureOnly?: boolean;
  vm?: string;
  point?: string;
  detach?: boolean;
}

function addCheck(group: Command, context: CommandContext): void {
  group
    .command('check <repository>')
    .description('compare what is stored with its manifests and hashes; exit code 1 when damage is found')
    .option('--structure-only', 'do not read the content')
    .option('--vm <vm>', 'only this machine, by name or id')
    .option('--point <id>', 'only this point')
    .option('--detach', 'do not wait for the end')
    .action(
      action<CheckOptions>(context, async ({ session, args, options }) => {
        const api = await session.api();
        const { id } = await findRepository(api, argument(args));
        const body = {
          content: options.structureOnly !== true,
          vmId: options.vm === undefined ? null : (await findVm(api, options.vm)).id,
          pointId: options.point === undefined ? null : parseId(options.point, '--point'),
        };
        const run = dataOf(await api.POST('/repositories/{id}/check', { params: { path: { id } }, body }));
        return runStarted(session, run, options.detach === true);
      }),
    );
}
