import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { Backend } from '../../repository/backend.js';

export interface BackendUnderTest extends AsyncDisposable {
  backend: Backend;
}

/** What every backend promises. Each implementation runs it with its own way to make an empty one. */
export function describeBackend(name: string, makeBackend: () => Promise<BackendUnderTest>): void {
  describe(`the backend contract: ${name}`, () => {
    let made: BackendUnderTest;
    let backend: Backend;
    beforeEach(async () => {
      made = await makeBackend();
      backend = made.backend;
    });
    afterEach(async () => {
      await made[Symbol.asyncDispose]();
    });

    describeReading(() => backend);
    describeWriting(() => backend);
    describeNames(() => backend);
  });
}

function describeReading(get: () => Backend): void {
  it('answers "not there" with undefined or false, never with an error', async () => {
    const backend = get();
    expect(await backend.read('missing')).toBeUndefined();
    expect(await backend.read('missing/deeper/file')).toBeUndefined();
    expect(await backend.readRange('missing', 0, 10)).toBeUndefined();
    expect(await backend.stat('missing')).toBeUndefined();
    expect(await backend.list('missing')).toBeUndefined();
    expect(await backend.remove('missing')).toBe(false);
    expect(await backend.removeDirectory('missing')).toBe(false);
  });

  it('reads ranges, short only where the file ends', async () => {
    const backend = get();
    await backend.writeDurable('file', Buffer.from('0123456789'));
    expect((await backend.readRange('file', 2, 3))?.toString()).toBe('234');
    expect((await backend.readRange('file', 8, 10))?.toString()).toBe('89');
    expect((await backend.readRange('file', 10, 5))?.toString()).toBe('');
    expect((await backend.readRange('file', 50, 5))?.toString()).toBe('');
    expect((await backend.read('file'))?.toString()).toBe('0123456789');
  });

  it('refuses to read more than it was allowed to', async () => {
    const backend = get();
    await backend.writeDurable('file', Buffer.alloc(100));
    await expect(backend.read('file', { maxBytes: 99 })).rejects.toMatchObject({ code: 'REPOSITORY_IO' });
  });

  it('lists everything, with kinds, and an empty directory as empty', async () => {
    const backend = get();
    await backend.makeDirectory('d/sub');
    expect(await backend.list('d/sub')).toEqual([]);
    for (let i = 0; i < 300; i += 1) await backend.createExclusive(`d/f${i}`, Buffer.from('x'));
    const entries = (await backend.list('d')) ?? [];
    expect(entries).toHaveLength(301);
    expect(entries.find((entry) => entry.name === 'sub')?.kind).toBe('directory');
    expect(entries.filter((entry) => entry.kind === 'file')).toHaveLength(300);
  });

  it('lists while others delete: never an error, and what was not touched is always there', async () => {
    const backend = get();
    await backend.makeDirectory('d');
    for (let i = 0; i < 100; i += 1) await backend.createExclusive(`d/f${i}`, Buffer.from('x'));
    const deleting = (async () => {
      for (let i = 0; i < 50; i += 1) await backend.remove(`d/f${i}`);
    })();
    for (let round = 0; round < 20; round += 1) {
      const names = new Set(((await backend.list('d')) ?? []).map((entry) => entry.name));
      for (let i = 50; i < 100; i += 1) expect(names.has(`f${i}`)).toBe(true);
    }
    await deleting;
  });
}

