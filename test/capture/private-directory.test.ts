import { lstat, mkdir, mkdtemp, readdir, rm, symlink, writeFile } from 'node:fs/promises';
import os from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, expect, it, vi } from 'vitest';
import { makePrivateDirectory } from '../../src/capture/private-directory.js';
import { processStartTime } from '../../src/lib/process.js';

let parent: string;
beforeEach(async () => {
  parent = await mkdtemp(path.join(os.tmpdir(), 'holdfast-test-'));
  vi.stubEnv('TMPDIR', parent);
});
afterEach(async () => {
  vi.unstubAllEnvs();
  await rm(parent, { recursive: true });
});

it('only its owner enters it, and it goes with its content', async () => {
  {
    await using directory = await makePrivateDirectory();
    expect(path.dirname(directory.path)).toBe(parent);
    expect((await lstat(directory.path)).mode & 0o777).toBe(0o700);
    await writeFile(path.join(directory.path, 'n-1.sock'), '');
  }
  expect(await readdir(parent)).toEqual([]);
});

it('what a dead agent left goes; what a living one has, and what only looks like it, stays', async () => {
  const start = await processStartTime(process.pid);
  const living = `holdfast-capture-${process.pid}-${start}-abcdef`;
  const kept = [living, 'holdfast-capture-notes', 'other'];
  for (const name of [...kept, `holdfast-capture-${process.pid}-1-abcdef`]) {
    await mkdir(path.join(parent, name));
    await writeFile(path.join(parent, name, 'file'), '');
  }
  const link = 'holdfast-capture-4194305-1-link';
  await symlink('other', path.join(parent, link));
  await using _directory = await makePrivateDirectory();
  const names = (await readdir(parent)).filter((name) => name !== path.basename(_directory.path));
  expect(names.sort()).toEqual([...kept, link].sort());
  expect(await readdir(path.join(parent, 'other'))).toEqual(['file']);
});
