import type { Command } from 'commander';
import { action, argument, type CommandContext } from '../action.js';
import { dataOf } from '../client.js';
import { formatOperation } from '../render-attachments.js';
import { parseId } from '../resolve.js';

export function addOperationCommands(program: Command, context: CommandContext): void {
  program
    .command('operation')
    .description('what was asked of a volume or an export')
    .command('show <operation>')
    .description('show an operation; `holdfast run watch` and `run log` take its id too')
    .action(
      action(context, async ({ session, args }) => {
        const api = await session.api();
        const id = parseId(argument(args), 'operation');
        const operation = dataOf(await api.GET('/operations/{id}', { params: { path: { id } } }));
        session.print(operation, () => formatOperation(operation));
        return undefined;
      }),
    );
}
