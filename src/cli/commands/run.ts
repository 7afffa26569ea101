import type { Command } from 'commander';
import { action, argument, type CommandContext } from '../action.js';
import { dataOf, type Schemas } from '../client.js';
import { usageFailure } from '../failure.js';
import { diskNamesOf, followRun } from '../follow.js';
import { addPaging, pageQuery, printPage, type PagingOptions } from '../paging.js';
import { formatRun, formatTime } from '../render.js';
import { findVm, parseId } from '../resolve.js';
import { formatTable } from '../table.js';

const KINDS = [
  'backup',
  'restore',
  'check',
  'rescan',
  'delete',
  'materialize',
  'attach-volume',
  'detach-volume',
] as const;
const STATES = ['queued', 'running', 'completed', 'failed', 'cancelled', 'interrupted'] as const;
const LOG_PAGE = 1000;

function choice<T extends string>(
  text: string | undefined,
  allowed: readonly T[],
  option: string,
): T | undefined {
  const found = allowed.find((candidate) => candidate === text);
  if (text !== undefined && found === undefined) {
    throw usageFailure(`${option} is none of ${allowed.join(', ')}`);
  }
  return found;
}

export function addRunCommands(program: Command, context: CommandContext): void {
  const group = program.command('run').description('what is running and what ran');
  addList(group, context);
  group
    .command('show <run>')
    .description('show a run')
    .action(
      action(context, async ({ session, args }) => {
        const api = await session.api();
        const id = parseId(argument(args), 'run');
        const run = dataOf(await api.GET('/runs/{id}', { params: { path: { id } } }));
        const diskNames = await diskNamesOf(api, run);
        session.print(run, () => formatRun(run, diskNames));
        return undefined;
      }),
    );
  group
    .command('watch <run>')
    .description('follow a run to its end; the exit code tells how it ended')
    .action(
      action(context, async ({ session, args }) => {
        const api = await session.api();
        const id = parseId(argument(args), 'run');
        return followRun(session, dataOf(await api.GET('/runs/{id}', { params: { path: { id } } })));
      }),
    );
  addCancelAndLog(group, context);
}

interface ListOptions extends PagingOptions {
  kind?: string;
  state?: string;
  vm?: string;
}

function addList(group: Command, context: CommandContext): void {
  const list = group
    .command('list')
    .description('list runs, newest first')
    .option('--kind <kind>', KINDS.join(', '))
    .option('--state <state>', STATES.join(', '))
    .option('--vm <vm>', 'only of this machine, by name or id');
  addPaging(list).action(
    action<ListOptions>(context, async ({ session, options }) => {
      const kind = choice(options.kind, KINDS, '--kind');
      const state = choice(options.state, STATES, '--state');
      const paging = pageQuery(options);
      const api = await session.api();
      const query = {
        ...paging,
        ...(kind === undefined ? {} : { kind }),
        ...(state === undefined ? {} : { state }),
        ...(options.vm === undefined ? {} : { vmId: (await findVm(api, options.vm)).id }),
      };
      const page = dataOf(await api.GET('/runs', { params: { query } }));
      printPage(session, page, [
        { title: 'RUN', value: (run) => run.id },
        { title: 'KIND', value: (run) => run.kind },
        { title: 'STATE', value: (run) => run.state + (run.isStalled ? ' (stalled)' : '') },
        { title: 'CREATED', value: (run) => formatTime(run.createdAt) },
        { title: 'ENDED', value: (run) => formatTime(run.endedAt) },
        { title: 'ERROR', value: (run) => run.error?.code ?? '' },
      ]);
      return undefined;
    }),
  );
}

function addCancelAndLog(group: Command, context: CommandContext): void {
  group
    .command('cancel <run>')
    .description('ask a run to stop')
    .action(
      action(context, async ({ session, args }) => {
        const api = await session.api();
        const id = parseId(argument(args), 'run');
        const run = dataOf(await api.POST('/runs/{id}/cancel', { params: { path: { id } } }));
        const text = run.state === 'cancelled' ? 'is cancelled' : 'is asked to stop';
        session.print(run, () => `Run ${run.id} ${text}.\n`);
        return undefined;
      }),
    );
  group
    .command('log <run>')
    .description('show the log of a run')
    .action(
      action(context, async ({ session, args }) => {
        const api = await session.api();
        const id = parseId(argument(args), 'run');
        const items: Schemas['RunEvent'][] = [];
        for (let isFull = true; isFull;) {
          const query = { afterSequence: items.at(-1)?.sequence ?? 0, limit: LOG_PAGE };
          const page = dataOf(await api.GET('/runs/{id}/log', { params: { path: { id }, query } }));
          items.push(...page.items);
          isFull = page.items.length === LOG_PAGE;
        }
        session.print({ items }, () =>
          formatTable(items, [
            { title: 'AT', value: (event) => formatTime(event.at) },
            { title: 'LEVEL', value: (event) => event.level },
            { title: 'CODE', value: (event) => event.code },
            { title: 'MESSAGE', value: (event) => event.message },
          ]),
        );
        return undefined;
      }),
    );
}
