import { existsSync, readFileSync } from 'node:fs';
import { readdir, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { EXIT } from '../../src/cli/failure.js';
import { startCliFixture, type CliFixture } from './fixture.js';

const DOCS = path.join(import.meta.dirname, '../../docs');
const read = (name: string): string => readFileSync(path.join(DOCS, name), 'utf8');

let cli: CliFixture;
beforeAll(async () => {
  cli = await startCliFixture();
});
afterAll(async () => {
  await cli[Symbol.asyncDispose]();
});

/** The commands of a group, from its help. */
async function commandsOf(group: string[]): Promise<string[]> {
  const { stdout } = await cli.run([...group, '--help']);
  const list = stdout.slice(stdout.indexOf('Commands:')).split('\n').slice(1);
  return list
    .map((line) => /^ {2}([a-z-]+)/.exec(line)?.[1])
    .filter((name): name is string => name !== undefined && name !== 'help');
}

const GROUPS = [
  ...['repository', 'vm', 'backup', 'restore', 'export', 'export identity', 'volume', 'operation', 'run'],
  ...['token', 'config'],
];

describe('the command reference', () => {
  const reference = read('reference/cli.md');

  test('names every command and every option', async () => {
    for (const group of GROUPS) {
      const words = group.split(' ');
      const commands = await commandsOf(words);
      expect(commands.length).toBeGreaterThan(0);
      for (const command of commands) {
        expect(reference, `${group} ${command}`).toMatch(
          new RegExp(`holdfast ${group} (?:[^\\n]*\\| )?${command}\\b`),
        );
        const { stdout } = await cli.run([...words, command, '--help']);
        const options = [...stdout.matchAll(/^ {2}(--[a-z-]+)/gm)].map((match) => match[1]!);
        const shared = ['--limit', '--cursor'];
        for (const option of options.filter((name) => !shared.includes(name))) {
          expect(reference, `${group} ${command} ${option}`).toContain(option);
        }
      }
    }
    for (const command of await commandsOf([])) expect(reference).toContain(`holdfast ${command}`);
  });

  test('has each exit code', () => {
    for (const code of Object.values(EXIT)) expect(reference).toMatch(new RegExp(`^\\| ${code} +\\|`, 'm'));
  });
});

test('the configuration reference has each setting with its default', async () => {
  const reference = read('reference/configuration.md');
  const file = path.join(cli.directory, 'empty.yaml');
  await writeFile(file, '');
  const { json } = await cli.run(['config', 'show', '--json', '--config', file]);
  const { items } = json as { items: { name: string; default: string; comment: string }[] };
  for (const item of items) {
    const row = reference.split('\n').find((line) => line.startsWith(`| \`${item.name}\` `));
    expect(row, item.name).toBeDefined();
    if (item.default !== '') expect(row).toContain(`\`${item.default}\``);
    expect(row?.replaceAll('\\|', '|')).toContain(item.comment);
  }
});

test('every link between the pages leads somewhere', async () => {
  const names = (await readdir(DOCS, { recursive: true })).filter((name) => name.endsWith('.md'));
  expect(names.length).toBeGreaterThan(9);
  for (const name of names) {
    for (const [, target, anchor] of read(name).matchAll(/\]\(([^)#:]*)(?:#([^)]*))?\)/g)) {
      const file = target === '' ? path.join(DOCS, name) : path.join(DOCS, path.dirname(name), target!);
      expect(existsSync(file), `${name}: ${target}`).toBe(true);
      if (anchor === undefined) continue;
      const headings = [...readFileSync(file, 'utf8').matchAll(/^#+ (.*)$/gm)].map((match) =>
        match[1]!
          .toLowerCase()
          .replaceAll('`', '')
          .replaceAll(/[^\w -]/g, '')
          .replaceAll(' ', '-'),
      );
      expect(headings, `${name}: ${target}#${anchor}`).toContain(anchor);
    }
  }
});
