import type { Command } from 'commander';
import { action, argument, type CommandContext } from '../action.js';
import { dataOf, expectDone } from '../client.js';
import { formatTime } from '../render.js';
import { parseId } from '../resolve.js';
import { createSecretFile } from '../secret-file.js';
import { formatTable } from '../table.js';
import { safeText } from '../text.js';

export function addTokenCommands(program: Command, context: CommandContext): void {
  const group = program.command('token').description('tokens that open the API');
  group
    .command('create <name>')
    .description('make a token; its text is shown this once, or written to a file')
    .option('--out <file>', 'write the text to this new file, mode 0600, instead of showing it')
    .action(
      action<{ out?: string }>(context, async ({ session, args, options }) => {
        const api = await session.api();
        // The file comes first: a token whose text could not be kept would be of no use.
        await using file = options.out === undefined ? null : await createSecretFile(options.out);
        const { token, secret } = dataOf(await api.POST('/tokens', { body: { name: argument(args) } }));
        if (file === null) {
          session.print({ token, secret }, () => `${secret}\n`);
          session.note(`Token ${token.id}. Its text is not shown again.`);
        } else {
          await file.writeFile(`${secret}\n`);
          session.print(
            { token, file: options.out },
            () => `Token ${token.id} is in ${safeText(options.out ?? '')}.\n`,
          );
        }
        return undefined;
      }),
    );
  group
    .command('list')
    .description('list tokens')
    .action(
      action(context, async ({ session }) => {
        const tokens = dataOf(await (await session.api()).GET('/tokens'));
        session.print(tokens, () =>
          formatTable(tokens.items, [
            { title: 'ID', value: (token) => token.id },
            { title: 'NAME', value: (token) => token.name },
            { title: 'CREATED', value: (token) => formatTime(token.createdAt) },
            { title: 'LAST USED', value: (token) => formatTime(token.lastUsedAt) },
          ]),
        );
        return undefined;
      }),
    );
  group
    .command('revoke <id>')
    .description('make a token worthless')
    .action(
      action(context, async ({ session, args }) => {
        const api = await session.api();
        const id = parseId(argument(args), 'token');
        expectDone(await api.DELETE('/tokens/{id}', { params: { path: { id } } }));
        session.print({ revoked: id }, () => `Token ${id} is revoked.\n`);
        return undefined;
      }),
    );
}
