import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises';
import os from 'node:os';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { runTool } from '../../src/lib/process.js';

const ROOT = path.resolve(import.meta.dirname, '../..');

interface Report {
  summary: { violations: { from: string; to: string; rule: { name: string } }[] };
}

/** A small tree of its own, judged by the project's rules. */
const FILES: Record<string, string> = {
  'src/lib/units.ts': 'export const KIB = 1024;',
  'src/lib/upwards.ts': "import type { Engine } from '../engine/engine.js'; export type Upwards = Engine;",
  'src/engine/engine.ts':
    "import { KIB } from '../lib/units.js'; export interface Engine { kib: typeof KIB }",
  'src/engine/spawns.ts': "import { spawn } from 'node:child_process'; export const start = spawn;",
  'src/api/routes.ts': "import type { Engine } from '../engine/engine.js'; export type Routes = Engine;",
  'src/cli/engine-user.ts': "import type { Engine } from '../engine/engine.js'; export type Mine = Engine;",
  'src/db/row.ts': "import type { Format } from '../../repository/format.js'; export type Row = Format;",
  'src/db/code.ts': "import { version } from '../../repository/format.js'; export const mine = version;",
  'repository/format.ts': 'export interface Format { version: number } export const version = 1;',
  'src/elsewhere/new.ts': "import { KIB } from '../lib/units.js'; export const mine = KIB;",
  'src/nbd/a.ts': "import type { B } from './b.js'; export type A = B | null;",
  'src/nbd/b.ts': "import type { A } from './a.js'; export type B = A | undefined;",
  'tsconfig.json': '{ "compilerOptions": { "module": "NodeNext", "target": "ES2022", "strict": true } }',
};

describe('the import rule', () => {
  let directory: string;
  let breaches: Map<string, string[]>;

  beforeAll(async () => {
    directory = await mkdtemp(path.join(os.tmpdir(), 'hf-imports-'));
    for (const [name, text] of Object.entries(FILES)) {
      await mkdir(path.dirname(path.join(directory, name)), { recursive: true });
      await writeFile(path.join(directory, name), text);
    }
    const cruiser = path.join(ROOT, 'node_modules/.bin/depcruise');
    const config = path.join(ROOT, '.dependency-cruiser.cjs');
    const args = ['src', 'repository', '--config', config, '--output-type', 'json'];
    const { stdout } = await runTool(cruiser, args, { timeoutMs: 60_000, cwd: directory });
    breaches = new Map();
    for (const { from, rule } of (JSON.parse(stdout) as Report).summary.violations) {
      breaches.set(from, [...(breaches.get(from) ?? []), rule.name]);
    }
  });
  afterAll(() => rm(directory, { recursive: true, force: true }));

  test.each([
    ['a type from a folder above', 'src/lib/upwards.ts', 'import-rule-lib'],
    ['the engine in the command line', 'src/cli/engine-user.ts', 'import-rule-cli'],
    ['code of the repository in the database', 'src/db/code.ts', 'import-rule-db-types'],
    ['a child process beside src/lib/process.ts', 'src/engine/spawns.ts', 'child-process-core'],
    ['a folder without a place in the rule', 'src/elsewhere/new.ts', 'known-folder'],
    ['a circle', 'src/nbd/a.ts', 'no-circular'],
  ])('refuses %s', (_what, file, rule) => {
    expect(breaches.get(file)).toContain(rule);
  });

  test.each(['src/api/routes.ts', 'src/engine/engine.ts', 'src/db/row.ts', 'src/lib/units.ts'])(
    'lets %s be',
    (file) => {
      expect(breaches.get(file)).toBeUndefined();
    },
  );
});
