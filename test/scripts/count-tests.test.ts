import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import os from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { runTool } from '../../src/lib/process.js';

const SCRIPT = path.resolve(import.meta.dirname, '../../scripts/lib/count-tests.mjs');

let directory: string;
beforeEach(async () => {
  directory = await mkdtemp(path.join(os.tmpdir(), 'hf-count-'));
});
afterEach(() => rm(directory, { recursive: true, force: true }));

async function count(files: Record<string, unknown>): Promise<{ lines: string[]; exitCode: number }> {
  for (const [name, content] of Object.entries(files)) {
    await writeFile(
      path.join(directory, name),
      typeof content === 'string' ? content : JSON.stringify(content),
    );
  }
  const result = await runTool(process.execPath, [SCRIPT, directory], {
    timeoutMs: 10_000,
    acceptExitCodes: [0, 1],
  });
  return { lines: result.stdout.split('\n'), exitCode: result.exitCode };
}

const suite = (status: string, ...tests: string[]) => ({
  testResults: [
    {
      name: '/x/a.test.ts',
      status,
      assertionResults: tests.map((each, i) => ({ status: each, fullName: `t${i}` })),
    },
  ],
});

test('stages and tests are added up', async () => {
  const { lines, exitCode } = await count({
    'build.status': '0\n',
    'lint.status': '0\n',
    'unit.json': suite('passed', 'passed', 'passed'),
  });
  expect(lines).toEqual(['4 passed, 0 failed']);
  expect(exitCode).toBe(0);
});

test.each([
  ['a stage that failed', { 'build.status': '2\n' }, 'failed: stage build'],
  ['a test that failed', { 'unit.json': suite('failed', 'failed') }, 't0'],
  ['a test that was skipped', { 'unit.json': suite('passed', 'skipped') }, '(skipped)'],
  ['a file without tests', { 'unit.json': suite('failed') }, 'no test ran'],
  [
    'a file that failed after its tests',
    { 'unit.json': suite('failed', 'passed') },
    'before or after its tests',
  ],
])('%s is a failure', async (_what, files, words) => {
  const { lines, exitCode } = await count({ 'ok.status': '0', ...files });
  expect(lines.join('\n')).toContain(words);
  expect(lines.at(-1)).toMatch(/^\d+ passed, 1 failed$/);
  expect(exitCode).toBe(1);
});

test('nothing at all is no success', async () => {
  expect(await count({})).toEqual({ lines: ['0 passed, 0 failed'], exitCode: 1 });
});
