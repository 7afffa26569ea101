import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import os from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { runTool } from '../../src/lib/process.js';

const SCRIPT = path.resolve(import.meta.dirname, '../../scripts/lib/failed-tests.mjs');

let directory: string;
beforeEach(async () => {
  directory = await mkdtemp(path.join(os.tmpdir(), 'hf-failed-'));
});
afterEach(() => rm(directory, { recursive: true, force: true }));

async function failedOf(report: unknown): Promise<string> {
  const file = path.join(directory, 'unit.json');
  if (report !== null) await writeFile(file, JSON.stringify(report));
  return (await runTool(process.execPath, [SCRIPT, file], { timeoutMs: 10_000 })).stdout;
}

test('a failed test is named with the beginning of its error, a passed one is not', async () => {
  const assertionResults = [
    { status: 'passed', fullName: 'works', failureMessages: [] },
    { status: 'failed', fullName: 'breaks', failureMessages: ['Error: one\ntwo\nthree\nfour'] },
  ];
  const said = await failedOf({
    testResults: [{ name: path.resolve('x/a.test.ts'), status: 'failed', message: '', assertionResults }],
  });
  expect(said).toBe('x/a.test.ts: breaks\n    Error: one\n    two\n    three');
});

test('a file that could not be loaded is named with its error', async () => {
  const said = await failedOf({
    testResults: [
      { name: path.resolve('b.test.ts'), status: 'failed', message: 'no such module', assertionResults: [] },
    ],
  });
  expect(said).toBe('b.test.ts\n    no such module');
});

test('without a report nothing is said', async () => {
  expect(await failedOf(null)).toBe('');
});
