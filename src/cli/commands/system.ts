import type { Command } from 'commander';
import { describeConfig, loadConfig } from '../../config/index.js';
import { action, type CommandContext } from '../action.js';
import { dataOf, problemFailure } from '../client.js';
import { EXIT } from '../failure.js';
import { formatTable } from '../table.js';

export function addSystemCommands(program: Command, context: CommandContext): void {
  addConfig(program, context);
  program
    .command('doctor')
    .description(
      'what the host of the daemon has and lacks, with the fix; exit code 1 when something needed is missing',
    )
    .action(
      action(context, async ({ session }) => {
        const findings = dataOf(await (await session.api()).GET('/doctor'));
        session.print(findings, () =>
          formatTable(findings.items, [
            { title: 'CHECK', value: (item) => item.name },
            { title: 'STATE', value: (item) => (item.isOk ? 'ok' : item.isRequired ? 'MISSING' : 'absent') },
            { title: 'FOUND', value: (item) => item.found },
            { title: 'REMEDY', value: (item) => item.remedy ?? '' },
          ]),
        );
        return findings.items.every((item) => item.isOk || !item.isRequired) ? EXIT.ok : EXIT.failed;
      }),
    );
  program
    .command('health')
    .description('whether the daemon works; needs no token; exit code 1 when a component does not')
    .action(
      action(context, async ({ session }) => {
        const answer = await session.openApi().GET('/health');
        const health = answer.data ?? (answer.response.status === 503 ? answer.error : undefined);
        if (health === undefined || !('components' in health)) {
          throw problemFailure(answer.error, answer.response);
        }
        session.print(health, () =>
          formatTable(health.components, [
            { title: 'COMPONENT', value: (component) => component.name },
            { title: 'STATE', value: (component) => (component.isHealthy ? 'ok' : 'NOT WORKING') },
          ]),
        );
        return health.isHealthy ? EXIT.ok : EXIT.failed;
      }),
    );
}

function addConfig(program: Command, context: CommandContext): void {
  program
    .command('config')
    .description('settings of the daemon')
    .command('show')
    .description('every setting, its value, and where that comes from; reads the files itself')
    .option(
      '--config <file>',
      'configuration file (default: HOLDFAST_CONFIG, else /etc/holdfast/holdfast.yaml)',
    )
    .action(
      action<{ config?: string }>(context, async ({ session, options }) => {
        const { env } = context.environment;
        const file = options.config ?? env['HOLDFAST_CONFIG'];
        const rows = describeConfig(await loadConfig({ env, ...(file === undefined ? {} : { file }) }));
        session.print({ items: rows }, () =>
          formatTable(rows, [
            { title: 'SETTING', value: (row) => row.name },
            { title: 'VALUE', value: (row) => (row.value === '' ? '-' : row.value) },
            { title: 'UNIT', value: (row) => row.unit },
            { title: 'FROM', value: (row) => row.source },
            { title: 'MEANING', value: (row) => row.comment },
          ]),
        );
        return undefined;
      }),
    );
}