function describeWriting(get: () => Backend): void {
  it('replaces a file in one step and leaves no temporary file', async () => {
    const backend = get();
    await backend.writeDurable('file', Buffer.from('old'));
    await backend.writeDurable('file', Buffer.from('new'), { mode: 0o640 });
    expect((await backend.read('file'))?.toString()).toBe('new');
    expect((await backend.stat('file'))?.mode).toBe(0o640);
    expect(await backend.list('')).toEqual([{ name: 'file', kind: 'file' }]);
  });

  it('readers see the old content or the new while a file is replaced', async () => {
    const backend = get();
    const contents = [Buffer.alloc(200_000, 1), Buffer.alloc(100_000, 2)];
    await backend.writeDurable('file', Buffer.alloc(200_000, 1));
    const writing = (async () => {
      for (let i = 0; i < 30; i += 1) await backend.writeDurable('file', contents[i % 2] ?? Buffer.alloc(0));
    })();
    for (let i = 0; i < 60; i += 1) {
      const seen = await backend.read('file');
      expect(contents.some((content) => seen?.equals(content))).toBe(true);
    }
    await writing;
  });

  it('lets exactly one of several exclusive creators win, with its whole content', async () => {
    const backend = get();
    const writers = Array.from({ length: 16 }, (_, i) => Buffer.alloc(10_000, i));
    const answers = await Promise.all(writers.map((data) => backend.createExclusive('one', data)));
    expect(answers.filter(Boolean)).toHaveLength(1);
    const winner = writers[answers.indexOf(true)];
    expect((await backend.read('one'))?.equals(winner ?? Buffer.alloc(0))).toBe(true);
    expect(await backend.list('')).toHaveLength(1);
  });

  it('leaves nothing of a write that was cancelled', async () => {
    const backend = get();
    await backend.writeDurable('kept', Buffer.from('old'));
    const signal = AbortSignal.abort();
    await expect(backend.writeDurable('kept', Buffer.from('new'), { signal })).rejects.toMatchObject({
      code: 'CANCELLED',
    });
    await expect(backend.createExclusive('never', Buffer.from('new'), { signal })).rejects.toMatchObject({
      code: 'CANCELLED',
    });
    expect((await backend.read('kept'))?.toString()).toBe('old');
    expect(await backend.list('')).toEqual([{ name: 'kept', kind: 'file' }]);
  });

  it('fails a write into a directory that is not there', async () => {
    const backend = get();
    await expect(backend.writeDurable('no/such/file', Buffer.from('x'))).rejects.toMatchObject({
      code: 'REPOSITORY_IO',
    });
    await expect(backend.rename('nothing', 'else')).rejects.toMatchObject({ code: 'REPOSITORY_IO' });
    await expect(backend.syncFile('nothing')).rejects.toMatchObject({ code: 'REPOSITORY_IO' });
  });

  it('makes directories with parents, again and again', async () => {
    const backend = get();
    await Promise.all([1, 2, 3, 4].map(() => backend.makeDirectory('a/b/c')));
    await backend.makeDirectory('a/b/c');
    expect((await backend.stat('a/b/c'))?.kind).toBe('directory');
    await backend.writeDurable('plain', Buffer.from('x'));
    await expect(backend.makeDirectory('plain/below')).rejects.toMatchObject({ code: 'REPOSITORY_IO' });
  });

  it('removes only empty directories', async () => {
    const backend = get();
    await backend.makeDirectory('d');
    await backend.writeDurable('d/file', Buffer.from('x'));
    expect(await backend.removeDirectory('d')).toBe(false);
    expect(await backend.remove('d/file')).toBe(true);
    expect(await backend.removeDirectory('d')).toBe(true);
  });

  it('moves files, makes them read-only, and can still remove them', async () => {
    const backend = get();
    await backend.makeDirectory('d');
    await backend.writeDurable('a', Buffer.from('1'));
    await backend.rename('a', 'd/b');
    await backend.syncDirectory('d');
    await backend.setReadOnly('d/b');
    expect((await backend.stat('d/b'))?.mode).toBe(0o440);
    expect(await backend.stat('a')).toBeUndefined();
    expect(await backend.remove('d/b')).toBe(true);
  });

  it('knows its capacity', async () => {
    const { totalBytes, freeBytes } = await get().capacity();
    expect(totalBytes).toBeGreaterThan(0);
    expect(freeBytes).toBeLessThanOrEqual(totalBytes);
  });
}

function describeNames(get: () => Backend): void {
  const hostile = [
    '../out',
    'a/../../out',
    '/etc/passwd',
    'a//b',
    './a',
    'a/.',
    'a\0b',
    '..',
    'x'.repeat(300),
  ];
  it.each(hostile)('refuses the name %j everywhere', async (name) => {
    const backend = get();
    const refused = { code: 'INVALID_INPUT' };
    await expect(backend.read(name)).rejects.toMatchObject(refused);
    await expect(backend.readRange(name, 0, 1)).rejects.toMatchObject(refused);
    await expect(backend.writeDurable(name, Buffer.alloc(1))).rejects.toMatchObject(refused);
    await expect(backend.createExclusive(name, Buffer.alloc(1))).rejects.toMatchObject(refused);
    await expect(backend.list(name)).rejects.toMatchObject(refused);
    await expect(backend.rename(name, 'b')).rejects.toMatchObject(refused);
    await expect(backend.remove(name)).rejects.toMatchObject(refused);
    await expect(backend.removeDirectory(name)).rejects.toMatchObject(refused);
    await expect(backend.makeDirectory(name)).rejects.toMatchObject(refused);
    await expect(backend.stat(name)).rejects.toMatchObject(refused);
    await expect(backend.setReadOnly(name)).rejects.toMatchObject(refused);
    expect(() => backend.localPath(name)).toThrow(expect.objectContaining(refused));
  });
}
