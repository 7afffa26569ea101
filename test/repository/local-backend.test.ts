import { mkdir, mkdtemp, readFile, rename, rm, symlink, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { LocalBackend } from '../../repository/local-backend.js';
import { describeBackend } from '../contract/backend-contract.js';
import { faultyBackend } from '../contract/faulty-backend.js';

async function makeLocal(): Promise<{ backend: LocalBackend } & AsyncDisposable> {
  const root = await mkdtemp('/dev/shm/holdfast-backend-');
  return {
    backend: new LocalBackend({ root }),
    [Symbol.asyncDispose]: () => rm(root, { recursive: true, force: true }),
  };
}

describeBackend('local directory', makeLocal);
describeBackend('local directory behind the fault decorator', async () => {
  const local = await makeLocal();
  return { ...local, backend: faultyBackend(local.backend).backend };
});

describe('LocalBackend', () => {
  let base: string;
  let root: string;
  beforeEach(async () => {
    base = await mkdtemp('/dev/shm/holdfast-backend-');
    root = path.join(base, 'root');
    await mkdir(root);
    await writeFile(path.join(root, 'anchor'), '');
  });
  afterEach(async () => {
    await rm(base, { recursive: true, force: true });
  });

  it('follows no symbolic link out of the root, for files and for directories', async () => {
    await writeFile(path.join(base, 'secret'), 'secret');
    await mkdir(path.join(base, 'outside'));
    await symlink(path.join(base, 'secret'), path.join(root, 'link'));
    await symlink(path.join(base, 'outside'), path.join(root, 'directory'));
    const backend = new LocalBackend({ root });
    await expect(backend.read('link')).rejects.toMatchObject({ code: 'REPOSITORY_IO' });
    await expect(backend.list('directory')).rejects.toMatchObject({ code: 'REPOSITORY_IO' });
    await expect(backend.writeDurable('directory/file', Buffer.from('x'))).rejects.toMatchObject({
      code: 'REPOSITORY_IO',
    });
    await expect(backend.makeDirectory('directory/below')).rejects.toMatchObject({ code: 'REPOSITORY_IO' });
    await backend.writeDurable('link', Buffer.from('replaced'));
    expect(await readFile(path.join(base, 'secret'), 'utf8')).toBe('secret');
    expect((await backend.list(''))?.find((entry) => entry.name === 'directory')?.kind).toBe('other');
  });

  it('says REPOSITORY_OFFLINE instead of "not there" once its anchor is gone', async () => {
    const backend = new LocalBackend({ root, anchor: 'anchor' });
    expect(await backend.read('missing')).toBeUndefined();
    await rm(path.join(root, 'anchor'));
    await expect(backend.read('missing')).rejects.toMatchObject({ code: 'REPOSITORY_OFFLINE' });
    await expect(backend.list('missing')).rejects.toMatchObject({ code: 'REPOSITORY_OFFLINE' });
    await rename(root, `${root}-gone`);
    await expect(backend.remove('missing')).rejects.toMatchObject({ code: 'REPOSITORY_OFFLINE' });
    await expect(backend.writeDurable('file', Buffer.from('x'))).rejects.toMatchObject({
      code: 'REPOSITORY_OFFLINE',
    });
    await expect(backend.makeDirectory('vms')).rejects.toMatchObject({ code: 'REPOSITORY_OFFLINE' });
    await expect(backend.capacity()).rejects.toMatchObject({ code: 'REPOSITORY_OFFLINE' });
  });

  it('does not hang on a named pipe', async () => {
    const { runTool } = await import('../../src/lib/process.js');
    await runTool('mkfifo', [path.join(root, 'pipe')], { timeoutMs: 5000 });
    const backend = new LocalBackend({ root });
    await expect(backend.read('pipe')).rejects.toMatchObject({ code: 'REPOSITORY_IO' });
  });
});
