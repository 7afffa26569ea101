import { readFile, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { expect, test } from 'vitest';
import { runTool } from '../../src/lib/process.js';
import { makeLabDirectory } from '../lab/directory.js';

const ROOT = path.resolve(import.meta.dirname, '../..');

test('systemd accepts the unit, and reloads it by SIGHUP', async () => {
  await using directory = await makeLabDirectory();
  const text = await readFile(path.join(ROOT, 'packaging/holdfast-exportd.service'), 'utf8');
  expect(text).toMatch(/^ExecReload=\/bin\/kill -HUP \$MAINPID$/m);
  const file = directory.file('holdfast-exportd.service');
  await writeFile(file, text.replaceAll('/opt/holdfast', ROOT));
  // It says nothing when all is well; an unknown setting is a line, and no failure.
  const { stdout, stderr } = await runTool('systemd-analyze', ['verify', '--man=no', file], {
    timeoutMs: 20_000,
  });
  expect(stdout + stderr).toBe('');
});
